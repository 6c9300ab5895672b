"""Questions about scenes, each with one right answer, and exams made of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter

import numpy as np
from PIL import Image

from demo.drawing import draw
from demo.scenes import choice, make_scene, random_size
from demo.world import (
    COLOUR_NAMES,
    COLUMNS,
    ROWS,
    SHAPES,
    SQUARE,
    Letter,
    Rng,
    Scene,
    Shown,
    Sign,
    Size,
    Thing,
)

Looks = tuple[tuple[Shown, ...], ...]


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question, answer: The texts.
        looks: Groups of things or signs that the answer depends on, for training.
        subjects: The thing, sign or letter that each character of a longer answer describes,
            for training.
    """

    question: str
    answer: str
    looks: Looks = field(default=(), compare=False, repr=False)
    subjects: tuple[Shown | None, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Example:
    """Images, and the turns of a conversation about them."""

    family: str
    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _place(thing: Thing, size: Size) -> str | None:
    """The ninth of the image with a thing's centre; ``None`` near the border of two ninths."""
    names = []
    width, height = size
    for value, extent, labels in ((thing.y, height, ROWS), (thing.x, width, COLUMNS)):
        part = 3 * value / extent
        if min(abs(part - 1), abs(part - 2)) < 0.2:
            return None
        names.append(labels[min(int(part), 2)])
    return " ".join(names)


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    """Things with a unique ``key``."""
    keys = [key(thing) for thing in things]
    return [thing for thing in things if keys.count(key(thing)) == 1]


def _identified(things: Sequence[Thing], rng: Rng) -> tuple[Thing, str] | None:
    """A thing that its name or its shape identifies, and that name or shape."""
    options = [(thing, thing.name) for thing in _unique(things, attrgetter("name"))]
    options += [(thing, thing.shape) for thing in _unique(things, attrgetter("shape"))]
    return choice(rng, options) if options else None


def _about(thing: Thing, question: str, answer: str) -> Turn:
    """A turn whose answer has several words, all about one thing."""
    return Turn(question, answer, ((thing,),), (thing,) * len(answer))


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _ask_attribute(
    scene: Scene, rng: Rng, attribute: str, by: str, wordings: Sequence[str]
) -> Turn | None:
    """A question for an attribute of a thing that its attribute ``by`` identifies."""
    candidates = _unique(scene.things, attrgetter(by))
    if not candidates:
        return None
    thing = choice(rng, candidates)
    question = choice(rng, wordings).format(getattr(thing, by))
    return Turn(question, getattr(thing, attribute), ((thing,),))


def ask_colour(scene: Scene, rng: Rng) -> Turn | None:
    wordings = ("What colour is the {}?", "What is the colour of the {}?")
    return _ask_attribute(scene, rng, "colour", "shape", wordings)


def ask_shape(scene: Scene, rng: Rng) -> Turn | None:
    wordings = ("What shape is the {} object?", "What is the {} thing?")
    return _ask_attribute(scene, rng, "shape", "colour", wordings)


def ask_size(scene: Scene, rng: Rng) -> Turn | None:
    found = _identified(scene.things, rng)
    if found is None:
        return None
    wording = choice(rng, ("Is the {} small or big?", "How big is the {}?"))
    return Turn(wording.format(found[1]), found[0].size, ((found[0],),))


def ask_position(scene: Scene, rng: Rng) -> Turn | None:
    found = _identified(scene.things, rng)
    place = _place(found[0], scene.size) if found else None
    if found is None or place is None:
        return None
    wording = choice(rng, ("Where is the {}?", "In which part of the picture is the {}?"))
    return _about(found[0], wording.format(found[1]), place)


def ask_count(scene: Scene, rng: Rng) -> Turn | None:
    roll = rng.random()
    if roll < 0.35:
        wording = choice(rng, ("How many objects are there?", "Count the objects."))
        return Turn(wording, str(len(scene.things)), (scene.things,))
    here = scene.things and rng.random() < 0.75
    if roll < 0.7:
        colour = choice(rng, scene.things).colour if here else choice(rng, COLOUR_NAMES)
        counted = tuple(thing for thing in scene.things if thing.colour == colour)
        return Turn(f"How many {colour} objects are there?", str(len(counted)), (counted,))
    shape = choice(rng, scene.things).shape if here else choice(rng, SHAPES)
    counted = tuple(thing for thing in scene.things if thing.shape == shape)
    return Turn(f"How many {_plural(shape)} are there?", str(len(counted)), (counted,))


_KINDS = ("{shape}", "{colour} object", "{colour} {shape}")


def ask_existence(scene: Scene, rng: Rng) -> Turn | None:
    kind = choice(rng, _KINDS)
    shown = [kind.format(colour=thing.colour, shape=thing.shape) for thing in scene.things]
    wanted = bool(shown) and rng.random() < 0.5
    while True:
        colour, shape = choice(rng, COLOUR_NAMES), choice(rng, SHAPES)
        # A question with answer "no" is harder if some thing has its colour or its shape.
        if scene.things and rng.random() < 0.6:
            thing = choice(rng, scene.things)
            colour, shape = (thing.colour, shape) if rng.random() < 0.5 else (colour, thing.shape)
        name = choice(rng, shown) if wanted else kind.format(colour=colour, shape=shape)
        if wanted or name not in shown:
            break
    wording = choice(rng, ("Is there {}?", "Can you see {}?"))
    seen = tuple(thing for thing, title in zip(scene.things, shown, strict=True) if title == name)
    return Turn(wording.format(_article(name)), "yes" if wanted else "no", (seen,))


_RELATIONS = (
    ("x", ("left", "right"), ("{} or {} of", "to the {} or to the {} of")),
    ("y", ("above", "below"), ("{} or {}", "{} or is it {}")),
)
"""Coordinate, words for a smaller and a larger value, and wordings of the question."""


def ask_relation(scene: Scene, rng: Rng) -> Turn | None:
    named = _unique(scene.things, attrgetter("shape"))
    if len(named) < 2:
        return None
    first, second = (named[int(i)] for i in rng.permutation(len(named))[:2])
    coordinate, answers, wordings = choice(rng, _RELATIONS)
    difference = getattr(first, coordinate) - getattr(second, coordinate)
    if abs(difference) < 30:
        return None
    words = choice(rng, wordings).format(*answers)
    question = f"Is the {first.shape} {words} the {second.shape}?"
    return Turn(question, answers[difference > 0], ((first,), (second,)))


def _letters(sign: Sign) -> tuple[Letter, ...]:
    return tuple(Letter(sign, i) for i in range(len(sign.text)))


def ask_text(scene: Scene, rng: Rng) -> Turn | None:
    if scene.sign is None and rng.random() < 0.8:
        return None
    wording = choice(rng, ("What does the sign say?", "What is written here?", "Read the text."))
    if scene.sign is None:
        return Turn(wording, "nothing")
    return Turn(wording, scene.sign.text, ((scene.sign,),), _letters(scene.sign))


def ask_odd(scene: Scene, rng: Rng) -> Turn | None:
    if scene.odd is None:
        return None
    wording = choice(rng, ("Which object is the odd one out?", "Which object is different?"))
    return _about(scene.odd, wording, scene.odd.name)


def ask_description(scene: Scene, rng: Rng) -> Turn | None:
    """Everything in the image, left to right, the sign last."""
    things = sorted(scene.things, key=lambda thing: thing.x)
    if any(right.x - left.x < 12 for left, right in pairwise(things)):
        return None
    parts: list[tuple[str, Sequence[Shown]]] = []
    for thing in things:
        text = f"{thing.size} {thing.name}"
        parts.append((text, [thing] * len(text)))
    if scene.sign is not None:
        label = "sign "
        letters = _letters(scene.sign)
        parts.append((label + scene.sign.text, [scene.sign] * len(label) + [*letters]))
    subjects: list[Shown] = []
    for _, shown in parts:
        # A comma's subject is the next part, because there is a comma only if a part follows.
        subjects += [shown[0]] * len(", ") * bool(subjects) + [*shown]
    wording = choice(rng, ("What is in the picture?", "Describe the picture."))
    return Turn(wording, ", ".join(text for text, _ in parts), subjects=tuple(subjects))


def ask_follow_up(scene: Scene, rng: Rng) -> tuple[Turn, ...] | None:
    """Two turns; the second calls the first turn's thing "it"."""
    candidates = _unique(scene.things, attrgetter("colour"))
    if not candidates:
        return None
    thing = choice(rng, candidates)
    first = Turn(f"What shape is the {thing.colour} object?", thing.shape, ((thing,),))
    place = _place(thing, scene.size)
    if place is None or rng.random() < 0.5:
        return first, Turn("Is it small or big?", thing.size, ((thing,),))
    return first, _about(thing, "Where is it?", place)


def ask_comparison(scenes: Sequence[Scene], rng: Rng) -> Turn | None:
    """A question about two images."""
    names = [{thing.name for thing in scene.things} for scene in scenes]
    if rng.random() < 0.6:
        which = int(rng.integers(2))
        only = sorted(names[which] - names[1 - which])
        if not only:
            return None
        ordinal = ("first", "second")[which]
        name = choice(rng, only)
        seen = tuple(thing for thing in scenes[which].things if thing.name == name)
        return Turn(f"Which picture shows {_article(name)}?", ordinal, (seen,))
    shapes = [{thing.shape for thing in scene.things} for scene in scenes]
    both = sorted(shapes[0] & shapes[1])
    wanted = bool(both) and rng.random() < 0.6
    others = sorted(shapes[0] ^ shapes[1])
    if not wanted and not others:
        return None
    shape = choice(rng, both if wanted else others)
    looks = tuple(
        tuple(thing for thing in scene.things if thing.shape == shape) for scene in scenes
    )
    return Turn(f"Do both pictures show {_article(shape)}?", "yes" if wanted else "no", looks)


QuestionMaker = Callable[[Scene, Rng], Turn | None]
"""Makes a question about a scene; ``None`` if the scene does not suit the family."""

SINGLE: dict[str, QuestionMaker] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "size": ask_size,
    "position": ask_position,
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
    "text": ask_text,
    "odd one out": ask_odd,
    "description": ask_description,
}
FAMILIES = (*SINGLE, "dialogue", "two pictures")
EXAMINED = tuple(family for family in FAMILIES if family != "description")
"""Families in exams. Descriptions are for training only: one wrong word of about fifteen makes a
description wrong, so their accuracy says little."""

