"""Body fields that are the server's to fill, and values that would harm other requests."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from vllm.renderers.chat_utils import has_non_text_content

from vitcop_server.errors import RequestError
from vitcop_server.route_rules import CHAT_RULES, RouteRules
from vitcop_server.settings import ServerSettings
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

PROCESSOR_FIELDS = ("mm_processor_kwargs", "media_io_kwargs")
"""Keywords of vLLM's image loading and processing: image sizes, frame counts, decoders. The ratio
is one too, and only our handlers set it."""

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_ENGINE_ARGUMENTS = frozenset({"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"})
"""Keys of ``vllm_xargs`` that vLLM itself reads, with any value."""

_MAX_LENGTH_PENALTY = 16
"""Beam search divides by the length to this power, which must be neither 0 nor infinite."""

_FIELDS_WITH_PARTS = ("messages", "input", "content_parts")
"""Fields that may hold images, on one route or another."""

_VIDEO_PARTS = frozenset({"video_url", "video_embeds"})
"""Types of vLLM's content parts for videos; a part without a type holds its content under one."""

_MARKED = ("image", "video")
"""Modalities with a placeholder token in the tokenizer."""

_UNBATCHED_FIELDS = ("stream", "tools", "prompt_logprobs", "return_prompt_text")
"""Fields of a chat that vLLM 0.32 accepts for a batch, and then answers wrongly or ignores."""

_LONG_FIELDS = frozenset({"prompt", "tokens", "token_ids"})
"""Fields of text or tokens only, up to millions, which vLLM checks itself."""


def refuse_processor_fields(body: Mapping[str, object], rules: RouteRules = CHAT_RULES) -> None:
    """Refuse a client that sets image processing itself.

    Args:
        body: The request's fields.
        rules: Of the route, to say how the client can choose a ratio there.

    Raises:
        RequestError: If one of ``PROCESSOR_FIELDS`` is there and not ``null``.
    """
    for field in PROCESSOR_FIELDS:
        if body.get(field) is not None:
            hint = f"; to choose how many visual tokens are removed {rules.advice}"
            raise RequestError(
                f"{field} is not accepted from clients"
                + (hint if RATIO_HEADER in rules.ratio_places else ""),
                param=field,
            )


def refuse_unsafe_fields(request: Any, settings: ServerSettings) -> None:
    """:func:`refuse_unsafe_body` for a request that vLLM has parsed.

    Args:
        request: Of ``/v1/chat/completions``, its batches or ``/v1/completions``.
        settings: The operator's.

    Raises:
        RequestError: If it cannot be served, or not without harm.
    """
    skipped = {"messages", *_LONG_FIELDS}
    body = request.model_dump(exclude=skipped, exclude_unset=True, warnings=False)
    messages = getattr(request, "messages", None) or []
    for message in messages:
        # A batch has conversations in their place.
        for one in message if isinstance(message, list) else [message]:
            _make_readable(one)
    if body.get("echo"):
        _refuse_echoed_images(messages)
    refuse_unsafe_body({**body, "messages": messages}, settings)


def refuse_unsafe_body(
    body: Mapping[str, object], settings: ServerSettings, rules: RouteRules = CHAT_RULES
) -> None:
    """Refuse what vLLM 0.32 would answer with status 500, or from another client's image.

    Args:
        body: The request's fields.
        settings: The operator's.
        rules: Of the route, whose words errors use.

    Raises:
        RequestError: If it cannot be served, or not without harm.
    """
    _refuse_values(body)
    _refuse_length_penalty(body.get("length_penalty"))
    _refuse_engine_arguments(body.get("vllm_xargs"), rules)
    _refuse_unreadable_items(body.get("input"))
    for field in _FIELDS_WITH_PARTS:
        for part in _parts(body.get(field)):
            if not rules.is_anthropic:  # vLLM knows Anthropic's roles, which are fewer.
                _refuse_role(part, field)
            if not settings.image_ids:
                _refuse_image_id(part)
            _refuse_video(part, field)
    if body.get("truncate_prompt_tokens") is not None and has_non_text_content(
        body.get("messages")
    ):
        raise RequestError(
            "truncate_prompt_tokens might cut through an image: leave it out",
            param="truncate_prompt_tokens",
        )


