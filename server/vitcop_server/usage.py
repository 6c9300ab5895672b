"""The pruning fields of ``usage``, read from the processed prompt."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vitcop_vllm.pruning.identity import counts_by_frame, frames_of_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts, effective_ratio
from vitcop_vllm.pruning.settings import CONFIG_KEY, PruningSettings

_USAGE_TEXT = '"usage":{'


@dataclass(frozen=True)
class PrunedModel:
    """The data of the served model that answers need.

    Attributes:
        settings: The operator's settings of pruning.
        num_layers: Decoder layers.
        names: Names under which the model is served.
        takes_videos: Whether requests may have videos.
    """

    settings: PruningSettings
    num_layers: int
    names: tuple[str, ...] = ()
    takes_videos: bool = False

    @classmethod
    def from_config(cls, model_config: Any, names: Sequence[str] = ()) -> Self:
        """Read a vLLM ``ModelConfig`` to which our config hook has added settings.

        Raises:
            ValueError: If there are no settings: the architecture is not supported.
        """
        hf_config = model_config.hf_config
        pruning = getattr(hf_config, CONFIG_KEY, None)
        if pruning is None:
            raise ValueError(
                f"{', '.join(hf_config.architectures or ['this model'])} was not set up for "
                "pruning: serve a supported architecture with a supported version of vLLM (the "
                "log says if it is not), or remove vitcop from VLLM_PLUGINS to serve unpruned"
            )
        num_layers = model_config.hf_text_config.num_hidden_layers
        model = cls(PruningSettings.model_validate(pruning), num_layers, tuple(names))
        model.settings.boundaries(num_layers)  # Raise here, not in the first answer.
        return model

    def usage_fields(
        self, images: Sequence[VisualTokenCounts], num_frames: int = 0
    ) -> dict[str, Any]:
        """The fields added to ``usage``, both ``None`` for a request without images.

        Args:
            images: Counts of all images and of all frames of videos.
            num_frames: How many of them are frames. The fields say so if there are any.
        """
        if not images:
            return {"pruning_ratio": None, "visual_tokens": None}
        boundaries = self.settings.boundaries(self.num_layers)
        return {
            "pruning_ratio": effective_ratio(images, boundaries, self.num_layers),
            "visual_tokens": {
                "encoder": sum(image.encoder for image in images),
                "stages": [
                    sum(kept) for kept in zip(*(image.stages for image in images), strict=True)
                ],
                **({"frames": num_frames} if num_frames else {}),
            },
        }


def image_identifiers(engine_inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Identifiers of all images and videos in vLLM's processed prompts."""
    return [
        identifier
        for engine_input in engine_inputs
        for modality in ("image", "video")
        for identifier in (engine_input.get("mm_hashes") or {}).get(modality, ())
    ]


def counts_by_modality(identifiers: Iterable[str]) -> dict[str, list[VisualTokenCounts]]:
    """Counts of the images with these identifiers, and of each frame of the videos.

    Returns:
        Counts by ``"image"`` and ``"video"``.

    Raises:
        RuntimeError: If an identifier has no counts, because another processor made it.
    """
    counts: dict[str, list[VisualTokenCounts]] = {"image": [], "video": []}
    for identifier in identifiers:
        modality = "image" if frames_of_identifier(identifier) is None else "video"
        counts[modality] += counts_by_frame(identifier)
    return counts


def extend_usage(usage: object | None, fields: Mapping[str, Any]) -> None:
    """Add ``fields`` to the usage of one of vLLM's answers; do nothing if it is ``None``."""
    if usage is not None:
        for name, value in fields.items():
            setattr(usage, name, value)


def extend_event(event: str, fields: Mapping[str, Any]) -> str:
    """One of vLLM's server-sent events; if it has a ``usage``, with ``fields`` added."""
    # Most events of a stream carry one token and no usage: do not parse those.
    if not event.startswith("data: ") or _USAGE_TEXT not in event:
        return event
    chunk = json.loads(event.removeprefix("data: "))
    usage = chunk.get("usage")
    if not isinstance(usage, dict):  # The generated text contains it.
        return event
    usage.update(fields)
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
