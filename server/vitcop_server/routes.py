"""``/v1/pruning/*``: settings in force, plans, decoded images, and explanations of images."""

import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from vitcop_server.errors import RequestError, error_body
from vitcop_server.explain import LostSelectionsError, explain_image, merge_records
from vitcop_server.frame import ImageRequest, image_fields
from vitcop_server.middleware import EXPLAIN_STATE_KEY
from vitcop_server.preview import Preview
from vitcop_server.route_rules import EXPLAIN_ROUTE
from vitcop_server.settings import SERVER_KEY, ServerSettings
from vitcop_vllm.pruning.identity import MOST_EXPLAINED

router = APIRouter()

Side = Annotated[int, Query(ge=1, le=2**20, description="Pixels.")]


@dataclass
class Explained:
    """An explanation being made.

    Attributes:
        request: A name that no other request has.
        names: Its images' identifiers, once they are known.
    """

    request: str
    names: list[str] = field(default_factory=list)


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
        "num_layers": preview.model.num_layers,
        "first_layers": preview.first_layers,
        "prefix_caching": state.vllm_config.cache_config.enable_prefix_caching,
    }


@router.head("/v1/pruning/plan", include_in_schema=False)
@router.get("/v1/pruning/plan")
async def plan(
    raw_request: Request,
    ratio: Annotated[str | None, Query(description="Pruning ratio; the default if absent.")] = None,
    width: Side | None = None,
    height: Side | None = None,
) -> Any:
    """The exact plan of an image of a given size: its grid, and the tokens that it keeps.

    Without a size the plan is for the largest input of the model, at most 1,008 pixels wide and
    high: 336 x 336 with LLaVA-1.5. The answer has its ``width`` and ``height``.
    """
    preview: Preview = raw_request.app.state.pruning_preview
    settings = preview.model.settings
    try:
        chosen = (
            settings.default_ratio if ratio is None else settings.parse_ratio(ratio, name="ratio")
        )
        if (width is None) != (height is None):
            raise RequestError("send both width and height, or neither", param="width")
    except ValueError as error:
        param = error.param if isinstance(error, RequestError) else "ratio"
        return JSONResponse(error_body(str(error), "BadRequestError", 400, param), 400)
    if width is None or height is None:
        width, height = preview.input_size()
    try:
        return preview.plan_fields(width, height, chosen)
    except ValueError as error:
        sentence = f"the model takes no image of {width} x {height} pixels: {error}"
        return JSONResponse(error_body(sentence, "BadRequestError", 400, "width"), 400)


@router.post("/v1/pruning/image", dependencies=[Depends(validate_json_request)])
async def image(request: ImageRequest, raw_request: Request) -> dict[str, Any]:
    """Width and height of an image, and the frame of it that the model gets."""
    return await image_fields(request.image_url, raw_request.app.state.vllm_config.model_config)


@router.post(EXPLAIN_ROUTE, dependencies=[Depends(validate_json_request)])
@with_cancellation
async def explain(request: ChatCompletionRequest, raw_request: Request) -> JSONResponse:
    """A chat completion, and what became of the visual tokens of its images."""
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
        param = "stream" if request.stream else "n"
        sentence = "an explanation is of one answer, not streamed: send stream false and n 1"
        return JSONResponse(error_body(sentence, "BadRequestError", 400, param), 400)
    explained = Explained(uuid.uuid4().hex)
    setattr(raw_request.state, EXPLAIN_STATE_KEY, explained)
    answer = await state.openai_serving_chat.create_chat_completion(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), answer.error.code)
    records = merge_records(
        await state.engine_client.collective_rpc("take_selections", args=(explained.names,))
        if explained.names
        else ()
    )
    try:
        images = [
            explain_image(state.pruning_preview, name, records.get(name, {}))
            for name in explained.names
        ]
    except LostSelectionsError:
        sentence = (
            f"more than {MOST_EXPLAINED} images are being explained at once, and this one's "
            "explanation is lost: send fewer at a time"
        )
        return JSONResponse(error_body(sentence, "ServiceUnavailableError", 503), 503)
    return JSONResponse({"completion": answer.model_dump(), "images": images})
