"""Stray placeholders, videos, and images sent only as the id of a cached image."""

from types import SimpleNamespace
from typing import Any

import pytest

from vitcop_server.errors import RequestError
from vitcop_server.fields import (
    refuse_stray_placeholders,
    refuse_unexplained,
    refuse_unsafe_body,
)
from vitcop_server.settings import ServerSettings

IMAGE, VIDEO, START, END, WORD = 151655, 151656, 151652, 151653, 7
QWEN = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
LLAVA = SimpleNamespace(image_token_index=IMAGE)


class Tokenizer:
    """Has two tokens."""

    def decode(self, tokens: list[int]) -> str:
        return "".join({IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}[token] for token in tokens)


def refuse(
    tokens: list[int],
    places: list[tuple[int, int]],
    config: Any = QWEN,
    field: str = "messages",
    tokenizer: Any = None,
) -> None:
    at = [SimpleNamespace(offset=offset, length=length) for offset, length in places]
    prompt = {"prompt_token_ids": tokens, "mm_placeholders": {"image": at}}
    model = SimpleNamespace(hf_config=config)
    refuse_stray_placeholders([prompt], model, field, tokenizer or Tokenizer())


@pytest.mark.parametrize("config", [QWEN, LLAVA])
def test_placeholders_of_images_are_accepted(config: Any) -> None:
    small, large = [START, IMAGE, IMAGE, END], [START, *[IMAGE] * 5, END]
    refuse([WORD, *small, WORD, *large, WORD], [(2, 2), (7, 5)], config)
    refuse([WORD], [], config)


@pytest.mark.parametrize(
    ("tokens", "places", "words"),
    [
        ([WORD, IMAGE], [], "contains <|image_pad|>, the placeholder of an image, without"),
        ([IMAGE, START, IMAGE, IMAGE, END], [(2, 2)], "contains <|image_pad|>"),
        ([START, IMAGE, END, START, IMAGE, IMAGE, END], [(4, 2)], "send images as content parts"),
        ([WORD, VIDEO], [], "contains <|video_pad|>, the placeholder of a video, without"),
        ([START, IMAGE, VIDEO, END], [(1, 1)], "send videos as content parts"),
    ],
)
def test_a_stray_placeholder_is_quoted_in_the_error(
    tokens: list[int], places: list[tuple[int, int]], words: str
) -> None:
    with pytest.raises(RequestError) as refused:
        refuse(tokens, places)
    assert words in str(refused.value)
    assert refused.value.param == "messages"


def test_a_model_without_videos_has_no_video_placeholder() -> None:
    refuse([VIDEO], [], LLAVA)


def test_a_placeholder_in_a_prompt_names_the_route_for_images() -> None:
    with pytest.raises(RequestError, match="in the messages of /v1/chat/completions"):
        refuse([IMAGE], [], field="prompt")


def test_without_a_tokenizer_the_error_has_the_token_id() -> None:
    prompt = {"prompt_token_ids": [IMAGE]}
    with pytest.raises(RequestError, match=f"contains token {IMAGE}"):
        refuse_stray_placeholders([prompt], SimpleNamespace(hf_config=LLAVA), "messages", None)


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "video_embeds", "video_embeds": "AAAA"},
        {"video_url": "https://example.com/a.mp4"},
        {"type": "video_url", "video_url": None, "uuid": "a"},
    ],
)
def test_a_video_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="videos are not accepted") as refused:
        refuse_unsafe_body(content(part), ServerSettings(image_ids=True))
    assert refused.value.param == "messages"


def test_a_model_that_takes_videos_gets_them() -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    refuse_unsafe_body(content(part), ServerSettings(), takes_videos=True)
    with pytest.raises(RequestError, match="uuid is not accepted"):
        refuse_unsafe_body(content(part | {"uuid": "a"}), ServerSettings(), takes_videos=True)


@pytest.mark.parametrize(
    "part", [{"type": "video_embeds", "video_embeds": "A"}, {"video_embeds": "A"}]
)
def test_embeddings_of_a_video_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="video_embeds are not accepted") as refused:
        refuse_unsafe_body(content(part), ServerSettings(), takes_videos=True)
    assert refused.value.param == "messages"


def test_an_explanation_needs_the_video_itself() -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}, "uuid": "a"}
    refuse_unexplained(content(part)["messages"])
    with pytest.raises(RequestError, match="send the image or video itself"):
        refuse_unexplained(content({**part, "video_url": None})["messages"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "video_url"},
        {"type": "text", "text": "a", "video_url": "ignored by vLLM"},
        {"type": ["video_url"]},
        {"type": "image_url", "image_url": {"url": "data:,"}},
    ],
)
def test_other_parts_are_not_videos(part: dict[str, Any]) -> None:
    refuse_unsafe_body(content(part), ServerSettings())


@pytest.mark.parametrize(
    ("part", "is_refused"),
    [
        ({"type": "image_url", "image_url": None, "uuid": "a"}, True),
        ({"type": "image_url", "image_url": {"url": None}, "uuid": "a"}, True),
        ({"image_url": "", "uuid": "a"}, True),
        ({"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "a"}, False),
        ({"image_url": "data:,", "uuid": "a"}, False),
        ({"type": "text", "text": "a"}, False),
    ],
)
def test_an_explanation_needs_the_image_itself(part: dict[str, Any], is_refused: bool) -> None:
    messages = content(part)["messages"]
    if not is_refused:
        refuse_unexplained(messages)
        return
    with pytest.raises(RequestError, match="send the image or video itself") as refused:
        refuse_unexplained(messages)
    assert refused.value.param == "uuid"
