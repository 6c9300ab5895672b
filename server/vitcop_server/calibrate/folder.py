"""Reads the user's images and questions.

A folder has images, or images and ``metadata.jsonl``, the layout of ``imagefolder`` in Hugging
Face's datasets. Each line of it is one conversation::

    {"images_file_names": ["forms/a.png"], "family": "dates",
     "turns": [{"question": "When was it signed?"}]}

The first question shows all images; the others follow one after the other. Sub-folders are kinds
of image, families are uses. Answers are not needed: ``answers`` of a turn is not read.
"""

import base64
import hashlib
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

METADATA = "metadata.jsonl"

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

USES = {
    "describe": "Describe this image in one sentence.",
    "read": "What text is in this image? Answer with the text only.",
    "count": "How many objects are in this image? Answer with a number only.",
    "locate": "Where in the image is the largest object? Answer in a few words.",
}
"""Questions for folders without ``metadata.jsonl``, by use."""


class FolderError(ValueError):
    """A folder of images has no images, or a bad line."""


class MetadataLine(BaseModel):
    """Base of what a line holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Turn(MetadataLine):
    """One question; accepted answers, if there are any, are for exams."""

    question: str = Field(min_length=1)
    answers: tuple[str, ...] = ()


class Line(MetadataLine):
    """One conversation.

    Attributes:
        images: Paths of the images, all shown with the first question.
        family: Kind of question.
        turns: Questions, asked one after the other.
    """

    images: tuple[Path, ...] = Field(alias="images_file_names", min_length=1)
    family: str = "question"
    turns: tuple[Turn, ...] = Field(min_length=1)


AnyLine = TypeVar("AnyLine", bound=BaseModel)


@dataclass(frozen=True)
class Conversation:
    """Questions about the same images.

    Attributes:
        images: The files.
        hashes: SHA-256 of each file.
        kind: Kind of image: the sub-folder, or the folder's own name.
        use: Kind of question.
        questions: Asked one after the other.
    """

    images: tuple[Path, ...]
    hashes: tuple[str, ...]
    kind: str
    use: str
    questions: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join(image.name for image in self.images)


def read_metadata(folder: Path, model: type[AnyLine]) -> list[AnyLine]:
    """The lines of a folder's ``metadata.jsonl``, with whole paths of their ``images``.

    Raises:
        FolderError: If it is empty, has a bad line, or names a file that is no image.
        OSError: If it is missing.
    """
    file = folder / METADATA
    lines = []
    for number, text in enumerate(file.read_bytes().splitlines(), 1):
        try:
            line = model.model_validate_json(text)
            images = tuple(folder / name for name in line.images)  # type: ignore[attr-defined]
            _check_images(images)
        except (ValidationError, OSError) as error:
            raise FolderError(f"{file}:{number}: {error}") from None
        lines.append(line.model_copy(update={"images": images}))
    if not lines:
        raise FolderError(f"{file} is empty")
    return lines


def read_folder(folder: Path, questions: Mapping[str, str]) -> list[Conversation]:
    """The conversations of a folder.

    Args:
        folder: With images, in sub-folders or not.
        questions: Use -> question, asked about each image if there is no ``metadata.jsonl``.

    Raises:
        FolderError: If there are no images, or one cannot be read.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder")
    if (folder / METADATA).exists():
        return [
            _conversation(folder, line.images, line.family, [turn.question for turn in line.turns])
            for line in read_metadata(folder, Line)
        ]
    images = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not images:
        raise FolderError(f"{folder} has no images (looked for {' '.join(SUFFIXES)})")
    try:
        _check_images(images)
    except OSError as error:
        raise FolderError(str(error)) from None
    return [
        replace(conversation, use=use, questions=(question,))
        for conversation in (_conversation(folder, (image,), "", []) for image in images)
        for use, question in questions.items()
    ]


def data_url(image: Path) -> str:
    """An image file as a data URL."""
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def _check_images(images: Sequence[Path]) -> None:
    for image in images:
        Image.open(image).close()  # reads only the header


def _conversation(
    folder: Path, images: tuple[Path, ...], use: str, questions: Sequence[str]
) -> Conversation:
    parts = images[0].relative_to(folder).parts
    kind = parts[0] if len(parts) > 1 else folder.resolve().name
    hashes = tuple(hashlib.sha256(image.read_bytes()).hexdigest() for image in images)
    return Conversation(images, hashes, kind, use, tuple(questions))
