"""``python -m vitcop_vllm.demo.train``: the demo model from a seed, on a laptop's CPU.

First the vision tower learns what each patch shows, then the whole model learns to answer on
pictures of 12 x 12 patches, and at last on the 24 x 24 patches it is served with.
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from vitcop_vllm.demo.checkpoint import DEMO, LlavaShape, save_config, save_weights
from vitcop_vllm.demo.dataset import CONTENT, IGNORED, Batch, Batches, BatchShape, Sequences
from vitcop_vllm.demo.drawing import TARGETS
from vitcop_vllm.demo.questions import FAMILIES, corpus
from vitcop_vllm.demo.tokenizer import VOCABULARY, byte_tokenizer

LAYER = -2
"""LLaVA-1.5's vision feature layer."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
        name: For the log.
        steps: Optimiser steps.
        batch: What a step sees.
        rate: Learning rate at its beginning and end, as a share of the full one.
        tower_rate: The vision tower's and its heads', likewise.
    """

    name: str
    steps: int
    batch: BatchShape
    rate: tuple[float, float]
    tower_rate: tuple[float, float]

    def rates(self, step: int) -> tuple[float, float]:
        """Both rates at a step."""
        done = step / self.steps
        first, second = (
            begin + (end - begin) * done for begin, end in (self.rate, self.tower_rate)
        )
        return first, second


DROPPED = (0.0, 0.0, 0.25)
"""Shares of visual tokens that the decoder does without, drawn per batch: cheaper, and a
model that has seen gaps spreads what it sees, as large ones do."""

PHASES = (
    Phase("patches", 800, BatchShape(168, 64), (1.0, 1.0), (1.0, 0.25)),
    # The tower goes on slowly: at the decoder's rate it unlearns letters and places.
    Phase("answers", 1700, BatchShape(168, 24, 190, DROPPED, 0.14), (1.0, 0.5), (0.3, 0.2)),
    Phase("full size", 1200, BatchShape(336, 12, 190, DROPPED, 0.14), (0.5, 0.01), (0.3, 0.01)),
)
WARMUP = 60  # steps
MATRIX_RATE = 2e-3
OTHER_RATE = 2e-3


class Heads(nn.Module):
    """What the vision tower is asked while it learns; not part of the model.

    Patches tell what they show and where they are, and [CLS], of the feature layer and of the
    last one, what the whole picture holds: without that [CLS] would have no reason to look
    anywhere.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(TARGETS.values()))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.contents = nn.ModuleList([nn.Linear(width, CONTENT), nn.Linear(width, CONTENT)])

    def forward(self, states: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        losses = {}
        seen = self.norm(states[LAYER][:, 1:])
        logits = self.patches(seen).float()
        start = 0
        for name, classes in TARGETS.items():
            target = batch.targets[name].long().flatten()
            loss = F.cross_entropy(
                logits[..., start : start + classes].flatten(0, 1), target, reduction="none"
            )
            shown = target > 0
            # Most patches show nothing; those that do count as much as all together.
            losses[name] = 0.5 * loss.mean() + 0.5 * (loss * shown).sum() / shown.sum().clamp_min(1)
            start += classes
        weight = torch.full((CONTENT,), 6.0, device=logits.device)
        for i, state in enumerate((states[LAYER], states[-1])):
            guess = self.contents[i](self.norms[i](state[:, 0])).float()
            losses[f"cls{i}"] = F.binary_cross_entropy_with_logits(
                guess, batch.content, pos_weight=weight
            )
        return losses


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention written out: its backward is faster on a CPU than the fused one."""
    scores = (query * options["scaling"]) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    if getattr(module, "is_watched", False):
        module.weights = weights
    return (weights @ value).transpose(1, 2), None


def build(path: Path, shape: LlavaShape, tokenizer: Any, seed: int) -> nn.Module:
    """A fresh model; writes its configuration to ``path``."""
    from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration

    save_config(path, shape, tokenizer)
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


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, 1, T, T) additive: a token sees segment 0 and its own, up to itself."""
    length = segments.shape[1]
    mine, theirs = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((mine == theirs) | (theirs == 0))
    return torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )[:, None]


