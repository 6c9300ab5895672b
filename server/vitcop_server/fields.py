"""Refuses body fields that only the server may set, and values that harm other requests."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from vllm.renderers.chat_utils import has_non_text_content

from vitcop_server.errors import RequestError
from vitcop_server.route_rules import CHAT_RULES, RouteRules
from vitcop_server.settings import ServerSettings
from vitcop_vllm.pruning.amount import BUDGET_KEY
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

PROCESSOR_FIELDS = ("mm_processor_kwargs", "media_io_kwargs")
"""Options of vLLM's image loading and processing: image sizes, frame counts, decoders.

The ratio is one of them; only our handlers set it.
"""

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_ENGINE_ARGUMENTS = frozenset({"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"})
"""Keys of ``vllm_xargs`` that vLLM itself reads, with any value."""

_MAX_LENGTH_PENALTY = 16
"""Beam search divides by ``length ** length_penalty``, which must be neither 0 nor infinite."""

_FIELDS_WITH_PARTS = ("messages", "input", "content_parts")
"""Fields that contain images on some route."""

_VIDEO_PARTS = frozenset({"video_url", "video_embeds"})
"""Types of vLLM's content parts for videos; in a part without a type, also its keys."""

_PLACEHOLDER_MODALITIES = ("image", "video")
"""Modalities with a placeholder token in the tokenizer."""

_UNBATCHED_FIELDS = ("stream", "tools", "prompt_logprobs", "return_prompt_text")
"""Fields of a chat that vLLM 0.32 accepts for a batch, and then answers wrongly or ignores."""

_LONG_FIELDS = frozenset({"prompt", "tokens", "token_ids"})
"""Fields with up to millions of characters or tokens; vLLM validates them itself."""


def refuse_processor_fields(body: Mapping[str, object], rules: RouteRules = CHAT_RULES) -> None:
    """Refuse a request that sets options of image processing.

    Args:
        body: The request's fields.
        rules: Rules of the route; the error says where the route accepts a ratio.

    Raises:
        RequestError: If one of ``PROCESSOR_FIELDS`` is set and not ``null``.
    """
    for field in PROCESSOR_FIELDS:
        if body.get(field) is not None:
            hint = f"; to choose a pruning ratio, {rules.advice}"
            raise RequestError(
                f"{field} is not accepted from clients"
                + (hint if RATIO_HEADER in rules.ratio_places else ""),
                param=field,
            )


def refuse_unsafe_fields(
    request: Any, settings: ServerSettings, takes_videos: bool = False
) -> None:
    """:func:`refuse_unsafe_body` for a request that vLLM has parsed.

    Args:
        request: A request of ``/v1/chat/completions``, its batches or ``/v1/completions``.
        settings: The operator's settings.
        takes_videos: Whether the served model takes videos.

    Raises:
        RequestError: If the request cannot be served, or would harm other requests.
    """
    skipped = {"messages", *_LONG_FIELDS}
    body = request.model_dump(exclude=skipped, exclude_unset=True, warnings=False)
    messages = getattr(request, "messages", None) or []
    for message in messages:
        # In a batch, each item is a conversation: a list of messages.
        for item in message if isinstance(message, list) else [message]:
            _make_content_a_list(item)
    if body.get("echo"):
        _refuse_echoed_images(messages)
    body = {**body, "messages": messages}
    refuse_unsafe_body(body, settings, takes_videos=takes_videos)


def refuse_unsafe_body(
    body: Mapping[str, object],
    settings: ServerSettings,
    rules: RouteRules = CHAT_RULES,
    *,
    takes_videos: bool = False,
) -> None:
    """Refuse values that vLLM 0.32 answers with status 500, or from another client's image.

    Args:
        body: The request's fields.
        settings: The operator's settings.
        rules: Rules of the route; errors use its field names.
        takes_videos: Whether the route and the served model take videos.

    Raises:
        RequestError: If the request cannot be served, or would harm other requests.
    """
    _refuse_values(body)
    _refuse_length_penalty(body.get("length_penalty"))
    _refuse_engine_arguments(body.get("vllm_xargs"), rules)
    _refuse_unreadable_items(body.get("input"))
    for field in _FIELDS_WITH_PARTS:
        for part in _parts(body.get(field)):
            if not rules.is_anthropic:  # vLLM validates Anthropic's roles itself.
                _refuse_role(part, field)
            if not settings.image_ids:
                _refuse_image_id(part)
            _refuse_video(part, field, takes_videos)
    if body.get("truncate_prompt_tokens") is not None and has_non_text_content(
        body.get("messages")
    ):
        raise RequestError(
            "truncate_prompt_tokens may cut an image into two: leave it out",
            param="truncate_prompt_tokens",
        )


