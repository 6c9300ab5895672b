"""``/v1/pruning/*``: settings in force, plans, decoded images, and explanations of images."""

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from vitcop_server.default_ratio import DefaultRatio
from vitcop_server.errors import RequestError, error_body
from vitcop_server.explain import (
    LostSelectionsError,
    explain_image,
    explain_video,
    merge_records,
)
from vitcop_server.frame import ImageRequest, frame_url, load_image
from vitcop_server.middleware import EXPLAIN_STATE_KEY
from vitcop_server.preview import Preview
from vitcop_server.ratio import Asked, accept
from vitcop_server.route_rules import EXPLAIN_ROUTE, MAX_HEADER
from vitcop_server.settings import SERVER_KEY, ServerSettings
from vitcop_vllm.pruning.amount import Amount, auto_of, parse_amount, parse_budget
from vitcop_vllm.pruning.identity import MOST_EXPLAINED, frames_of_identifier, record_names
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.settings import AUTO

router = APIRouter()

IMAGE_ROUTE = "/v1/pruning/image"

Side = Annotated[int, Query(ge=1, le=2**20, description="Pixels.")]
Frames = Annotated[int, Query(ge=1, le=2**16, description="Of a video, as the loader reads them.")]


@dataclass
class PendingExplanation:
    """State of one request to ``/v1/pruning/explain``.

    Attributes:
        request_id: Unique id of the request.
        identifiers: Identifiers of its images; their handler adds them after rendering.
    """

    request_id: str
    identifiers: list[str] = field(default_factory=list)


@router.head("/v1/pruning/config", include_in_schema=False)
@router.get("/v1/pruning/config")
async def config(raw_request: Request) -> dict[str, Any]:
    """Settings and limits in force."""
    state = raw_request.app.state
    preview: Preview = state.pruning_preview
    server: ServerSettings = state.pruning_server_settings
    return {
        "model": preview.model.names[0],
        "settings": preview.model.settings.model_dump(mode="json"),
        SERVER_KEY: server.model_dump(mode="json"),
        "default_ratio": _default_ratio(state.pruning_default_ratio),
        "stages": selector_of(preview.model.settings.selector).stages,
        "takes_videos": preview.model.takes_videos,
        "num_layers": preview.model.num_layers,
        "first_layers": preview.first_layers,
        "prefix_caching": state.vllm_config.cache_config.enable_prefix_caching,
    }


def _default_ratio(default: DefaultRatio) -> float | str:
    """The ratio of a request that asks for nothing and arrives now, or ``auto``."""
    amount = default.amount
    return AUTO if amount.needs_detail else max(amount.ratio(1, None), default.least())


@router.head("/v1/pruning/plan", include_in_schema=False)
@router.get("/v1/pruning/plan")
async def plan(
    raw_request: Request,
    ratio: Annotated[str | None, Query(description="Pruning ratio; the default if absent.")] = None,
    budget: Annotated[str | None, Query(description="In place of a ratio: visual tokens.")] = None,
    width: Side | None = None,
    height: Side | None = None,
    frames: Frames | None = None,
) -> Any:
    """The exact plan of an image of a given size: its grid, and the tokens that it keeps.

    With ``frames`` the plan is of a video of which vLLM's loader reads so many frames.

    Without a size the plan is for the largest input of the model, at most 1,008 pixels wide and
    high: 336 x 336 with LLaVA-1.5. The answer has its ``width`` and ``height``.
    """
    preview: Preview = raw_request.app.state.pruning_preview
    settings = preview.model.settings
    try:
        named: Amount | None = None
        if ratio is not None and budget is not None:
            raise RequestError("send ratio or budget, not both", param="budget")
        if ratio is not None:
            named = parse_amount(settings, ratio, name="ratio")
        if budget is not None:
            named = parse_budget(settings, budget, name="budget")
        asked = Asked(alias=named, max_headers=raw_request.headers.getlist(MAX_HEADER))
        default: DefaultRatio = raw_request.app.state.pruning_default_ratio
        chosen, _ = accept(settings, asked, default.amount, default.least())
        if chosen.needs_detail:
            raise RequestError(
                f"auto depends on the image: name a ratio or a budget; {IMAGE_ROUTE} says which "
                "ratio auto chooses for an image",
                param="ratio",
            )
        if (width is None) != (height is None):
            raise RequestError("send both width and height, or neither", param="width")
        if frames is not None and not preview.model.takes_videos:
            raise RequestError("this model takes no videos: leave out frames", param="frames")
    except ValueError as error:
        misread = "ratio" if budget is None else "budget"
        param = error.param if isinstance(error, RequestError) else misread
        return JSONResponse(error_body(str(error), "BadRequestError", 400, param), 400)
    what = "an image" if frames is None else f"a video of {frames} frames"
    if width is None or height is None:
        width, height = preview.input_size()
    try:
        if frames is not None:
            return preview.video_plan_fields(width, height, frames, chosen)
        return preview.plan_fields(width, height, chosen)
    except ValueError as error:
        return _refused_size(what, width, height, error, "width")


