"""The visual tokens of an image, or of each frame of a video, that each stage keeps or merges.

A visual token is a part of the image: a patch, or several patches that the encoder merges. Or it
is a mark that ends a row. Tokens are numbered row by row in the grids of the answer, grid by grid.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcop_server.preview import Preview
from vitcop_vllm.pruning.identity import (
    counts_by_frame,
    counts_of_identifier,
    explained_size,
    record_names,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts

Records = Mapping[str, Mapping[str, Any]]
"""Records by the name of an image or a frame."""


class LostSelectionsError(RuntimeError):
    """Newer records evicted the record of an image before the server read it."""


def explain_image(preview: Preview, identifier: str, records: Records) -> dict[str, Any]:
    """The answer of ``/v1/pruning/explain`` for one image.

    Args:
        preview: Plans of the served model.
        identifier: Identifier of the image, with its size and counts.
        records: Records from a worker by name; see ``vitcop_vllm.worker.explain``.

    Raises:
        LostSelectionsError: If the image's record is incomplete.
    """
    size, counts = explained_size(identifier), counts_of_identifier(identifier)
    assert size is not None
    selections = _selections(preview, counts, identifier, records)
    return {**preview.image_fields(*size, counts), **selections}


def explain_video(preview: Preview, identifier: str, records: Records) -> dict[str, Any]:
    """The answer of ``/v1/pruning/explain`` for one video; see :func:`explain_image`.

    Raises:
        LostSelectionsError: If a frame's record is incomplete, or the video's layout is lost.
    """
    size, counts = explained_size(identifier), counts_by_frame(identifier)
    layout = preview.info.explained_layouts.pop(identifier, None)
    if layout is None:
        raise LostSelectionsError(identifier)
    assert size is not None
    width, height = size
    frames = [
        {
            "times": None if layout.times is None else list(layout.times[number]),
            **preview.frame_fields(width, height, layout.grids, of_frame),
            **_selections(preview, of_frame, name, records),
        }
        for number, (of_frame, name) in enumerate(
            zip(counts, record_names(identifier), strict=True)
        )
    ]
    return {"width": width, "height": height, "frames": frames}


def _selections(
    preview: Preview, counts: VisualTokenCounts, name: str, records: Records
) -> dict[str, Any]:
    """What each stage selects of an image or a frame with the record ``name``."""
    record = records.get(name, {})
    parts = record.get("patches") or range(counts.encoder)
    stages, merged = _stages(parts, record)
    if tuple(map(len, stages)) != counts.stages:
        raise LostSelectionsError(name)
    labels = record.get("labels")
    return {
        "saliency": record.get("saliency"),
        "clusters": None if labels is None else _scatter(labels, parts, counts.encoder),
        "stages": [
            {**layers, "kept": _bitset(kept, counts.encoder), "merged": groups}
            for layers, kept, groups in zip(
                preview.stage_fields(counts), stages, merged, strict=True
            )
        ],
    }


def _stages(
    parts: Sequence[int], record: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Per stage: the parts whose tokens are kept, and groups of parts merged into one token."""
    first = list(parts)
    second = [first[i] for i in record.get("shallow", range(len(first)))]
    third = [second[i] for i in record.get("deep", range(len(second)))]
    groups = [[first[i] for i in group] for group in record.get("merged", ()) if len(group) > 1]
    deep = set(third)
    return [first, second, third], [[], groups, [group for group in groups if group[0] in deep]]


def _bitset(parts: Sequence[int], count: int) -> str:
    """Base64 of one bit per part; the first part is the most significant bit."""
    bits = np.zeros(count, dtype=np.bool_)
    bits[list(parts)] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _scatter(labels: Sequence[int], parts: Sequence[int], count: int) -> list[int]:
    """A label for each part of the image; -1 for a part without a label."""
    of_part = [-1] * count
    for part, label in zip(parts, labels, strict=True):
        of_part[part] = label
    return of_part


def merge_records(answers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Merge the answers of all workers of all engines into records by image identifier.

    One worker of each engine returns records; the others return ``None``.
    """
    records: dict[str, dict[str, Any]] = {}
    for answer in answers:
        records.update(answer or {})
    return records