def refuse_unbatched_fields(request: Any) -> None:
    """Refuse fields of a chat that vLLM ignores or answers wrongly in a batch.

    Raises:
        RequestError: If one of ``_UNBATCHED_FIELDS`` is set.
    """
    for field in _UNBATCHED_FIELDS:
        value = getattr(request, field, None)
        if not (value is None or value is False or value == []):
            raise RequestError(
                f"{field} is not supported in a batch: leave it out, or send each conversation to "
                "/v1/chat/completions",
                param=field,
            )


def refuse_unexplained(messages: object) -> None:
    """Refuse an image or a video that a client sends by its ``uuid`` alone.

    An explanation computes it again, and vLLM's caches do not keep the image itself.

    Raises:
        RequestError: If there is an image or a video with a ``uuid`` and no URL.
    """
    for part in _parts(messages):
        image = part.get("image_url") or part.get("video_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if part.get("uuid") is not None and "role" not in part and not url:
            raise RequestError(
                "an explanation computes it again: send the image or video itself with its uuid",
                param="uuid",
            )


def refuse_stray_placeholders(
    engine_inputs: Iterable[Mapping[str, Any]],
    model_config: Any,
    prompt_field: str,
    tokenizer: Any = None,
) -> None:
    """Refuse a prompt whose text contains a placeholder token without an image.

    A tokenizer encodes some texts, such as ``<image>`` or ``<|image_pad|>``, as the placeholder
    token of images. The model would get neither an image nor this text.

    Args:
        engine_inputs: vLLM's processed prompts.
        model_config: vLLM's config of the served model.
        prompt_field: The body field with the text.
        tokenizer: The model's tokenizer, which decodes the token for the error message.

    Raises:
        RequestError: If a placeholder token belongs to no image and no video.
    """
    placeholders = _placeholder_tokens(model_config.hf_config)
    for engine_input in engine_inputs:
        tokens = engine_input.get("prompt_token_ids") or []
        for modality, placeholder in placeholders.items():
            places = (engine_input.get("mm_placeholders") or {}).get(modality, ())
            inside = (tokens[place.offset : place.offset + place.length] for place in places)
            if tokens.count(placeholder) > sum(place.count(placeholder) for place in inside):
                raise RequestError(
                    _stray_error(prompt_field, modality, _token_text(placeholder, tokenizer)),
                    param=prompt_field,
                )


def _placeholder_tokens(hf_config: Any) -> dict[str, int]:
    """The placeholder token of each modality that the model supports."""
    placeholders = {}
    for modality in _PLACEHOLDER_MODALITIES:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token = getattr(hf_config, name, None)
            if token is not None:
                placeholders[modality] = token
    return placeholders


def _token_text(token: int, tokenizer: Any) -> str:
    return f"token {token}" if tokenizer is None else str(tokenizer.decode([token]))


def _stray_error(prompt_field: str, modality: str, placeholder: str) -> str:
    article = "an" if modality == "image" else "a"
    where = (
        "in the messages of /v1/chat/completions"
        if prompt_field == "prompt"
        else "as content parts"
    )
    return (
        f"{prompt_field} contains {placeholder}, the placeholder of {article} {modality}, without "
        f"{article} {modality}: send {modality}s {where}, and write the placeholder in another "
        "way in text"
    )


def _make_content_a_list(message: Any) -> None:
    """Replace an iterator of content parts by a list, which can be read more than once.

    Raises:
        RequestError: If a part has an unknown type; vLLM validates some parts only when read.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if content is None or isinstance(content, (str, list)):
        return
    try:
        message["content"] = list(content)
    except ValidationError as error:
        raise RequestError(str(error), param="messages") from None


def _refuse_values(body: Mapping[str, object]) -> None:
    for field, value in _leaves(body):
        if isinstance(value, str) and not _is_text(value):
            why = "contains half a character (a lone surrogate)"
        elif isinstance(value, float) and not math.isfinite(value):
            why = f"must be finite, not {value}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            why = "contains a number of more than 64 bits"
        else:
            continue
        name = field.encode(errors="replace").decode()
        raise RequestError(f"{name} {why}", param=name)


def _refuse_length_penalty(value: object) -> None:
    if isinstance(value, (int, float)) and abs(value) > _MAX_LENGTH_PENALTY:
        raise RequestError(
            f"length_penalty must be from -{_MAX_LENGTH_PENALTY} to {_MAX_LENGTH_PENALTY}, not "
            f"{value}",
            param="length_penalty",
        )


def _leaves(body: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Keys and values at any depth, each with its top-level field of the body."""
    for field in body.keys() - _LONG_FIELDS:
        unseen = [field, body[field]]
        while unseen:
            value = unseen.pop()
            if isinstance(value, Mapping):
                unseen += value.keys()
                unseen += value.values()
            elif isinstance(value, (list, tuple)):
                unseen += value
            else:
                yield field, value


def _is_text(value: str) -> bool:
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parts(messages: object) -> Iterator[Mapping[str, object]]:
    """Messages and their content parts, at any depth."""
    unseen = [messages]
    while unseen:
        value = unseen.pop()
        if isinstance(value, Mapping):
            yield value
            unseen.append(value.get("content"))
        elif isinstance(value, (list, tuple)):
            unseen += value


def _refuse_echoed_images(messages: list[Any]) -> None:
    """Refuse ``echo`` of a message with images: vLLM expects a text in each part."""
    is_batch = bool(messages) and isinstance(messages[0], list)
    conversations = messages if is_batch else [messages]
    if any(has_non_text_content(conversation[-1:]) for conversation in conversations):
        raise RequestError("echo repeats text only: the last message has an image", param="echo")


def _refuse_unreadable_items(items: object) -> None:
    """Refuse items of ``/v1/responses`` without a key that vLLM reads and does not check."""
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, Mapping):
            continue
        content = item.get("content")
        if item.get("role") == "assistant" and isinstance(content, list):
            first = content[0] if content else None
            if not (isinstance(first, Mapping) and isinstance(first.get("text"), str)):
                raise RequestError(
                    "content of an assistant must begin with a part that has a text", param="input"
                )
        if item.get("type") == "custom_tool_call" and not {"call_id", "name"} <= item.keys():
            raise RequestError("a custom_tool_call needs call_id and name", param="input")