def refuse_unbatched_fields(request: Any) -> None:
    """Refuse fields that a batch of chats would answer wrongly or without effect.

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


def refuse_images_by_name(messages: object) -> None:
    """Refuse an image that a client sends by its ``uuid`` alone.

    Only the caches know such an image, and an explanation is of an image that is computed anew.

    Raises:
        RequestError: If one of the images is not there.
    """
    for part in _parts(messages):
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if part.get("uuid") is not None and "role" not in part and not url:
            raise RequestError(
                "an explanation computes the image anew: send the image itself beside its uuid",
                param="uuid",
            )


def refuse_stray_placeholders(
    engine_inputs: Iterable[Mapping[str, Any]],
    model_config: Any,
    prompt_field: str,
    tokenizer: Any = None,
) -> None:
    """Refuse a prompt whose text was taken for an image's place.

    A tokenizer turns some texts, such as ``<image>`` or ``<|image_pad|>``, into the very token
    that stands for an image: the model would be shown none there, and not what was written either.

    Args:
        engine_inputs: vLLM's processed prompts.
        model_config: vLLM's, of the served model.
        prompt_field: The body field that holds the text.
        tokenizer: The model's tokenizer, for the text of the token; ``None`` if there is none.

    Raises:
        RequestError: If an image's or a video's token is anywhere but in the place of one.
    """
    marks = _marks(model_config.hf_config)
    for engine_input in engine_inputs:
        tokens = engine_input.get("prompt_token_ids") or []
        for modality, mark in marks.items():
            places = (engine_input.get("mm_placeholders") or {}).get(modality, ())
            inside = (tokens[place.offset : place.offset + place.length] for place in places)
            if tokens.count(mark) > sum(place.count(mark) for place in inside):
                raise RequestError(
                    _stray_sentence(prompt_field, modality, _text_of(mark, tokenizer)),
                    param=prompt_field,
                )


def _marks(hf_config: Any) -> dict[str, int]:
    """The token of each modality that the model has one for."""
    marks = {}
    for modality in _MARKED:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token = getattr(hf_config, name, None)
            if token is not None:
                marks[modality] = token
    return marks


def _text_of(token: int, tokenizer: Any) -> str:
    return f"token {token}" if tokenizer is None else str(tokenizer.decode([token]))


def _stray_sentence(prompt_field: str, modality: str, mark: str) -> str:
    article = "an" if modality == "image" else "a"
    where = (
        "in the messages of /v1/chat/completions"
        if prompt_field == "prompt"
        else "as content parts"
    )
    send = f"send images {where}, and" if modality == "image" else "videos are not accepted;"
    return (
        f"{prompt_field} holds {mark}, the mark of {article} {modality}'s place, without "
        f"{article} {modality}: {send} write the mark in another way in text"
    )


def _make_readable(message: Any) -> None:
    """Let the content of a message be read more than once.

    Raises:
        RequestError: If it holds a part of no known kind; vLLM checks some only when read.
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
            why = "holds half a character (a lone surrogate)"
        elif isinstance(value, float) and not math.isfinite(value):
            why = f"must be finite, and is {value}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            why = "holds a number of more than 64 bits"
        else:
            continue
        name = field.encode(errors="replace").decode()
        raise RequestError(f"{name} {why}", param=name)


def _refuse_length_penalty(value: object) -> None:
    if isinstance(value, (int, float)) and abs(value) > _MAX_LENGTH_PENALTY:
        raise RequestError(
            f"length_penalty must be in [-{_MAX_LENGTH_PENALTY}, {_MAX_LENGTH_PENALTY}], and is "
            f"{value}",
            param="length_penalty",
        )


def _leaves(body: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Keys and values at any depth, each with the field of the body it is in."""
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
    """Messages, and the parts of their contents at any depth."""
    unseen = [messages]
    while unseen:
        value = unseen.pop()
        if isinstance(value, Mapping):
            yield value
            unseen.append(value.get("content"))
        elif isinstance(value, (list, tuple)):
            unseen += value


def _refuse_echoed_images(messages: list[Any]) -> None:
    """Refuse ``echo`` of a message with images: vLLM looks for a text in each of its parts."""
    is_batch = bool(messages) and isinstance(messages[0], list)
    conversations = messages if is_batch else [messages]
    if any(has_non_text_content(conversation[-1:]) for conversation in conversations):
        raise RequestError("echo repeats text only: the last message has an image", param="echo")


def _refuse_unreadable_items(items: object) -> None:
    """Refuse what vLLM's ``/v1/responses`` reads without looking whether it is there."""
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, Mapping):
            continue
        content = item.get("content")
        if item.get("role") == "assistant" and isinstance(content, list):
            first = content[0] if content else None
            if not (isinstance(first, Mapping) and isinstance(first.get("text"), str)):
                raise RequestError("an assistant's content must begin with a text", param="input")
        if item.get("type") == "custom_tool_call" and not {"call_id", "name"} <= item.keys():
            raise RequestError("a custom_tool_call needs call_id and name", param="input")


def _refuse_engine_arguments(arguments: object, rules: RouteRules) -> None:
    if not isinstance(arguments, Mapping):
        return
    if RATIO_KEY in arguments:
        raise RequestError(
            f"{RATIO_KEY} is not accepted in vllm_xargs: {rules.advice}", param="vllm_xargs"
        )
    if unsafe := _ENGINE_ARGUMENTS & arguments.keys():
        raise RequestError(f"{min(unsafe)} is not accepted in vllm_xargs", param="vllm_xargs")


def _refuse_role(message: Mapping[str, object], field: str) -> None:
    role = message.get("role")
    if isinstance(role, str) and role not in _ROLES:
        raise RequestError(
            f"unknown role {role[:32]!r}: one of {', '.join(sorted(_ROLES))}", param=field
        )


def _refuse_image_id(part: Mapping[str, object]) -> None:
    if part.get("uuid") is not None and "role" not in part:
        raise RequestError(
            "uuid is not accepted: it is a key of caches that all clients share, and would be "
            "answered from whatever image came first (the operator may allow it with "
            "server.image_ids)",
            param="uuid",
        )


def _refuse_video(part: Mapping[str, object], field: str) -> None:
    kind = part.get("type")
    is_video = kind in _VIDEO_PARTS if isinstance(kind, str) else bool(_VIDEO_PARTS & part.keys())
    if is_video:
        raise RequestError(
            "videos are not accepted: this server prunes the visual tokens of images, and takes no "
            "other media; send frames as images",
            param=field,
        )
