"""A bad request gets a 4xx in OpenAI's shape and harms no other request.

After each bad request, the same connection answers a good request.
"""

import json
from typing import Any

import pytest
from PIL import Image

from tests.server.clients import CHAT, Server, assert_refused, one_image, part, user
from tests.server.sample_images import image_message, png_url
from tests.server.test_media import data_url, encoded, huge_png

pytestmark = pytest.mark.slow

SURROGATE = "\ud800"
"""Half a surrogate pair: valid in JSON, but not in UTF-8."""

JPEG = encoded(Image.new("RGB", (64, 64)), "JPEG")
FLAT = Image.new("1", (12_000, 12_000))

BAD_IMAGES = {
    "truncated base64": data_url(JPEG)[:-3],
    "bad base64": "data:image/png;base64,@@@@",
    "empty": data_url(b""),
    "text": data_url(b"hello"),
    "half a JPEG": data_url(JPEG[: len(JPEG) // 2]),
    "SVG": data_url(b'<svg xmlns="http://www.w3.org/2000/svg" width="5" height="5"/>'),
    "EPS": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
    "PDF": data_url(b"%PDF-1.4\n"),
    "not base64": "data:image/png,abc",
    "no comma": "data:image/png",
    "bomb": data_url(huge_png(30_000, 30_000)),
    "large": data_url(encoded(FLAT)),
    "thin": data_url(encoded(Image.new("1", (8000, 1)))),
    "file": "file:///etc/hostname",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "no host": "http://[::1",
    "other scheme": "ftp://127.0.0.1/a.png",
    "no URL": "",
    "null": None,
    "number": 5,
    "half a character": data_url(JPEG) + SURROGATE,
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(server: Server, name: str) -> None:
    with server.stays_usable():
        assert_refused(server.chat(messages=one_image(BAD_IMAGES[name])))


def test_errors_name_the_image_limit(server: Server) -> None:
    for name, limit in {"thin": "server.max_aspect_ratio", "large": "25000000"}.items():
        assert_refused(server.chat(messages=one_image(BAD_IMAGES[name])), words=limit)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (1, 1))),
        encoded(Image.new("CMYK", (20, 20)), "JPEG"),
        encoded(Image.new("I;16", (20, 20))),
        encoded(Image.new("LA", (20, 20))),
        encoded(Image.new("RGBA", (20, 20))),
        encoded(Image.new("P", (9, 9)), "GIF", append_images=[Image.new("P", (9, 9), 3)]),
    ],
    ids=["1x1", "CMYK", "16 bit", "LA", "RGBA", "GIF"],
)
def test_unusual_images_are_accepted(server: Server, data: bytes) -> None:
    answer = server.chat(messages=one_image(data_url(data)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["visual_tokens"]["encoder"] == 256


BAD_PARTS: dict[str, list[dict[str, Any]]] = {
    "no image": part(type="image_url"),
    "video": part(type="video_url", video_url={"url": "data:video/mp4;base64,AAAA"}),
    "audio": part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"}),
    "audio URL": part(type="audio_url", audio_url={"url": "http://127.0.0.1:9/a"}),
    "image_embeds": part(type="image_embeds", image_embeds="AAAA"),
    "prompt_embeds": part(type="prompt_embeds", data="AAAA"),
    "Pillow": part(type="image_pil", image_pil="x"),
    "unknown": part(type="alien"),
    "uuid": one_image(png_url(1), uuid="a"),
    "uuid alone": one_image(None, uuid="a"),
    "uuid in short": part(image_url=png_url(1), uuid="a"),
    "long uuid": one_image(png_url(1), uuid="a" * 5_000_000),
    "<image>": user("What is <image>?"),
    "600 <image>": user("<image>" * 600),
    "<image> before": [
        {"role": "user", "content": "See <image>"},
        {"role": "assistant", "content": "?"},
        image_message(1),
    ],
    "<image> after": [image_message(1, text="What is <image>?")],
    "too many": [image_message(*range(9))],
    "20000 words": user("word " * 20_000),
    "half a character": user(SURROGATE),
    "role": [{"role": "alien", "content": "Hi"}],
    "no role": [{"content": "Hi"}],
    "none": [],
    "not a list": user([["Hi"]]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_messages_are_refused(server: Server, name: str) -> None:
    with server.stays_usable():
        assert_refused(server.chat(messages=BAD_PARTS[name]))


REFUSED_AFTER_PREPROCESSING = {"<image>": "What is <image>?", "long": "a " * 950}
"""Texts that are refused after the preprocessing of their images."""


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", REFUSED_AFTER_PREPROCESSING)
def test_an_image_of_a_refused_chat_request_stays_usable(
    server: Server, name: str, is_stream: bool
) -> None:
    seed = 1000 + 2 * list(REFUSED_AFTER_PREPROCESSING).index(name) + is_stream
    message = image_message(seed, text=REFUSED_AFTER_PREPROCESSING[name])
    refused = server.chat(messages=[message], stream=is_stream)
    assert refused.status_code == 400 or '"code": 400' in refused.text, refused.text
    answer = server.chat(messages=[image_message(seed)])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", REFUSED_AFTER_PREPROCESSING)
def test_an_image_of_a_refused_response_stays_usable(
    server: Server, name: str, is_stream: bool
) -> None:
    seed = 2000 + 2 * list(REFUSED_AFTER_PREPROCESSING).index(name) + is_stream
    content = [
        {"type": "input_image", "image_url": png_url(seed)},
        {"type": "input_text", "text": REFUSED_AFTER_PREPROCESSING[name]},
    ]
    item = {"role": "user", "content": content}
    body = {"model": server.model, "input": [item], "max_output_tokens": 1, "stream": is_stream}
    refused = server.post("/v1/responses", json.dumps(body))
    assert refused.status_code == 400 or '"code":400' in refused.text, refused.text
    answer = server.chat(messages=[image_message(seed)])
    assert answer.status_code == 200, answer.text


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "chat_template": {"chat_template": "{{ messages }}"},
    "chat_template inside": {"chat_template_kwargs": {"chat_template": "x"}},
    "mm_processor_kwargs": {"mm_processor_kwargs": {}},
    "media_io_kwargs": {"media_io_kwargs": {"image": {}}},
    "n 0": {"n": 0},
    "n 129": {"n": 129},
    "n 17000": {"n": 17_000},
    "max_tokens -1": {"max_tokens": -1},
    "max_tokens 1e9": {"max_tokens": 10**9},
    "temperature NaN": {"temperature": float("nan")},
    "temperature Infinity": {"temperature": float("inf")},
    "length_penalty NaN": {"length_penalty": float("nan")},
    "length_penalty -1e16": {"use_beam_search": True, "length_penalty": -1e16},
    "logit_bias NaN": {"logit_bias": {"1": float("nan")}},
    "logit_bias unknown": {"logit_bias": {"999999": 1}},
    "logit_bias -1": {"logit_bias": {"-1": 1}},
    "logit_bias word": {"logit_bias": {"x": 1}},
    "allowed_token_ids": {"allowed_token_ids": [999_999]},
    "stop_token_ids": {"stop_token_ids": [-5]},
    "top_k of 70 bits": {"top_k": 2**70},
    "top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "half a character in stop": {"stop": SURROGATE},
    "half a character in bad_words": {"bad_words": [SURROGATE]},
    "half a character as key": {"chat_template_kwargs": {SURROGATE: 1}},
    "half a character as field": {SURROGATE: 1},
    "half a character in request_id": {"request_id": SURROGATE},
    "half a character in pruning_ratio": {"pruning_ratio": SURROGATE},
    "truncation": {"messages": [image_message(1)], "truncate_prompt_tokens": 10},
    "engine argument": {"vllm_xargs": {"kv_transfer_params": "x"}},
    "ratio as argument": {"vllm_xargs": {"pruning_ratio": 0.5}},
    "regex": {"structured_outputs": {"regex": "("}},
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(server: Server, name: str) -> None:
    with server.stays_usable():
        assert_refused(server.chat(**BAD_FIELDS[name]))


@pytest.mark.parametrize(
    "route", ["/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions/batch"]
)
@pytest.mark.parametrize("name", ["half a character in stop", "engine argument", "uuid"])
def test_bad_fields_are_refused_on_other_routes(server: Server, route: str, name: str) -> None:
    messages = BAD_PARTS.get(name, user("Hi"))
    body = {"model": server.model, "messages": messages, "input": messages, "max_tokens": 1}
    if route.endswith("/batch"):
        body["messages"] = [messages]
    with server.stays_usable():
        assert_refused(server.post(route, json.dumps(body | BAD_FIELDS.get(name, {}))))


@pytest.mark.parametrize(
    "item",
    [
        {"type": "message", "role": "assistant", "id": "a", "status": "completed", "content": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": ["text"]},
        {"type": "custom_tool_call", "input": "x"},
    ],
)
def test_bad_items_of_past_answers_are_refused(server: Server, item: dict[str, Any]) -> None:
    with server.stays_usable():
        body = json.dumps({"model": server.model, "input": [item], "max_output_tokens": 1})
        assert_refused(server.post("/v1/responses", body))


@pytest.mark.parametrize("prompt", ["<image>", SURROGATE, [999_999], [-1], [2**70], [], ""])
def test_bad_prompts_are_refused(server: Server, prompt: object) -> None:
    with server.stays_usable():
        body = json.dumps({"model": server.model, "prompt": prompt, "max_tokens": 1})
        assert_refused(server.post("/v1/completions", body))


@pytest.mark.parametrize(
    ("route", "fields", "param", "advice"),
    [
        ("/v1/completions", {"prompt": "<image>"}, "prompt", "/v1/chat/completions"),
        ("/invocations", {"prompt": "<image>"}, "prompt", "/v1/chat/completions"),
        ("/v1/responses", {"input": "<image>"}, "input", "content parts"),
        ("/v1/chat/completions/batch", {"messages": [user("<image>")]}, "messages", "parts"),
    ],
)
def test_the_error_of_a_stray_placeholder_names_its_field(
    server: Server, route: str, fields: dict[str, Any], param: str, advice: str
) -> None:
    answer = server.post(route, json.dumps({"model": server.model, **fields}))
    assert_refused(answer, words=advice)
    assert answer.json()["error"]["param"] == param


def test_the_error_of_an_unknown_role_names_its_field(server: Server) -> None:
    items = [{"role": "alien", "content": "Hi"}]
    answer = server.post("/v1/responses", json.dumps({"model": server.model, "input": items}))
    assert_refused(answer)
    assert answer.json()["error"]["param"] == "input"
    body = {"model": server.model, "messages": items, "max_tokens": 1}
    answer = server.post("/v1/messages", json.dumps(body))
    assert_refused(answer, words="'assistant'")
    assert "developer" not in answer.text  # Anthropic has no such role


def test_an_image_cannot_be_echoed(server: Server) -> None:
    answer = server.chat(messages=[image_message(1)], echo=True, add_generation_prompt=False)
    assert_refused(answer)
    assert answer.json()["error"]["param"] == "echo"
    prefix = {"role": "assistant", "content": "I see"}
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    prefilled = server.chat(messages=[image_message(1), prefix], echo=True, **fields)
    assert prefilled.status_code == 200, prefilled.text
    assert prefilled.json()["choices"][0]["message"]["content"].startswith("I see")


def test_unusual_but_valid_requests_are_accepted(server: Server) -> None:
    assert server.chat(messages=user("a\0b")).status_code == 200
    assert server.chat(messages=user("<imag e> and image>")).status_code == 200
    assert server.chat(truncate_prompt_tokens=10).status_code == 200
    assert server.chat(user="nobody", seed=2**62, logit_bias={"1": 5}).status_code == 200


ROUTES = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/invocations"]
BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "application/json"),
    "list": ("[]", "application/json"),
    "empty": ("", "application/json"),
    "deep": ("[" * 20_000, "application/json"),
    "deep object": ('{"model":' * 20_000 + "1" + "}" * 20_000, "application/json"),
    "not UTF-8": (b'{"model": "\xff"}', "application/json"),
    "content type": ("{}", "text/plain"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_bad_bodies_are_refused(server: Server, route: str) -> None:
    with server.stays_usable():
        for body, kind in BODIES.values():
            assert_refused(server.post(route, body, kind))


def test_unknown_models_routes_and_methods_are_refused(server: Server) -> None:
    with server.stays_usable():
        assert_refused(server.chat(model="none"), 404)
        assert_refused(server.post("/v1/nothing", "{}"), 404)
        assert_refused(server.http.get(CHAT), 405)
        assert_refused(server.http.get("/nothing"), 404)


def test_a_body_over_the_default_limit_is_refused(server: Server) -> None:
    with server.stays_usable():
        assert_refused(server.post(CHAT, b"x" * 100_000_000), 413, "server.max_body_bytes")