def _refuse_engine_arguments(arguments: object, rules: RouteRules) -> None:
    if not isinstance(arguments, Mapping):
        return
    for key in {RATIO_KEY, BUDGET_KEY} & {*arguments}:
        raise RequestError(
            f"{key} is not accepted in vllm_xargs: {rules.advice}", param="vllm_xargs"
        )
    if unsafe := _ENGINE_ARGUMENTS & arguments.keys():
        raise RequestError(f"{min(unsafe)} is not accepted in vllm_xargs", param="vllm_xargs")


def _refuse_role(message: Mapping[str, object], field: str) -> None:
    role = message.get("role")
    if isinstance(role, str) and role not in _ROLES:
        raise RequestError(
            f"role must be one of {', '.join(sorted(_ROLES))}, not {role[:32]!r}", param=field
        )


def _refuse_image_id(part: Mapping[str, object]) -> None:
    if part.get("uuid") is not None and "role" not in part:
        raise RequestError(
            "uuid is not accepted, because it is a key of caches that all clients share: leave it "
            "out (the operator may allow it with server.image_ids)",
            param="uuid",
        )


def _is_video(part: Mapping[str, object]) -> bool:
    kind = part.get("type")
    return kind in _VIDEO_PARTS if isinstance(kind, str) else bool(_VIDEO_PARTS & part.keys())


def _refuse_video(part: Mapping[str, object], field: str, takes_videos: bool) -> None:
    if not _is_video(part):
        return
    if not takes_videos:
        raise RequestError(
            "videos are not accepted: send frames as images (Qwen2.5-VL, Qwen3-VL and "
            "LLaVA-OneVision take videos on /v1/chat/completions)",
            param=field,
        )
    if "video_embeds" in (part.get("type"), *part.keys()):
        raise RequestError("video_embeds are not accepted: send the video", param=field)
