"""Batches of the small world: images, conversations about them, and what is where.

An image is paid for once and asked about many times: the questions about it stand one after
the other in a sequence, each seeing the image and itself only, so that each is a first
question. A conversation's turns see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset

from demo import questions
from demo.batch import IGNORED, TELLING, Batch, BatchShape, Sequences
from demo.drawing import TARGETS, draw, patch_targets, patches_of
from demo.questions import Turn
from demo.scenes import make_scene
from demo.world import (
    ALPHABET,
    COLOUR_NAMES,
    PATCH,
    SHAPES,
    Letter,
    Rng,
    Scene,
    Shown,
)

WEIGHTS = {
    "colour": 0.8,
    "shape": 0.8,
    "size": 0.5,
    "position": 1.5,
    "count": 1.5,
    "existence": 1.5,
    "relation": 2.0,
    "text": 1.0,
    "odd one out": 1.0,
}
"""How often a family is asked; harder ones more."""


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
        """The sequence's beginning, with as many visual tokens per image as given."""
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

    def tells(self, turn: Turn) -> Iterator[tuple[int, Shown]]:
        """Index of an answer's token, and what it tells of."""
        end = -1  # of the token among the answer's characters; a space stands before them
        for i, token in enumerate(self.ids(f" {turn.answer}")):
            end += len(self.tokenizer.convert_ids_to_tokens(token))
            shown = turn.tells[end - 1] if 0 < end <= len(turn.tells) else None
            if shown is not None:
                yield i, shown


CONTENT = len(COLOUR_NAMES) * len(SHAPES) + len(ALPHABET)
"""Kinds of things and letters that an image may hold."""


def content(scene: Scene) -> np.ndarray:
    """Which coloured shapes and which letters an image holds, (CONTENT,) of 0 and 1."""
    found = np.zeros(CONTENT, dtype=np.float32)
    for thing in scene.things:
        row, column = COLOUR_NAMES.index(thing.colour), SHAPES.index(thing.shape)
        found[row * len(SHAPES) + column] = 1
    for letter in scene.sign.text if scene.sign else "":
        found[len(COLOUR_NAMES) * len(SHAPES) + ALPHABET.index(letter)] = 1
    return found


Conversation = tuple[str, tuple[Turn, ...]]
"""A family of questions, and turns of it."""


def _ask_about(scene: Scene, rng: Rng) -> Iterator[Conversation]:
    """Conversations about an image, what only some images have first; may repeat."""
    for name in ("odd one out", "text", "description"):
        turn = questions.SINGLE[name](scene, rng)
        if turn is not None:
            yield name, (turn,)
    turns = questions.ask_follow_up(scene, rng) if rng.random() < 0.6 else None
    if turns is not None:
        yield "dialogue", turns
    names = list(WEIGHTS)
    weights = np.array(list(WEIGHTS.values()))
    for name in rng.choice(names, 60, p=weights / weights.sum()):
        turn = questions.SINGLE[name](scene, rng)
        if turn is not None:
            yield str(name), (turn,)


def _compare(pair: Sequence[Scene], rng: Rng) -> Iterator[Conversation]:
    for _ in range(40):
        turn = questions.ask_comparison(pair, rng)
        if turn is not None:
            yield "two pictures", (turn,)


