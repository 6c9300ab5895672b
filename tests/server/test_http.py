"""The running server, through OpenAI's client and raw HTTP."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.server import sample_images
from tests.server.sample_images import image_message

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"
ROUND_OFF = 0.15  # tiny images have few tokens


@pytest.fixture(scope="module")
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def chat_body(model: str, *seeds: int, **fields: Any) -> dict[str, Any]:
    return sample_images.chat_body(model, *seeds, **{"max_tokens": 4, **fields})


def chat(
    http: httpx.Client, model: str, *seeds: int, ratio: str | None = None, **fields: Any
) -> httpx.Response:
    headers = {} if ratio is None else {HEADER: ratio}
    return http.post(
        "/v1/chat/completions", json=chat_body(model, *seeds, **fields), headers=headers
    )


def assert_refused(answer: httpx.Response, param: str, *words: str) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    for word in words:
        assert word in error["message"]
    assert HEADER not in answer.headers


def assert_pruned(usage: dict[str, Any], ratio: float) -> None:
    assert usage["pruning_ratio"] == pytest.approx(ratio, abs=ROUND_OFF)
    encoder, stages = usage["visual_tokens"]["encoder"], usage["visual_tokens"]["stages"]
    assert encoder >= stages[0] >= stages[1] >= stages[2] >= 1
    assert (stages[2] < encoder) == (ratio > 0)


@pytest.mark.parametrize("ratio", ["0", "0.3", "0.667", "0.889", ".5", "0.50"])
def test_header_is_echoed_and_usage_reports_counts(
    http: httpx.Client, model: str, ratio: str
) -> None:
    answer = chat(http, model, 1, ratio=ratio)
    assert answer.status_code == 200, answer.text
    assert float(answer.headers[HEADER]) == float(ratio)
    assert_pruned(answer.json()["usage"], float(ratio))


def test_the_default_ratio_is_reported(http: httpx.Client, model: str) -> None:
    answer = chat(http, model, 1)
    assert float(answer.headers[HEADER]) == 0
    assert_pruned(answer.json()["usage"], 0)


def test_the_body_field_works_with_openai_s_client(client: openai.OpenAI, model: str) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **chat_body(model, 2), extra_body={"pruning_ratio": 0.667}
    )
    usage = raw.parse().usage
    assert usage is not None
    assert raw.headers[HEADER] == "0.667"
    assert_pruned(usage.model_dump(), 0.667)


def test_header_and_body_may_agree(http: httpx.Client, model: str) -> None:
    answer = chat(http, model, 1, ratio="0.50", pruning_ratio=0.5)
    assert answer.status_code == 200
    assert answer.headers[HEADER] == "0.5"


def test_null_in_the_body_is_no_ratio(http: httpx.Client, model: str) -> None:
    assert chat(http, model, 1, ratio="0.5", pruning_ratio=None).headers[HEADER] == "0.5"


def test_prompt_tokens_count_the_tokens_that_stage_i_keeps(http: httpx.Client, model: str) -> None:
    full = chat(http, model, 1, ratio="0").json()["usage"]
    pruned = chat(http, model, 1, ratio="0.889").json()["usage"]
    dropped = pruned["visual_tokens"]["encoder"] - pruned["visual_tokens"]["stages"][0]
    assert dropped > 0
    assert full["prompt_tokens"] - pruned["prompt_tokens"] == dropped


def test_two_images_are_summed(http: httpx.Client, model: str) -> None:
    one = chat(http, model, 1, ratio="0.667").json()["usage"]
    two = chat(http, model, 1, 2, ratio="0.667").json()["usage"]
    assert two["visual_tokens"]["encoder"] == 2 * one["visual_tokens"]["encoder"]
    assert two["visual_tokens"]["stages"] == [2 * n for n in one["visual_tokens"]["stages"]]
    assert two["pruning_ratio"] == pytest.approx(one["pruning_ratio"])


def test_several_choices_count_an_image_once(http: httpx.Client, model: str) -> None:
    one = chat(http, model, 1, ratio="0.667").json()["usage"]
    three = chat(http, model, 1, ratio="0.667", n=3, temperature=1).json()["usage"]
    assert three["visual_tokens"] == one["visual_tokens"]


@pytest.mark.parametrize("continuous", [False, True])
def test_stream_reports_in_every_usage(client: openai.OpenAI, model: str, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    raw = client.chat.completions.with_raw_response.create(
        **chat_body(model, 1, stream=True, stream_options=options),
        extra_headers={HEADER: "0.667"},
    )
    assert raw.headers[HEADER] == "0.667"
    chunks = list(raw.parse())
    usages = [chunk.usage.model_dump() for chunk in chunks if chunk.usage is not None]
    assert len(usages) == (len(chunks) if continuous else 1)
    for usage in usages:
        assert_pruned(usage, 0.667)


def test_stream_without_usage_is_untouched(http: httpx.Client, model: str) -> None:
    answer = chat(http, model, 1, ratio="0.5", stream=True)
    assert answer.headers[HEADER] == "0.5"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "usage" not in answer.text


def test_chat_without_images_reports_null(http: httpx.Client, model: str) -> None:
    answer = chat(http, model, ratio="0.667")
    assert answer.headers[HEADER] == "0.667"
    usage = answer.json()["usage"]
    assert usage["pruning_ratio"] is None
    assert usage["visual_tokens"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_completions_report_null(http: httpx.Client, model: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": model, "prompt": ["Hi", "Ho"], "max_tokens": 2}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = http.post("/v1/completions", json=body, headers={HEADER: "0.667"})
    assert answer.status_code == 200, answer.text
    assert answer.headers[HEADER] == "0.667"
    assert '"pruning_ratio":null' in answer.text
    assert '"visual_tokens":null' in answer.text


def test_ratios_mixed_in_one_batch_answer_as_alone(http: httpx.Client, model: str) -> None:
    ratios = ["0", "0.5", "0.667", "0.889", "0.95"] * 2

    def ask(ratio: str) -> tuple[str, dict[str, Any]]:
        answer = chat(http, model, 3, ratio=ratio, max_tokens=8).json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["visual_tokens"]

    alone = [ask(ratio) for ratio in ratios]
    with ThreadPoolExecutor(len(ratios)) as pool:
        assert list(pool.map(ask, ratios)) == alone


BAD_HEADERS = [
    *["", "abc", "0x1", "0,5", "0.5, 0.5", "0.5; q=1", "-0.1", "-1", "1", "1.5", "0.951"],
    *["nan", "inf", "1e-1", "1e-400", "0.5 0.5", "None", "9" * 9000],
]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("value", BAD_HEADERS, ids=lambda value: value[:12])
def test_a_bad_header_is_a_400(http: httpx.Client, model: str, route: str, value: str) -> None:
    body = chat_body(model) if "chat" in route else {"model": model, "prompt": "Hi"}
    answer = http.post(route, json=body, headers={HEADER: value})
    assert_refused(answer, HEADER, HEADER, "0 to 0.95")
    assert len(answer.text) < 1000


def test_digits_of_other_scripts_are_refused(http: httpx.Client, model: str) -> None:
    answer = http.post(
        "/v1/chat/completions",
        json=chat_body(model),
        headers=[(HEADER.encode(), "٠.٥".encode())],
    )
    assert_refused(answer, HEADER, HEADER, "0 to 0.95")


@pytest.mark.parametrize("values", [("0.5", "0.5"), ("0.5", "0.6"), ("", "0.5")])
def test_a_repeated_header_is_refused(
    http: httpx.Client, model: str, values: tuple[str, str]
) -> None:
    answer = http.post(
        "/v1/chat/completions",
        json=chat_body(model),
        headers=[(HEADER, value) for value in values],
    )
    assert_refused(answer, HEADER, HEADER, "once", "2 times")


@pytest.mark.parametrize("value", ["abc", "", -0.1, 1, 1.5, 10**400, True, [0.5], {"a": 1}])
def test_a_bad_body_field_is_a_400(http: httpx.Client, model: str, value: object) -> None:
    answer = chat(http, model, pruning_ratio=value)
    assert_refused(answer, "pruning_ratio", "pruning_ratio", "0 to 0.95")


@pytest.mark.parametrize("stream", [False, True])
def test_header_and_body_must_not_differ(http: httpx.Client, model: str, stream: bool) -> None:
    answer = chat(http, model, 1, ratio="0.5", pruning_ratio=0.6, stream=stream)
    assert_refused(answer, "pruning_ratio", HEADER, "0.5", "0.6")


@pytest.mark.parametrize("field", ["mm_processor_kwargs", "media_io_kwargs"])
@pytest.mark.parametrize("value", [{}, {"pruning_ratio": {}}, {"image": {"size": 9}}])
@pytest.mark.parametrize(
    "route",
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/invocations"],
)
def test_processor_keywords_are_refused(
    http: httpx.Client, model: str, route: str, field: str, value: object
) -> None:
    body = chat_body(model, 1) | {"prompt": "Hi", "input": "Hi", field: value}
    assert_refused(http.post(route, json=body), field, field, HEADER)


OTHER_ROUTES = [
    "/v1/chat/completions/render",
    "/v1/audio/transcriptions",
    "/inference/v1/generate",
    "/detokenize",
    "/generative_scoring",
    "/v1/nothing",
]


@pytest.mark.parametrize("route", OTHER_ROUTES)
def test_a_ratio_on_other_routes_is_refused(http: httpx.Client, model: str, route: str) -> None:
    body = chat_body(model, 1) | {"input": "Hi"}
    answer = http.post(route, json=body, headers={HEADER: "0.5"})
    assert_refused(answer, HEADER, HEADER, "/v1/chat/completions")
    answer = http.post(route, json=body | {"pruning_ratio": 0.5})
    assert_refused(answer, "pruning_ratio", "/v1/chat/completions")


def test_a_ratio_in_utf_16_is_found(http: httpx.Client, model: str) -> None:
    body = f'{{"model": "{model}", "prompt": "Hi", "pruning_ratio": 0.5}}'.encode("utf-16")
    answer = http.post("/detokenize", content=body, headers={"content-type": "application/json"})
    assert_refused(answer, "pruning_ratio")


def test_other_routes_work_without_a_ratio(http: httpx.Client, model: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": model, "messages": messages, "max_tokens": 2}
    assert http.post("/v1/messages", json=body).status_code == 200
    assert http.post("/invocations", json=body).status_code == 200
    assert http.post("/tokenize", json={"model": model, "prompt": "Hi"}).status_code == 200


def test_features_from_clients_are_refused(http: httpx.Client, model: str) -> None:
    body = {"model": model, "token_ids": [1], "sampling_params": {}, "features": {}}
    assert_refused(http.post("/inference/v1/generate", json=body), "features")


def test_get_ignores_the_header(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={HEADER: "0.5"}).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff", b"{}"])
def test_malformed_body_keeps_status(http: httpx.Client, content: bytes) -> None:
    for headers in ({}, {HEADER: "0.5"}):
        headers = headers | {"content-type": "application/json"}
        answer = http.post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == 400
        assert HEADER not in answer.headers


def test_wrong_content_type_keeps_status(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 400


def test_unknown_model_keeps_status(http: httpx.Client) -> None:
    answer = chat(http, "no-such-model", 1, ratio="0.5")
    assert answer.status_code == 404
    assert HEADER not in answer.headers


def test_a_broken_image_is_a_400(http: httpx.Client, model: str) -> None:
    message = image_message(1)
    message["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"  # type: ignore[index]
    answer = chat(http, model, ratio="0.5", messages=[message])
    assert answer.status_code == 400
    assert HEADER not in answer.headers


def test_the_connection_survives_refusals(server_url: str, model: str) -> None:
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=server_url, timeout=120, limits=limits) as http:

        def local_port(answer: httpx.Response) -> int:
            stream = answer.extensions["network_stream"]
            return int(stream.get_extra_info("client_addr")[1])

        first = chat(http, model, 1, ratio="0.5")
        answers = [
            chat(http, model, 1, ratio="2"),
            http.post("/detokenize", json=chat_body(model, 1), headers={HEADER: "0.5"}),
            chat(http, model, 1, ratio="0.5"),
        ]
        assert [answer.status_code for answer in answers] == [400, 400, 200]
        assert {local_port(answer) for answer in answers} == {local_port(first)}
        assert answers[-1].json()["choices"] == first.json()["choices"]
