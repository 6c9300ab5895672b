"""Exams: images, questions about them, and the answers that count as right.

An exam of one's own is a folder with images and one or more ``*.jsonl`` files. Each line is
one example::

    {"image": "a.png", "question": "What colour is the car?", "answer": "red"}
    {"images": ["a.png", "b.png"], "question": "Which is larger?", "answer": ["left", "a"]}
    {"image": "a.png", "turns": [{"question": "...", "answer": "..."}, {"question": ...}]}

``answer`` is a text, or a list of accepted ones. ``turns`` is a conversation: its questions are
asked one after the other. ``family`` groups examples in tables and plots; without it, the
file's name does. Images are named relative to the folder.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from demo import questions

ImageFile = bytes | Path
"""An encoded image file, or where it lies."""


@dataclass(frozen=True)
class Turn:
    """One question, and every answer that is accepted."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A conversation about images, all of them shown with the first question.

    Attributes:
        family: Kind of question; accuracy is reported for each.
        images: At least one.
        turns: At least one.
    """

    family: str
    images: tuple[ImageFile, ...]
    turns: tuple[Turn, ...]


class ExamError(ValueError):
    """An exam that cannot be asked: one line per fault, ``FILE:LINE: what is wrong``."""


def from_demo(examples: Iterable["questions.Example"]) -> list[Example]:
    """The generated exam. Images are encoded here, once, and not for every request."""
    return [
        Example(
            example.family,
            tuple(_png(image) for image in example.images),
            tuple(Turn(turn.question, (turn.answer,)) for turn in example.turns),
        )
        for example in examples
    ]


def read_folder(folder: Path) -> list[Example]:
    """The examples of every ``*.jsonl`` in ``folder``, files in order of their names.

    Raises:
        ExamError: With every fault of every file, or if there is nothing to read.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ExamError(f"{folder}: no *.jsonl file in this folder")
    examples = []
    faults = []
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                examples.append(_parse(line, folder, default_family=file.stem))
            except ValueError as fault:
                faults.append(f"{file}:{number}: {fault}")
    if faults:
        raise ExamError("\n".join(faults))
    if not examples:
        raise ExamError(f"{folder}: its *.jsonl files are empty")
    return examples


def digest(examples: Sequence[Example]) -> str:
    """Tells exams apart: a hash of all questions, answers and images."""
    hashed = hashlib.sha256()
    for example in examples:
        turns = [(turn.question, turn.answers) for turn in example.turns]
        hashed.update(json.dumps([example.family, turns]).encode())
        for image in example.images:
            hashed.update(hashlib.sha256(read_image(image)).digest())
    return hashed.hexdigest()[:16]


def read_image(image: ImageFile) -> bytes:
    """The encoded file."""
    return image if isinstance(image, bytes) else image.read_bytes()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _parse(line: bytes, folder: Path, default_family: str) -> Example:
    """One line of a file; raises ValueError with what is wrong with it."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    _check_keys(fields, {"image", "images", "question", "answer", "turns", "family"})
    if ("image" in fields) == ("images" in fields):
        raise ValueError("either 'image' or 'images' is needed")
    if ("question" in fields) == ("turns" in fields):
        raise ValueError("either 'question' and 'answer' or 'turns' is needed")
    if "turns" in fields and "answer" in fields:
        raise ValueError("'answer' belongs into each of the 'turns'")
    names = [fields["image"]] if "image" in fields else fields["images"]
    if not isinstance(names, list) or not names:
        raise ValueError("'images' must be a list of file names")
    family = _text(fields.get("family", default_family), "family")
    if family == "mean":
        raise ValueError("a family cannot be called 'mean': tables have a row of that name")
    turns = fields.get("turns", [fields])
    if not isinstance(turns, list) or not turns:
        raise ValueError("'turns' must be a list of questions and answers")
    for turn in turns if "turns" in fields else ():
        _check_keys(turn, {"question", "answer"})
    return Example(
        family=family,
        images=tuple(_find_image(folder, name) for name in names),
        turns=tuple(
            Turn(_text(turn.get("question"), "question"), _answers(turn)) for turn in turns
        ),
    )


def _check_keys(fields: Any, known: set[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, not {type(fields).__name__}")
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; known: {', '.join(sorted(known))}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a text that is not empty")
    return value


def _answers(turn: dict[str, Any]) -> tuple[str, ...]:
    given = turn.get("answer")
    accepted = given if isinstance(given, list) else [given]
    if not accepted or not all(isinstance(one, str) and one.strip() for one in accepted):
        raise ValueError("'answer' must be a text that is not empty, or a list of such texts")
    return tuple(accepted)


def _find_image(folder: Path, name: Any) -> Path:
    path = folder / _text(name, "image")
    try:
        with Image.open(path):  # Reads no more than the header.
            return path
    except FileNotFoundError:
        raise ValueError(f"no image {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
