"""``python -m evaluation.exam FOLDER`` writes the demo exam into a folder.

An exam is a folder with images and ``metadata.jsonl``, the layout of ``imagefolder`` in Hugging
Face's datasets, so that lmms-eval can read it too. Each line is one conversation::

    {"images_file_names": ["a.png"], "family": "colour",
     "turns": [{"question": "What colour is the car?", "answers": ["red", "dark red"]}]}

The first question shows all images; the others follow one after the other. ``family`` groups
conversations in tables and plots. Each of ``answers`` is right.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demo import questions

METADATA = "metadata.jsonl"


class ExamError(ValueError):
    """A bad exam."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Turn(_Line):
    """One question, and its accepted answers."""

    question: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)


class Example(_Line):
    """A conversation.

    Attributes:
        images: Paths of the images, all shown with the first question.
        family: Kind of question; each family gets its own accuracy.
        turns: Questions, asked one after the other.
    """

    images: tuple[Path, ...] = Field(alias="images_file_names", min_length=1)
    family: str
    turns: tuple[Turn, ...] = Field(min_length=1)


def read_exam(folder: Path) -> list[Example]:
    """The examples of a folder.

    Raises:
        ExamError: If the exam is empty, or has a bad line.
        OSError: If the exam is missing.
    """
    file = folder / METADATA
    examples = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            example = Example.model_validate_json(line)
            images = tuple(folder / name for name in example.images)
            for image in images:
                Image.open(image).close()  # reads only the header
        except (ValidationError, OSError) as error:
            raise ExamError(f"{file}:{number}: {error}") from None
        examples.append(example.model_copy(update={"images": images}))
    if not examples:
        raise ExamError(f"{file} is empty")
    return examples


def write_exam(folder: Path, examples: Iterable[questions.Example]) -> None:
    """Write generated examples into a new or an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ExamError(f"{folder} is not empty")
    with (folder / METADATA).open("w") as file:
        for number, example in enumerate(examples):
            names = [f"{number}-{place}.png" for place in range(len(example.images))]
            for name, image in zip(names, example.images, strict=True):
                image.save(folder / name)
            turns = [{"question": t.question, "answers": [t.answer]} for t in example.turns]
            line = {"images_file_names": names, "family": example.family, "turns": turns}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new or an empty folder")
    parser.add_argument("--per-family", type=int, default=100, help="conversations per family")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        write_exam(arguments.folder, questions.exam(arguments.per_family, arguments.seed))
    except ExamError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
