"""Batches of the small world: pictures, conversations about them, and what is where.

A picture is paid for once and asked about many times: the questions about it stand one after
the other in a sequence, each seeing the picture and itself only, so that each is a first
question. A conversation's turns see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from vitcop_vllm.demo import scenes
from vitcop_vllm.demo.scenes import Rng, Scene, Turn

PATCH = 14
IGNORED = -100
"""Label of a token that is not to be learnt."""

WEIGHTS = {
    "colour": 1.0,
    "shape": 1.0,
    "size": 0.7,
    "position": 1.0,
    "count": 1.5,
    "existence": 1.2,
    "relation": 2.0,
    "text": 1.0,
    "odd one out": 1.0,
}
"""How often a family is asked; harder ones more."""


@dataclass(frozen=True)
class BatchShape:
    """What a batch holds.

    Attributes:
        side: Height and width of a picture in pixels.
        pictures: Pictures.
        text: Tokens for questions in a sequence, besides the pictures'; 0 for pictures alone.
        dropped: Shares of visual tokens that may be left out at random, one per batch.
        pair_share: Share of the batches that ask about two pictures at once.
    """

    side: int
    pictures: int
    text: int = 0
    dropped: tuple[float, ...] = (0.0,)
    pair_share: float = 0.0


@dataclass
class Batch:
    """N pictures in S sequences of T tokens; G = side / 14 patches a side.

    Attributes:
        pixels: (N, side, side, 3) uint8.
        targets: Name -> (N, G*G) uint8, see :func:`scenes.patch_targets`.
        content: (N, kinds) float32, 1 for each kind of thing or letter in the picture.
        kept: (N, n) int64 patches whose tokens the decoder sees, ascending; ``None`` for
            pictures alone.
        ids, labels, positions, segments: (S, T) int64. Segment 0 is seen by all that follows,
            any other by itself; -1 is padding.
        families: (S, T) int64, where a label is an answer's: which of
            :data:`scenes.FAMILIES` the question is of; -1 elsewhere.
    """

    pixels: torch.Tensor
    targets: dict[str, torch.Tensor]
    content: torch.Tensor
    kept: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    families: torch.Tensor | None = None


class Encoder:
    """Conversations as token ids, in the form of the chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        found = self._cache.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(self._cache) < 100_000:
                self._cache[text] = found
        return found

    def prefix(self, tokens: Sequence[int]) -> list[int]:
        """The sequence's beginning, with as many visual tokens per picture as given."""
        ids = list(self.ids("<s>USER: "))
        for count in tokens:
            ids += [self.image] * count + self.ids("\n")
        return ids

    def conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Ids and labels of turns that follow a prefix; answers are to be learnt."""
        ids: list[int] = []
        labels: list[int] = []
        for i, turn in enumerate(turns):
            asked = self.ids(("USER: " if i else "") + turn.question + " ASSISTANT:")
            told = self.ids(f" {turn.answer}</s>")
            ids += asked + told
            labels += [IGNORED] * len(asked) + told
        return ids, labels


def content(scene: Scene) -> np.ndarray:
    """Which coloured shapes and which letters a picture holds, (kinds,) of 0 and 1."""
    colours = list(scenes.COLOURS)
    found = np.zeros(CONTENT, dtype=np.float32)
    for thing in scene.things:
        found[
            colours.index(thing.colour) * len(scenes.SHAPES) + scenes.SHAPES.index(thing.shape)
        ] = 1
    if scene.sign is not None:
        for letter in scene.sign.text:
            found[len(colours) * len(scenes.SHAPES) + scenes.ALPHABET.index(letter)] = 1
    return found


CONTENT = len(scenes.COLOURS) * len(scenes.SHAPES) + len(scenes.ALPHABET)


Conversation = tuple[str, tuple[Turn, ...]]
"""A family of questions, and turns of it."""


def _ask_about(scene: Scene, rng: Rng) -> Iterator[Conversation]:
    """Conversations about a picture, what only some pictures have first; may repeat."""
    for name in ("odd one out", "text", "description"):
        turn = scenes.SINGLE[name](scene, rng)
        if turn is not None:
            yield name, (turn,)
    turns = scenes.ask_follow_up(scene, rng) if rng.random() < 0.6 else None
    if turns is not None:
        yield "dialogue", turns
    names = list(WEIGHTS)
    weights = np.array(list(WEIGHTS.values()))
    for name in rng.choice(names, 60, p=weights / weights.sum()):
        turn = scenes.SINGLE[name](scene, rng)
        if turn is not None:
            yield str(name), (turn,)


def _compare(pair: Sequence[Scene], rng: Rng) -> Iterator[Conversation]:
    for _ in range(40):
        turn = scenes.ask_comparison(pair, rng)
        if turn is not None:
            yield "two pictures", (turn,)


class _Sequence:
    """A sequence of fixed length: pictures, then conversations while they fit."""

    def __init__(self, prefix: list[int], length: int) -> None:
        self.length, self.begin = length, len(prefix)
        self.ids = list(prefix)
        self.labels = [IGNORED] * self.begin
        self.positions = list(range(self.begin))
        self.segments = [0] * self.begin
        self.families = [-1] * self.begin
        self._number = 0

    def fits(self, ids: Sequence[int]) -> bool:
        return len(self.ids) + len(ids) <= self.length

    def add(self, ids: list[int], labels: list[int], family: int) -> None:
        self._number += 1
        self.ids += ids
        self.labels += labels
        self.positions += range(self.begin, self.begin + len(ids))
        self.segments += [self._number] * len(ids)
        self.families += [-1 if label == IGNORED else family for label in labels]

    def padded(self) -> tuple[list[int], ...]:
        return tuple(
            row + [filler] * (self.length - len(row))
            for row, filler in (
                (self.ids, 0),
                (self.labels, IGNORED),
                (self.positions, 0),
                (self.segments, -1),
                (self.families, -1),
            )
        )


def make_batch(shape: BatchShape, encoder: Encoder, seed: Sequence[int]) -> Batch:
    """The batch of a seed, always the same."""
    rng = np.random.default_rng(list(seed))
    per_sequence = 2 if rng.random() < shape.pair_share else 1
    sequences = shape.pictures // per_sequence
    groups = []
    for _ in range(sequences):
        roll = rng.random()
        kind = "odd" if roll < 0.2 else "sign" if roll < 0.4 else None
        kinds = [kind] if per_sequence == 1 else [None, None]
        groups.append([scenes.make_scene(rng, shape.side, k) for k in kinds])
    shown = [scene for group in groups for scene in group]
    pixels = torch.from_numpy(np.stack([np.asarray(scenes.draw(scene)) for scene in shown]))
    grids = [scenes.patch_targets(scene, PATCH) for scene in shown]
    batch = Batch(
        pixels=pixels,
        targets={
            name: torch.from_numpy(np.stack([grid[name].reshape(-1) for grid in grids]))
            for name in scenes.TARGETS
        },
        content=torch.from_numpy(np.stack([content(scene) for scene in shown])),
    )
    if not shape.text:
        return batch

    patches = (shape.side // PATCH) ** 2
    keep = round(patches * (1 - shape.dropped[int(rng.integers(len(shape.dropped)))]))
    order = np.argsort(rng.random((len(shown), patches)), axis=1)[:, :keep]
    batch.kept = torch.from_numpy(np.sort(order, axis=1))
    prefix = encoder.prefix([keep] * per_sequence)
    # Few lengths: kernels are made anew for each.
    length = -(-(len(prefix) + shape.text // per_sequence) // 32) * 32
    rows = []
    for group in groups:
        sequence = _Sequence(prefix, length)
        asked = set()
        for family, turns in (
            _ask_about(group[0], rng) if per_sequence == 1 else _compare(group, rng)
        ):
            ids, labels = encoder.conversation(turns)
            if turns not in asked and sequence.fits(ids):
                asked.add(turns)
                sequence.add(ids, labels, scenes.FAMILIES.index(family))
        rows.append(sequence.padded())
    batch.ids, batch.labels, batch.positions, batch.segments, batch.families = (
        torch.tensor(column) for column in zip(*rows, strict=True)
    )
    return batch


class Batches(IterableDataset[Batch]):
    """Batches ``first``, ``first + 1``, ... of a phase, made by worker processes."""

    def __init__(
        self, shape: BatchShape, tokenizer: Any, seed: int, phase: int, first: int, end: int
    ) -> None:
        self.shape, self.encoder = shape, Encoder(tokenizer)
        self.seed, self.phase, self.first, self.end = seed, phase, first, end

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes from its workers in turn, so the order stays that of one process.
        for number in range(self.first + first, self.end, step):
            yield make_batch(self.shape, self.encoder, (self.seed, self.phase, number))
