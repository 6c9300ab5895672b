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

from pydantic import Field

from demo import questions
from vitcop_server.calibrate import folder as imagefolder
from vitcop_server.calibrate.folder import METADATA, FolderError, read_metadata


class Turn(imagefolder.Turn):
    """One question, and its accepted answers."""

    answers: tuple[str, ...] = Field(min_length=1)


class Example(imagefolder.Line):
    """A conversation; its family gets an accuracy of its own."""

    family: str
    turns: tuple[Turn, ...] = Field(min_length=1)


def read_exam(folder: Path) -> list[Example]:
    """The examples of a folder.

    Raises:
        FolderError: If the exam is empty, or has a bad line.
        OSError: If the exam is missing.
    """
    return read_metadata(folder, Example)


def write_exam(folder: Path, examples: Iterable[questions.Example]) -> None:
    """Write generated examples into a new or an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FolderError(f"{folder} is not empty")
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
    parser.add_argument("--varied-sizes", action="store_true", help="images that are not square")
    arguments = parser.parse_args()
    try:
        made = questions.exam(arguments.per_family, arguments.seed, varied=arguments.varied_sizes)
        write_exam(arguments.folder, made)
    except FolderError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