class _Sequence:
    """A row of :class:`Sequences`: images, then conversations while they fit."""

    def __init__(self, prefix: list[int], length: int) -> None:
        self.length, self.begin = length, len(prefix)
        self.ids = list(prefix)
        self.labels = [IGNORED] * self.begin
        self.positions = list(range(self.begin))
        self.segments = [0] * self.begin
        self.families = [-1] * self.begin
        self.asked: list[tuple[int, Turn]] = []
        """Index of each prompt's last token, and what it asks."""
        self._number = 0

    def fits(self, ids: Sequence[int]) -> bool:
        return len(self.ids) + len(ids) <= self.length

    def add(self, turns: Sequence[Turn], ids: list[int], labels: list[int], family: int) -> None:
        self._number += 1
        told = np.array(labels) != IGNORED
        ends = np.flatnonzero(told[1:] & ~told[:-1])
        self.asked += zip((len(self.ids) + ends).tolist(), turns, strict=True)
        self.ids += ids
        self.labels += labels
        self.positions += range(self.begin, self.begin + len(ids))
        self.segments += [self._number] * len(ids)
        self.families += [-1 if label == IGNORED else family for label in labels]

    def padded(self) -> tuple[list[int], ...]:
        """Ids, labels, positions, segments and families, ``length`` of each."""
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
    sequences = shape.images // per_sequence
    groups = []
    for _ in range(sequences):
        roll = rng.random()
        kind = "odd" if roll < 0.25 else "sign" if roll < 0.45 else None
        kinds = [kind] if per_sequence == 1 else [None, None]
        groups.append([make_scene(rng, shape.side, k) for k in kinds])
    shown = [scene for group in groups for scene in group]
    pixels = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in shown]))
    grids = [patch_targets(scene) for scene in shown]
    return Batch(
        pixels=pixels,
        targets={
            name: torch.from_numpy(np.stack([grid[name].reshape(-1) for grid in grids]))
            for name in TARGETS
        },
        content=torch.from_numpy(np.stack([content(scene) for scene in shown])),
        sequences=_make_sequences(shape, encoder, groups, rng) if shape.text else None,
    )


def _make_sequences(
    shape: BatchShape, encoder: Encoder, groups: Sequence[Sequence[Scene]], rng: Rng
) -> Sequences:
    """A sequence about the images of each group; all groups are of one size."""
    per_sequence = len(groups[0])
    patches = (shape.side // PATCH) ** 2
    keep = round(patches * (1 - shape.dropped[int(rng.integers(len(shape.dropped)))]))
    draws = rng.random((len(groups) * per_sequence, patches))
    if shape.background_first:
        every = np.arange(patches)[None]
        scenes = [scene for group in groups for scene in group]
        draws += np.stack([~_where(scene.shown, [scene], every) for scene in scenes])
    order = np.argsort(draws, axis=1)
    kept = np.sort(order[:, :keep], axis=1)
    place = np.take_along_axis(np.argsort(order, axis=1), kept, axis=1)
    prefix = encoder.prefix([keep] * per_sequence)
    # Few lengths: kernels are made anew for each.
    length = -(-(len(prefix) + shape.text // per_sequence) // 32) * 32
    rows, looks, looked = [], [], []
    for number, group in enumerate(groups):
        sequence = _Sequence(prefix, length)
        asked = set()
        for family, turns in (
            _ask_about(group[0], rng) if per_sequence == 1 else _compare(group, rng)
        ):
            text, told = encoder.conversation(turns)
            if turns not in asked and sequence.fits(text):
                asked.add(turns)
                sequence.add(turns, text, told, questions.FAMILIES.index(family))
        rows.append(sequence.padded())
        mine = kept[number * per_sequence : (number + 1) * per_sequence]
        for end, turn in sequence.asked:
            wanted = [(end, head, shown) for head, shown in enumerate(turn.looks)]
            wanted += [(end + i, TELLING, (one,)) for i, one in encoder.tells(turn)]
            for token, head, shown in wanted:
                where = _where(shown, group, mine)
                if where.any():
                    looks.append((number, token, head))
                    looked.append(where)
    ids, labels, positions, segments, families = map(torch.tensor, zip(*rows, strict=True))
    deep = torch.ones(ids.shape, dtype=torch.bool)
    deep[ids == encoder.image] = torch.from_numpy(place < round(keep * shape.deep_share)).flatten()
    return Sequences(
        kept=torch.from_numpy(kept),
        ids=ids,
        labels=labels,
        positions=positions,
        segments=segments,
        families=families,
        looks=torch.tensor(looks).reshape(-1, 3),
        looked=torch.from_numpy(np.array(looked, dtype=bool).reshape(-1, keep * per_sequence)),
        deep=deep,
    )


def _where(
    shown: Sequence[Shown], group: Sequence[Scene], kept: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which of the visual tokens kept of a group of images show one of some things."""
    found = []
    for scene, patches in zip(group, kept, strict=True):
        cells = scene.side // PATCH
        grid = np.zeros((cells, cells), dtype=bool)
        for one in shown:
            whole = one.sign if isinstance(one, Letter) else one
            if any(whole is here for here in scene.shown):
                grid |= patches_of(one, cells)
        found.append(grid.reshape(-1)[patches])
    return np.concatenate(found)


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
