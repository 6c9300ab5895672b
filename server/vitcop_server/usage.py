"""What an answer's ``usage`` says about pruning, read from the processed prompt."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vitcop_vllm.pruning.identity import counts_of_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts, effective_ratio
from vitcop_vllm.pruning.settings import CONFIG_KEY, PruningSettings

_USAGE_MARK = '"usage":{'


@dataclass(frozen=True)
class PrunedModel:
    """The served model as far as answers need it: settings, decoder depth, names."""

    settings: PruningSettings
    num_layers: int
    names: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, model_config: Any, names: Sequence[str] = ()) -> Self:
        """Read a vLLM ``ModelConfig`` that our config hook has passed over.

        Raises:
            ValueError: If the hook has not: the architecture is not one of ours.
        """
        hf_config = model_config.hf_config
        pruning = getattr(hf_config, CONFIG_KEY, None)
        if pruning is None:
            raise ValueError(
                f"{', '.join(hf_config.architectures or ['this model'])} was not set up for "
                "pruning: serve a supported architecture with a supported version of vLLM (the "
                "log says if it is not), or take vitcop out of VLLM_PLUGINS to serve unpruned"
            )
        num_layers = model_config.hf_text_config.num_hidden_layers
        model = cls(PruningSettings.model_validate(pruning), num_layers, tuple(names))
        model.settings.boundaries(num_layers)  # Raises now rather than in the first answer.
        return model

    def usage_fields(self, images: Sequence[VisualTokenCounts]) -> dict[str, Any]:
        """The fields added to ``usage``, both ``None`` for a request without images."""
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
            },
        }


def image_names(engine_inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Identifiers of every image in vLLM's processed prompts."""
    return [
        identifier
        for engine_input in engine_inputs
        for identifier in (engine_input.get("mm_hashes") or {}).get("image", ())
    ]


def image_counts(names: Iterable[str]) -> list[VisualTokenCounts]:
    """Counts of the images with these identifiers.

    Raises:
        RuntimeError: If an identifier has no counts, because another processor made it.
    """
    return list(map(counts_of_identifier, names))


def extend_usage(usage: object | None, fields: Mapping[str, Any]) -> None:
    """Add ``fields`` to the usage object of an answer of vLLM, if it has one."""
    if usage is not None:
        for name, value in fields.items():
            setattr(usage, name, value)


def extend_event(event: str, fields: Mapping[str, Any]) -> str:
    """A server-sent event of vLLM, with ``fields`` added to its ``usage`` if it has one."""
    # Most events of a stream carry one token and no usage: do not parse those.
    if not event.startswith("data: ") or _USAGE_MARK not in event:
        return event
    chunk = json.loads(event.removeprefix("data: "))
    usage = chunk.get("usage")
    if not isinstance(usage, dict):  # The mark stood in generated text.
        return event
    usage.update(fields)
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
