"""Model names with a ratio, ``NAME@0.889``, for tools that cannot send a header or a field."""

from collections.abc import Sequence
from typing import Any, Self

from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from vitcop_server.errors import RequestError
from vitcop_server.route_rules import MODEL_KEY
from vitcop_vllm.adoption import adopt
from vitcop_vllm.pruning.amount import Amount, parse_amount
from vitcop_vllm.pruning.settings import PruningSettings

_SEPARATOR = "@"


def split_alias(
    name: str | None, served: Sequence[str], settings: PruningSettings
) -> tuple[str | None, Amount | None]:
    """Split a model name into the name of the served model and the ratio, or ``auto``.

    Served names and unknown names are returned unchanged.

    Raises:
        RequestError: If the text after ``NAME@`` is not a ratio in range.
    """
    if not name or name in served:
        return name, None
    base, separator, ratio = name.rpartition(_SEPARATOR)
    if not separator or base not in served:
        return name, None
    try:
        return base, parse_amount(settings, ratio, name=f"the ratio in model {name!r}")
    except ValueError as error:
        raise RequestError(str(error), param=MODEL_KEY) from error


class AliasedModels(OpenAIServingModels):
    """vLLM's list of models, in which each model also has a name for each ratio.

    All of vLLM's handlers share this object, to check whether the model of a request exists.
    """

    settings: PruningSettings
    aliases: tuple[float | str, ...]

    @classmethod
    def adopt(
        cls, models: object, settings: PruningSettings, aliases: tuple[float | str, ...]
    ) -> Self:
        """Turn ``models``, which vLLM built, into an instance of this class.

        Args:
            models: vLLM's list of models.
            settings: The operator's settings, with the largest ratio.
            aliases: Ratios for which ``/v1/models`` lists a name.
        """
        listing: Self = adopt(models, cls)
        listing.settings = settings
        listing.aliases = aliases
        return listing

    def split(self, name: str | None) -> tuple[str | None, Amount | None]:
        """See :func:`split_alias`."""
        served = [model.name for model in self.base_model_paths]
        return split_alias(name, served, self.settings)

    def is_base_model(self, model_name: str) -> bool:
        base, _ = self.split(model_name)
        return base is not None and super().is_base_model(base)

    async def show_available_models(self) -> Any:
        listed = await super().show_available_models()
        listed.data += [
            card.model_copy(
                update={"id": f"{card.id}{_SEPARATOR}{parse_amount(self.settings, ratio)}"}
            )
            for card in listed.data
            for ratio in self.aliases
        ]
        return listed


def ratio_in_name(app: Any, name: object) -> Amount | None:
    """The ratio or ``auto`` in a model's name, if it has one and ``app`` serves the model.

    Raises:
        RequestError: If the ratio is out of range.
    """
    models: AliasedModels | None = getattr(app.state, "openai_serving_models", None)
    if models is None or not isinstance(name, str):
        return None
    return models.split(name)[1]
