"""What an operator may choose about the server, beside vLLM's own flags."""

from argparse import Namespace
from typing import Annotated, Any

from pydantic import Field, ValidationError

from vitcop_vllm.pruning.settings import Frozen, Positive, Ratio, format_validation_error

SERVER_KEY = "server"
"""Name of the settings wherever they travel: YAML section, additional config."""

Count = Annotated[int, Field(ge=1, strict=True)]


class ServerSettings(Frozen):
    """Limits put on requests, and what is served beside vLLM's routes.

    Attributes:
        aliases: Ratios for which ``/v1/models`` lists ``NAME@RATIO``, for tools that choose a
            model but send no headers. Such a name works with any ratio, listed or not.
        page: Whether ``/ui`` is served.
        explain: Whether ``POST /v1/pruning/explain`` tells which visual tokens survived; such a
            request reuses nothing and costs a round to the workers.
        image_ids: Whether clients may name images (``uuid``). A name is a key of caches
            that all clients share: whoever knows it is answered from that image.
        max_body_bytes: Largest request body.
        max_image_pixels: Most pixels of an image, width times height.
        max_aspect_ratio: Longest side over shortest. LLaVA's processor enlarges a thin image
            until its shortest side fills the model's input; Qwen's refuses more than 200.
    """

    aliases: tuple[Ratio, ...] = ()
    page: bool = True
    explain: bool = False
    image_ids: bool = False
    max_body_bytes: Count = 64 * 2**20
    max_image_pixels: Count = 25_000_000
    max_aspect_ratio: Annotated[Positive, Field(ge=1.0)] = 16.0


def server_settings_of(app: Any) -> ServerSettings:
    """Those that the plugin left with a running ``app``; defaults where there is none."""
    settings: ServerSettings = getattr(
        getattr(app, "state", None), "pruning_server_settings", ServerSettings()
    )
    return settings


def server_settings(args: Namespace) -> ServerSettings:
    """Settings in the additional config of vLLM's command line, whoever started it.

    Raises:
        ValueError: With a sentence that names each wrong one.
    """
    additional: Any = args.additional_config or {}
    try:
        return ServerSettings.model_validate(additional.get(SERVER_KEY, {}))
    except ValidationError as error:
        raise ValueError(format_validation_error(error, SERVER_KEY)) from None
