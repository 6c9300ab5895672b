"""Model names that carry a ratio, ``NAME@0.889``: for tools that send neither header nor field."""

from collections.abc import Sequence
from typing import Any, Self

from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from server.adoption import adopted
from server.errors import RequestError
from server.ratio import ratio_text
from vitcop_vllm.pruning.settings import PruningSettings

_SEPARATOR = "@"


def split_alias(
    name: str | None, served: Sequence[str], settings: PruningSettings
) -> tuple[str | None, float | None]:
    """The served model that a name means, and the ratio in it.

    A name that is served as it stands, or of which nobody knows anything, comes back as it is.

    Raises:
        RequestError: If it names a served model and then no ratio in range.
    """
    if not name or name in served:
        return name, None
    base, separator, ratio = name.rpartition(_SEPARATOR)
    if not separator or base not in served:
        return name, None
    try:
        return base, settings.parse_ratio(ratio, name=f"the ratio in model {name!r}")
    except ValueError as error:
        raise RequestError(str(error), param="model") from error


class AliasedModels(OpenAIServingModels):
    """vLLM's list of models, each also under the names that the operator wants listed."""

    aliases: tuple[float, ...]

    @classmethod
    def adopt(cls, models: object, aliases: tuple[float, ...]) -> Self:
        """``models``, which vLLM built, as an instance of this class."""
        listing: Self = adopted(models, cls)
        listing.aliases = aliases
        return listing

    async def show_available_models(self) -> Any:
        listed = await super().show_available_models()
        listed.data += [
            card.model_copy(update={"id": f"{card.id}{_SEPARATOR}{ratio_text(ratio)}"})
            for card in listed.data
            for ratio in self.aliases
        ]
        return listed