def _refused_size(
    what: str, width: int, height: int, error: ValueError, param: str
) -> JSONResponse:
    message = f"the model does not accept {what} of {width} x {height} pixels: {error}"
    return JSONResponse(error_body(message, "BadRequestError", 400, param), 400)


@router.post(IMAGE_ROUTE, dependencies=[Depends(validate_json_request)])
async def image(request: ImageRequest, raw_request: Request) -> Any:
    """Width and height of an image in pixels, the frame that the model sees, and auto's ratio."""
    state = raw_request.app.state
    preview: Preview = state.pruning_preview
    default: DefaultRatio = state.pruning_default_ratio
    settings = preview.model.settings
    auto, _ = accept(settings, Asked(alias=auto_of(settings)), default.amount, default.least())
    image = await load_image(request.image_url, state.vllm_config.model_config)

    width, height = image.size
    try:
        ratio = await asyncio.to_thread(preview.ratio_of_image, image, auto)
    except ValueError as error:
        return _refused_size("an image", width, height, error, "image_url")
    frame = await asyncio.to_thread(frame_url, image)
    return {"width": width, "height": height, "auto_ratio": ratio, "frame": frame}


@router.post(EXPLAIN_ROUTE, dependencies=[Depends(validate_json_request)])
@with_cancellation
async def explain(request: ChatCompletionRequest, raw_request: Request) -> JSONResponse:
    """A chat completion, and the visual tokens of its images and videos that each stage keeps."""
    state = raw_request.app.state
    if not state.pruning_server_settings.explain:
        return JSONResponse(
            error_body(
                "explanations are off: start the server with server.explain set to true",
                "NotFoundError",
                404,
            ),
            404,
        )
    if request.stream or (request.n or 1) > 1:
        param, value = ("stream", "false") if request.stream else ("n", "1")
        message = f"{param} must be {value}: an explanation is of one answer without a stream"
        return JSONResponse(error_body(message, "BadRequestError", 400, param), 400)
    pending = PendingExplanation(uuid.uuid4().hex)
    setattr(raw_request.state, EXPLAIN_STATE_KEY, pending)
    answer = await state.openai_serving_chat.create_chat_completion(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), answer.error.code)
    names = [name for identifier in pending.identifiers for name in record_names(identifier)]
    records = merge_records(
        await state.engine_client.collective_rpc("take_selections", args=(names,)) if names else ()
    )
    images, videos = [], []
    try:
        for identifier in pending.identifiers:
            if frames_of_identifier(identifier) is None:
                images.append(explain_image(state.pruning_preview, identifier, records))
            else:
                videos.append(explain_video(state.pruning_preview, identifier, records))
    except LostSelectionsError:
        message = (
            f"the explanation is lost because more than {MOST_EXPLAINED} images and frames were "
            "explained at once: send fewer at once"
        )
        return JSONResponse(error_body(message, "ServiceUnavailableError", 503), 503)
    return JSONResponse({"completion": answer.model_dump(), "images": images, "videos": videos})