_KIND = {"odd one out": "odd", "text": "sign"}


def compose(family: str, rng: Rng, size: Size = SQUARE) -> tuple[list[Scene], tuple[Turn, ...]]:
    """Scenes, and a conversation of the family about them."""
    while True:
        if family == "two pictures":
            pair = [make_scene(rng, size), make_scene(rng, size)]
            turn = ask_comparison(pair, rng)
            if turn is not None:
                return pair, (turn,)
            continue
        kind = _KIND.get(family) if rng.random() < 0.9 else None
        scene = make_scene(rng, size, kind)
        if family == "dialogue":
            turns = ask_follow_up(scene, rng)
        else:
            turn = SINGLE[family](scene, rng)
            turns = None if turn is None else (turn,)
        if turns is not None:
            return [scene], turns


EXAM_SEED = 2**40
"""First seed of exams; training uses seeds below it."""


def exam(
    per_family: int, seed: int = 0, families: Sequence[str] = EXAMINED, *, varied: bool = False
) -> list[Example]:
    """A fixed set of questions that training does not use.

    Args:
        per_family: Conversations per family.
        seed: Each seed gives another exam.
        families: Families to ask; their conversations do not depend on the other families.
        varied: Give images different widths and heights; by default all are square.
    """
    examples = []
    for family in families:
        for i in range(per_family):
            rng = np.random.default_rng([EXAM_SEED + seed, FAMILIES.index(family), i])
            size = random_size(rng) if varied else SQUARE
            scenes, turns = compose(family, rng, size)
            examples.append(Example(family, tuple(draw(s) for s in scenes), turns))
    return examples


def corpus(lines: int, seed: int = 0) -> Iterator[str]:
    """Questions, and answers without capital letters, for the tokenizer's training."""
    rng = np.random.default_rng(seed)
    for _ in range(lines):
        _, turns = compose(choice(rng, FAMILIES), rng)
        for turn in turns:
            yield turn.question
            if turn.answer == turn.answer.lower():
                yield f" {turn.answer}"
