"""An image's visual tokens, stage by stage: which stayed, were merged, or were dropped.

The encoder makes a token of each part of the image: of a patch, or of several that it merges.
Parts are numbered row by row in the grid that the answer tells.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcop_server.preview import Preview
from vitcop_vllm.pruning.identity import counts_of_identifier, explained_size


class LostChoicesError(RuntimeError):
    """Newer explanations took the place of one before it was asked for."""


def explain_image(preview: Preview, identifier: str, choices: Mapping[str, Any]) -> dict[str, Any]:
    """What ``/v1/pruning/explain`` tells of one image.

    Args:
        preview: Of the served model.
        identifier: The image's, which tells its size and counts.
        choices: What a worker recorded; see ``vitcop_vllm.worker.explain``.

    Raises:
        LostChoicesError: If the worker no longer knows all of it.
    """
    size, counts = explained_size(identifier), counts_of_identifier(identifier)
    assert size is not None
    parts = choices.get("patches") or range(counts.encoder)
    stages, merged = _stages(parts, choices)
    if tuple(map(len, stages)) != counts.stages:
        raise LostChoicesError(identifier)
    labels = choices.get("labels")
    return {
        **preview.image_fields(*size, counts),
        "saliency": choices.get("saliency"),
        "clusters": None if labels is None else _scatter(labels, parts, counts.encoder),
        "stages": [
            {**layers, "kept": _bitset(kept, counts.encoder), "merged": groups}
            for layers, kept, groups in zip(
                preview.stage_fields(counts), stages, merged, strict=True
            )
        ],
    }


def _stages(
    parts: Sequence[int], choices: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Per stage the parts where its tokens sit, and groups of parts in one token."""
    first = list(parts)
    second = [first[i] for i in choices.get("shallow", range(len(first)))]
    third = [second[i] for i in choices.get("deep", range(len(second)))]
    groups = [[first[i] for i in group] for group in choices.get("merged", ()) if len(group) > 1]
    deep = set(third)
    return [first, second, third], [[], groups, [group for group in groups if group[0] in deep]]


def _bitset(parts: Sequence[int], count: int) -> str:
    """Base64 of a bit for each part, the first in the most significant bit."""
    bits = np.zeros(count, dtype=np.bool_)
    bits[list(parts)] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _scatter(labels: Sequence[int], parts: Sequence[int], count: int) -> list[int]:
    """A label for each part, -1 where there is none."""
    of_part = [-1] * count
    for part, label in zip(parts, labels, strict=True):
        of_part[part] = label
    return of_part


def merge_answers(answers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What any worker knows: one of an engine's, and of several engines the one that served."""
    told: dict[str, dict[str, Any]] = {}
    for answer in answers:
        told.update(answer or {})
    return told
