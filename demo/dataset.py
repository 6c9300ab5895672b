"""Batches of the small world: images, conversations about them, and targets of their patches.

A sequence holds an image once and many conversations about it. A conversation sees the image and
itself, but not the other conversations. Turns of a conversation see earlier turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from demo import questions
from demo.batch import IGNORED, SUBJECT_HEAD, Batch, BatchShape, Sequences
from demo.drawing import TARGETS, draw, patches_of
from demo.form import Form, Frame, Ints
from demo.questions import Turn
from demo.scenes import make_scene
from demo.world import (
    ALPHABET,
    COLOUR_NAMES,
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
"""Relative frequency of a question family; harder families are more frequent."""


class Encoder:
    """Conversations as token ids, in the form of the chat template of a form's model."""

    def __init__(self, tokenizer: Any, form: Form) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.image = tokenizer.convert_tokens_to_ids(form.image)
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        found = self._cache.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(self._cache) < 100_000:
                self._cache[text] = found
        return found

    def prefix(self, tokens: Sequence[int]) -> list[int]:
        """Token ids of a sequence's beginning, with ``tokens[i]`` placeholders for image i."""
        ids = list(self.ids("<s>USER: "))
        before, after = map(self.ids, self.form.around)
        for count in tokens:
            ids += before + [self.image] * count + after
        return ids

    def conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Ids and labels of turns that follow a prefix; only answers have labels."""
        ids: list[int] = []
        labels: list[int] = []
        for i, turn in enumerate(turns):
            question = self.ids(("USER: " if i else "") + turn.question + " ASSISTANT:")
            answer = self.ids(f" {turn.answer}</s>")
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        return ids, labels

    def subjects(self, turn: Turn) -> Iterator[tuple[int, Shown]]:
        """Yields (index of an answer's token, subject of its last character)."""
        end = -1  # the token's end in the answer's characters; the text begins with a space
        for i, token in enumerate(self.ids(f" {turn.answer}")):
            end += len(self.tokenizer.convert_ids_to_tokens(token))
            shown = turn.subjects[end - 1] if 0 < end <= len(turn.subjects) else None
            if shown is not None:
                yield i, shown


CONTENT = len(COLOUR_NAMES) * len(SHAPES) + len(ALPHABET)
"""Number of coloured shapes and letters that an image may hold."""


def content(scene: Scene) -> np.ndarray:
    """(CONTENT,) zeros and ones: the coloured shapes and letters that an image holds."""
    found = np.zeros(CONTENT, dtype=np.float32)
    for thing in scene.things:
        row, column = COLOUR_NAMES.index(thing.colour), SHAPES.index(thing.shape)
        found[row * len(SHAPES) + column] = 1
    for letter in scene.sign.text if scene.sign else "":
        found[len(COLOUR_NAMES) * len(SHAPES) + ALPHABET.index(letter)] = 1
    return found


Conversation = tuple[str, tuple[Turn, ...]]
"""A family of questions, and the turns."""


def _conversations_about(scene: Scene, rng: Rng) -> Iterator[Conversation]:
    """Conversations about an image, possibly repeated; families that need a sign, an odd one
    out or a description come first."""
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


def _comparisons(pair: Sequence[Scene], rng: Rng) -> Iterator[Conversation]:
    for _ in range(40):
        turn = questions.ask_comparison(pair, rng)
        if turn is not None:
            yield "two pictures", (turn,)


class _Sequence:
    """A row of :class:`Sequences`: images, then conversations while they fit."""

    def __init__(self, prefix: list[int], positions: Ints, length: int) -> None:
        self.length = length
        self.ids = list(prefix)
        self.labels = [IGNORED] * len(prefix)
        self.positions = positions[:, :-1]
        self.begin = positions[:, -1:]
        """Position of the first token after the prefix."""
        self.segments = [0] * len(prefix)
        self.families = [-1] * len(prefix)
        self.prompts: list[tuple[int, Turn]] = []
        """Index of each prompt's last token, and its turn."""
        self._number = 0

    def fits(self, ids: Sequence[int]) -> bool:
        return len(self.ids) + len(ids) <= self.length

    def add(self, turns: Sequence[Turn], ids: list[int], labels: list[int], family: int) -> None:
        self._number += 1
        in_answer = np.array(labels) != IGNORED
        ends = np.flatnonzero(in_answer[1:] & ~in_answer[:-1])
        self.prompts += zip((len(self.ids) + ends).tolist(), turns, strict=True)
        self.ids += ids
        self.labels += labels
        places = self.begin + np.arange(len(ids))
        self.positions = np.concatenate((self.positions, places), axis=1)
        self.segments += [self._number] * len(ids)
        self.families += [-1 if label == IGNORED else family for label in labels]

    def padded(self) -> tuple[list[int], ...]:
        """Ids, labels, segments and families, each padded to ``length``."""
        return tuple(
            row + [filler] * (self.length - len(row))
            for row, filler in (
                (self.ids, 0),
                (self.labels, IGNORED),
                (self.segments, -1),
                (self.families, -1),
            )
        )


def make_batch(shape: BatchShape, encoder: Encoder, seed: Sequence[int]) -> Batch:
    """The batch of a seed; the same seed gives the same batch."""
    rng = np.random.default_rng(list(seed))
    per_sequence = 2 if rng.random() < shape.pair_share else 1
    sequences = shape.images // per_sequence
    frame = encoder.form.frame(shape.side, rng)
    groups = []
    for _ in range(sequences):
        roll = rng.random()
        kind = "odd" if roll < 0.25 else "sign" if roll < 0.45 else None
        kinds = [kind] if per_sequence == 1 else [None, None]
        groups.append([make_scene(rng, frame.size, k) for k in kinds])
    shown = [scene for group in groups for scene in group]
    pixels = torch.from_numpy(np.stack([_resized(draw(scene), frame) for scene in shown]))
    grids = [encoder.form.targets(scene, frame) for scene in shown]
    return Batch(
        pixels=pixels,
        targets={
            name: torch.from_numpy(np.stack([frame.by_token(grid[name]) for grid in grids]))
            for name in TARGETS
        },
        content=torch.from_numpy(np.stack([content(scene) for scene in shown])),
        sequences=_make_sequences(shape, encoder, frame, groups, rng) if shape.text else None,
    )


def _resized(image: Image.Image, frame: Frame) -> np.ndarray:
    if image.size != frame.pixels:
        image = image.resize(frame.pixels, Image.Resampling.BICUBIC)
    return np.asarray(image)


def _make_sequences(
    shape: BatchShape,
    encoder: Encoder,
    frame: Frame,
    groups: Sequence[Sequence[Scene]],
    rng: Rng,
) -> Sequences:
    """A sequence about the images of each group; all groups have the same size."""
    per_sequence = len(groups[0])
    keep = round(frame.tokens * (1 - shape.dropped[int(rng.integers(len(shape.dropped)))]))
    draws = rng.random((len(groups) * per_sequence, frame.tokens))
    if shape.background_first:
        every = np.arange(frame.tokens)[None]
        scenes = [scene for group in groups for scene in group]
        draws += np.stack([~_shows(scene.shown, [scene], every, frame) for scene in scenes])
    order = np.argsort(draws, axis=1)
    kept = np.sort(order[:, :keep], axis=1)
    place = np.take_along_axis(np.argsort(order, axis=1), kept, axis=1)
    prefix = encoder.prefix([keep] * per_sequence)
    # Round up, so that there are few lengths: a kernel is compiled for each.
    length = -(-(len(prefix) + shape.text // per_sequence) // 32) * 32
    rows, positions, looks, looked = [], [], [], []
    for number, group in enumerate(groups):
        kept_of_group = kept[number * per_sequence : (number + 1) * per_sequence]
        places = encoder.form.positions(prefix, encoder.image, kept_of_group, frame)
        sequence = _Sequence(prefix, places, length)
        added = set()
        for family, turns in (
            _conversations_about(group[0], rng) if per_sequence == 1 else _comparisons(group, rng)
        ):
            ids, labels = encoder.conversation(turns)
            if turns not in added and sequence.fits(ids):
                added.add(turns)
                sequence.add(turns, ids, labels, questions.FAMILIES.index(family))
        rows.append(sequence.padded())
        filler = length - sequence.positions.shape[1]
        positions.append(np.pad(sequence.positions, ((0, 0), (0, filler))))
        for end, turn in sequence.prompts:
            wanted = [(end, head, shown) for head, shown in enumerate(turn.looks)]
            wanted += [(end + i, SUBJECT_HEAD, (shown,)) for i, shown in encoder.subjects(turn)]
            for token, head, shown in wanted:
                where = _shows(shown, group, kept_of_group, frame)
                if where.any():
                    looks.append((number, token, head))
                    looked.append(where)
    columns = ("ids", "labels", "segments", "families")
    tensors = dict(zip(columns, map(torch.tensor, zip(*rows, strict=True)), strict=True))
    is_image = tensors["ids"] == encoder.image
    deep = torch.ones(is_image.shape, dtype=torch.bool)
    deep[is_image] = torch.from_numpy(place < round(keep * shape.deep_share)).flatten()
    return Sequences(
        kept=torch.from_numpy(kept),
        **tensors,
        positions=torch.from_numpy(np.stack(positions, axis=1)),
        looks=torch.tensor(looks).reshape(-1, 3),
        looked=torch.from_numpy(np.array(looked, dtype=bool).reshape(-1, keep * per_sequence)),
        deep=deep,
    )


def _shows(
    shown: Sequence[Shown], group: Sequence[Scene], kept: Ints, frame: Frame
) -> npt.NDArray[np.bool_]:
    """(kept visual tokens of the group,) bool: tokens that show one of ``shown``."""
    found = []
    for scene, tokens in zip(group, kept, strict=True):
        grid = np.zeros((frame.cells.rows, frame.cells.columns), dtype=bool)
        for part in shown:
            whole = part.sign if isinstance(part, Letter) else part
            if any(whole is item for item in scene.shown):
                grid |= patches_of(part, frame.cells)
        found.append(frame.by_token(grid)[tokens].any(axis=1))
    return np.concatenate(found)


class Batches(IterableDataset[Batch]):
    """Batches ``first`` to ``end - 1`` of a phase, made by worker processes."""

    def __init__(
        self, shape: BatchShape, encoder: Encoder, seed: int, phase: int, first: int, end: int
    ) -> None:
        self.shape, self.encoder = shape, encoder
        self.seed, self.phase, self.first, self.end = seed, phase, first, end

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader reads its workers in turn, so the order does not depend on their number.
        for number in range(self.first + first, self.end, step):
            yield make_batch(self.shape, self.encoder, (self.seed, self.phase, number))
