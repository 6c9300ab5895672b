"""``python -m demo.train``: trains the demo model from a seed, on a laptop's CPU.

First the vision tower learns what each patch shows. Then the whole model learns to answer, on
images of 12 x 12 patches and at last of 24 x 24 patches, the size that a server uses.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from demo.batch import Batch, BatchShape
from demo.dataset import Batches
from demo.losses import Heads, answer_loss, attention_losses
from demo.optimiser import Optimiser
from demo.questions import corpus
from vitcop_vllm.demo.checkpoint import DEMO, FEATURE_LAYER, LlavaShape, save_config, save_weights
from vitcop_vllm.demo.tokenizer import VOCABULARY, byte_tokenizer
from vitcop_vllm.pruning.settings import PruningSettings


@dataclass(frozen=True)
class Phase:
    """A phase of training.

    Attributes:
        name: Name in the log.
        steps: Optimiser steps.
        batch: Shape of a step's batch.
        rate: Learning rate at the first and last step, as fractions of the full rate.
        tower_rate: The same for the vision tower and its heads.
    """

    name: str
    steps: int
    batch: BatchShape
    rate: tuple[float, float]
    tower_rate: tuple[float, float]

    def rates(self, step: int) -> tuple[float, float]:
        """Both rates at a step."""
        return self._at(step, *self.rate), self._at(step, *self.tower_rate)

    def _at(self, step: int, begin: float, end: float) -> float:
        return begin + (end - begin) * (step / self.steps)


DROPPED = (0.0, 0.0, 0.25)
"""Fractions of visual tokens dropped from the decoder; each batch draws one. Steps get cheaper, and
the model learns to spread information over several tokens, as large models do."""

GAPS = (0.0, 0.25, 0.5, 0.67, 0.85)
"""Fractions in the phases that drop background first. Without these phases the model counts and
lists things by the amount of background, and fails if a selector drops background."""

PHASES = (
    Phase("patches", 800, BatchShape(168, 64), (1.0, 1.0), (1.0, 0.25)),
    # The tower's rate is low: at the decoder's rate it unlearns letters and places.
    Phase("answers", 1500, BatchShape(168, 24, 190, DROPPED, 0.14), (1.0, 0.5), (0.3, 0.2)),
    Phase("full size", 381, BatchShape(336, 12, 190, DROPPED, 0.14), (0.5, 0.3303), (0.3, 0.1996)),
    # The tower's rate is higher now, because larger letters are new to it.
    Phase("finish", 800, BatchShape(336, 12, 190, DROPPED, 0.14), (0.35, 0.01), (0.5, 0.01)),
    Phase("gaps", 300, BatchShape(336, 12, 190, GAPS, 0.14, True), (0.15, 0.01), (0.05, 0.01)),
    # Large models hardly attend to images in their deep layers. This phase gives the deep layers
    # few visual tokens, so that the model learns the same.
    Phase(
        "depth", 220, BatchShape(336, 12, 190, GAPS, 0.14, True, 0.25), (0.25, 0.01), (0.05, 0.01)
    ),
)
WARMUP = 60  # steps


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention in plain operations; on a CPU its backward pass beats fused attention's."""
    scores = (query * options["scaling"]) @ key.transpose(-1, -2)
    if mask is not None:
        stage = int(getattr(module, "is_deep", False))
        scores = scores + mask[:, stage : stage + 1]
    weights = scores.softmax(-1)
    if getattr(module, "is_watched", False):
        module.weights = weights
    return (weights @ value).transpose(1, 2), None


def build(path: Path, shape: LlavaShape, tokenizer: Any, seed: int) -> nn.Module:
    """A model with random weights. Writes its configuration to ``path``."""
    from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration

    save_config(path, shape, tokenizer, VOCABULARY)
    torch.manual_seed(seed)
    AttentionInterface.register("written_out", _attention)
    config = LlavaConfig.from_pretrained(path, attn_implementation="written_out")
    model: nn.Module = LlavaForConditionalGeneration(config)
    return model


def _normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean = torch.tensor(OPENAI_CLIP_MEAN, device=pixels.device)
    std = torch.tensor(OPENAI_CLIP_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype).contiguous()


class Run:
    """A training run that saves its state in a folder and can be resumed from it."""

    def __init__(
        self,
        folder: Path,
        *,
        shape: LlavaShape = DEMO,
        seed: int = 0,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        self.folder, self.shape, self.seed = folder, shape, seed
        self.device = torch.device(device)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = byte_tokenizer(corpus(4000, seed), VOCABULARY)
        self.image = self.tokenizer.convert_tokens_to_ids("<image>")
        model = build(folder / "model", shape, self.tokenizer, seed)
        self.model: Any = model.to(self.device, torch.bfloat16)
        self.heads = Heads(shape.vision_hidden).to(self.device, torch.bfloat16)
        self.optimiser = Optimiser([self.model, self.heads])
        self.phase = self.step = 0
        self.seconds = 0.0
        self.stopping = False
        inner: Any = model.model
        # ``attention_losses`` trains the attention of this layer.
        self.watched = inner.language_model.layers[shape.layers // 4]
        self.watched.self_attn.is_watched = True
        _, deep = PruningSettings().boundaries(shape.layers)
        for layer in inner.language_model.layers[deep:]:
            layer.self_attn.is_deep = True
        if compiled:
            for layer in (*inner.vision_tower.encoder.layers, *inner.language_model.layers):
                if layer is not self.watched:
                    layer.compile()

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
        save_weights(self.folder / "model", self.model.state_dict())

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the values to log."""
        states = self.model.model.vision_tower(
            _normalised(batch.pixels, torch.bfloat16),
            output_hidden_states=True,
            interpolate_pos_encoding=batch.pixels.shape[1] != self.shape.image_size,
        ).hidden_states
        parts = self.heads(states, batch)
        tower_loss = sum(parts.values())
        if batch.sequences is None:
            return tower_loss, parts
        loss, right = answer_loss(
            self.model, states[FEATURE_LAYER][:, 1:], batch.sequences, self.image
        )
        parts = {f"patch {name}": part for name, part in parts.items()}
        parts |= {"answer": loss, **right}
        if len(batch.sequences.looks):
            weights = self.watched.self_attn.weights
            looks = attention_losses(weights, batch.sequences, self.image)
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
        data = Batches(phase.batch, self.tokenizer, self.seed, self.phase, self.step, phase.steps)
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
    parser.add_argument("--out", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds")
    args = parser.parse_args()
    run = Run(args.out, seed=args.seed, device=args.device, compiled=not args.no_compile)
    if (args.out / "state.pt").exists():
        run.load()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(run, "stopping", True))
    run.train(PHASES, args.workers, args.save_every)
    if run.stopping:
        print(f"Stopped and saved in {args.out}. The same command resumes the run.")


if __name__ == "__main__":
    main()