def answers(
    model: Any, features: Tensor, sequences: Sequences, image: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the answers' tokens, and the share of right answers by family.

    Args:
        model: The whole LLaVA.
        features: (N, V, width) of the vision tower.
        sequences: Conversations about the pictures.
        image: Id of the visual tokens' placeholder.
    """
    inner = model.model
    kept = sequences.kept[..., None].expand(-1, -1, features.shape[-1])
    visual = inner.multi_modal_projector(features.gather(1, kept))
    embeds = inner.language_model.embed_tokens(sequences.ids)
    embeds = embeds.masked_scatter((sequences.ids == image)[..., None], visual)
    hidden = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=_mask(sequences.segments, embeds.dtype),
        position_ids=sequences.positions,
        use_cache=False,
    ).last_hidden_state
    told = sequences.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][told]).float()
    wanted = sequences.labels[:, 1:][told]
    return F.cross_entropy(logits, wanted), _exact(sequences, logits.argmax(-1) == wanted, told)


def looking(weights: Tensor, sequences: Sequences, image: int) -> Tensor:
    """How far the watched layer is from looking where the answer is.

    Each group that a question is about has a head of its own, whose attention from the prompt's
    last token should fall on it: mean of -log(its sum there).

    Args:
        weights: (S, heads, T, T) attention.
        sequences: With at least one look.
        image: Id of the visual tokens' placeholder.
    """
    row, token, group = sequences.looks.unbind(1)
    visual = (sequences.ids[0] == image).nonzero()[:, 0]
    seen = weights[row, group, token][:, visual].float()
    return -(seen * sequences.looked).sum(1).clamp_min(1e-6).log().mean()


def _exact(sequences: Sequences, right: Tensor, told: Tensor) -> dict[str, Tensor]:
    """Share of answers with every token right, which is what greedy decoding says, by family."""
    row = torch.arange(told.shape[0], device=told.device)[:, None].expand_as(told)[told]
    conversation = row * told.shape[1] + sequences.segments[:, 1:][told]
    _, which = conversation.unique(return_inverse=True)
    whole = torch.ones(int(which.max()) + 1, device=told.device)
    whole.scatter_reduce_(0, which, right.float(), "amin")
    family = torch.zeros(whole.shape, dtype=torch.int64, device=told.device)
    family.scatter_(0, which, sequences.families[:, 1:][told])
    return {
        name: whole[family == i].mean()
        for i, name in enumerate(FAMILIES)
        if bool((family == i).any())
    }


class Optimiser:
    """Muon for the layers' matrices, AdamW for all else, on float32 copies of the weights."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.weights: list[Tensor] = []
        self.masters: list[Tensor] = []
        matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        others: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for module in modules:
            for name, weight in module.named_parameters():
                master = nn.Parameter(weight.detach().float().clone())
                self.weights.append(weight)
                self.masters.append(master)
                inside = ".layers." in name or "projector" in name
                tower = isinstance(module, Heads) or ".vision_tower." in name
                (matrices if inside and weight.dim() == 2 else others)[tower].append(master)

        def groups(of: dict[bool, list[nn.Parameter]]) -> list[dict[str, Any]]:
            return [{"params": params, "tower": tower} for tower, params in of.items()]

        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    groups(matrices),
                    lr=MATRIX_RATE,
                    weight_decay=0.05,
                    adjust_lr_fn="match_rms_adamw",
                ),
                MATRIX_RATE,
            ),
            (
                torch.optim.AdamW(
                    groups(others), lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0
                ),
                OTHER_RATE,
            ),
        ]

    def step(self, share: float, tower_share: float) -> None:
        """One step with gradients from the weights, at shares of the full rates."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        used = [master for master in self.masters if master.grad is not None]
        nn.utils.clip_grad_norm_(used, 1.0)
        for part, rate in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * (tower_share if group["tower"] else share)
            part.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": [master.detach() for master in self.masters],
            "parts": [part.state_dict() for part, _ in self.parts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
            torch._foreach_copy_(self.weights, self.masters)
        for (part, _), saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class Run:
    """A training run in a folder, from which it can be taken up again."""

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
        self.watched = inner.language_model.layers[shape.layers // 4]
        self.watched.self_attn.is_watched = True
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
        # Renamed when whole: a run that is killed here goes on from the one before.
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        save_weights(self.folder / "model", self.model.state_dict())

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is to be made small, and what to log."""
        states = self.model.model.vision_tower(
            _normalised(batch.pixels, torch.bfloat16),
            output_hidden_states=True,
            interpolate_pos_encoding=batch.pixels.shape[1] != self.shape.image_size,
        ).hidden_states
        parts = self.heads(states, batch)
        seen = sum(parts.values())
        if batch.sequences is None:
            return seen, parts
        loss, right = answers(self.model, states[LAYER][:, 1:], batch.sequences, self.image)
        parts = {f"patch {name}": part for name, part in parts.items()}
        parts |= {"answer": loss, **right}
        if len(batch.sequences.looks):
            weights = self.watched.self_attn.weights
            parts["look"] = looking(weights, batch.sequences, self.image)
            loss = loss + 0.3 * parts["look"]
        return loss + 0.5 * seen, parts

    def train(self, phases: tuple[Phase, ...], workers: int, save_every: float) -> None:
        """Go on until the phases are over or ``stopping`` is set, and save.

        Args:
            phases: All phases of the run, also those that are over.
            workers: Processes that make pictures; 0 makes them here.
            save_every: Seconds between savings.
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
                means = {name: round(sum(of) / len(of), 4) for name, of in sums.items()}
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
        print(f"Stopped and saved in {args.out}; the same command goes on from there.")


if __name__ == "__main__":
    main()
