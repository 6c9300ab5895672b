"""``python -m demo.train``: trains the demo model from a seed, on a laptop's CPU.

First the vision tower learns what each patch shows. Then the whole model learns to answer, on small
images and at last on images of the exam's size. ``--form`` chooses what kind of model to train.
``--begin`` with ``--first-phase`` trains a trained model further.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from demo.batch import Batch
from demo.dataset import Batches, Encoder
from demo.form import Form
from demo.llava_form import LlavaForm
from demo.losses import Heads, answer_loss, attention_losses, of_kept
from demo.optimiser import Optimiser
from demo.phases import LLAVA_PHASES, QWEN_PHASES, WARMUP, Phase
from demo.questions import corpus
from demo.qwen_form import QwenForm
from vitcop_vllm.demo.checkpoint import save_weights
from vitcop_vllm.pruning.settings import PruningSettings

FORMS = {"llava": (LlavaForm, LLAVA_PHASES), "qwen": (QwenForm, QWEN_PHASES)}
"""Name -> what to train, and how."""


class Run:
    """A training run that saves its state in a folder and can be resumed from it."""

    def __init__(
        self,
        folder: Path,
        *,
        form: Form,
        seed: int = 0,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = False,
        begin: Path | None = None,
    ) -> None:
        """
        Args:
            folder: The run's folder; its ``model`` is a Hugging Face folder.
            form: What to train.
            seed: Seed of weights, images and questions.
            device: Device of weights and batches.
            dtype: Type of weights and activations; masters of weights are float32.
            compiled: Compile layers.
            begin: Folder of a model of this form, whose weights to begin with.
        """
        self.folder, self.form, self.seed = folder, form, seed
        self.device = torch.device(device)
        folder.mkdir(parents=True, exist_ok=True)
        model, tokenizer = form.build(folder / "model", corpus(4000, seed), seed)
        if begin is not None:
            trained: Any = type(model)
            model.load_state_dict(trained.from_pretrained(begin).state_dict())
        self.encoder = Encoder(tokenizer, form)
        self.model: Any = model.to(self.device, dtype)
        self.heads = Heads(form).to(self.device, dtype)
        self.optimiser = Optimiser(form, [self.model, self.heads])
        self.phase = self.step = 0
        self.seconds = 0.0
        self.stopping = False
        inner: Any = self.model.model
        layers = inner.language_model.layers
        # ``attention_losses`` trains the attention of this layer.
        self.watched = layers[form.layers // 4]
        self.watched.self_attn.is_watched = True
        if form.decoder_targets:
            self.watched.register_forward_pre_hook(self._keep_states)
        _, deep = PruningSettings().boundaries(form.layers)
        for layer in layers[deep:]:
            layer.self_attn.is_deep = True
        if compiled:
            for part in form.parts(self.model):
                if part is not self.watched:
                    part.compile()

    def _keep_states(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.states = inputs[0]

    def load(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location=self.device, weights_only=True)
        self.phase, self.step, self.seconds = state["phase"], state["step"], state["seconds"]
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        state = {
            "phase": self.phase,
            "step": self.step,
            "seconds": self.seconds,
            "optimiser": self.optimiser.state_dict(),
        }
        # Rename the complete file, so that a run killed here resumes from the previous state.
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        weights = {name: weight.bfloat16() for name, weight in self.model.state_dict().items()}
        save_weights(self.folder / "model", weights)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the values to log."""
        seen = self.form.see(self.model, batch.pixels)
        parts = self.heads(seen, batch)
        tower_loss = sum(parts.values())
        sequences = batch.sequences
        if sequences is None:
            return tower_loss, parts
        image = self.encoder.image
        loss, right = answer_loss(self.form, self.model, seen.tokens, sequences, image)
        parts = {f"patch {name}": part for name, part in parts.items()}
        parts |= {"answer": loss, **right}
        if self.form.decoder_targets:
            targets = {
                name: of_kept(batch.targets[name], sequences.kept)
                for name in self.form.decoder_targets
            }
            states = self.states[sequences.ids == image].unflatten(0, sequences.kept.shape)
            places = self.heads.places(states, targets)
            parts |= places
            loss = loss + 0.3 * sum(places.values())
        if len(sequences.looks):
            looks = attention_losses(self.watched.self_attn.weights, sequences, image)
            parts |= looks
            loss = loss + 0.3 * sum(looks.values())
        return loss + 0.5 * tower_loss, parts

    def train(self, phases: tuple[Phase, ...], workers: int, save_every: float) -> None:
        """Train until the last phase ends or ``stopping`` is set, and save.

        Args:
            phases: All phases of the run, also the finished ones.
            workers: Processes that make batches; 0 makes them in this process.
            save_every: Seconds between saves.
        """
        with (self.folder / "log.jsonl").open("a") as log:
            while self.phase < len(phases) and not self.stopping:
                self._train_phase(phases[self.phase], workers, save_every, log)
                if not self.stopping:
                    self.phase, self.step = self.phase + 1, 0
                self.save()

    def _train_phase(self, phase: Phase, workers: int, save_every: float, log: Any) -> None:
        data = Batches(phase.batch, self.encoder, self.seed, self.phase, self.step, phase.steps)
        loader = DataLoader(
            data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
        )
        bar = tqdm(loader, desc=phase.name, initial=self.step, total=phase.steps, smoothing=0.05)
        sums: dict[str, list[float]] = defaultdict(list)
        saved = last = time.monotonic()
        for batch in bar:
            loss, parts = self.losses(batch.to(self.device))
            loss.backward()
            warm = min(1.0, (self.step + 1) / WARMUP)
            rate, tower_rate = phase.rates(self.step)
            self.optimiser.step(warm * rate, warm * tower_rate)
            self.step += 1
            for name, part in parts.items():
                sums[name].append(float(part.detach()))
            if self.step % 20 == 0:
                now = time.monotonic()
                self.seconds += now - last
                last = now
                means = {name: round(sum(part) / len(part), 4) for name, part in sums.items()}
                sums.clear()
                bar.set_postfix(loss=means.get("answer", means.get("shape")))
                record = {"phase": phase.name, "step": self.step, "seconds": round(self.seconds)}
                log.write(json.dumps(record | means) + "\n")
                log.flush()
            if self.stopping:
                break
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS, default="llava")
    parser.add_argument("--out", type=Path, help="folder of the run; default: build/demo-FORM")
    begin_help = "folder of a trained model of this form; default: the form's own beginning"
    parser.add_argument("--begin", type=Path, help=begin_help)
    parser.add_argument("--first-phase", metavar="NAME", help="leave out the phases before it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtype_help = "float32 is faster on processors without AMX or AVX-512 for bfloat16"
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=dtype_help
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds")
    args = parser.parse_args()
    make_form, phases = FORMS[args.form]
    names = [phase.name for phase in phases]
    if args.first_phase not in (None, *names):
        parser.error(f"--first-phase is none of: {', '.join(names)}")
    out = args.out or Path("build") / f"demo-{args.form}"
    run = Run(
        out,
        form=make_form(),
        seed=args.seed,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        compiled=not args.no_compile,
        begin=args.begin,
    )
    if (out / "state.pt").exists():
        run.load()
    elif args.first_phase:
        run.phase = names.index(args.first_phase)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(run, "stopping", True))
    run.train(phases, args.workers, args.save_every)
    if run.stopping:
        print(f"Stopped and saved in {out}. The same command resumes the run.")


if __name__ == "__main__":
    main()
