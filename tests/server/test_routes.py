"""Plans, settings, explanations, aliases and metrics of a running server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.clients import kept_places, metrics
from tests.server.sample_images import chat_body, png_url
from vitcop_vllm.pruning.plan import STAGES

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"
V = 576


@pytest.fixture(scope="module")
def http(demo_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    name: str = http.get("/v1/pruning/config").json()["model"]
    return name


def chat(model: str, *seeds: int, **fields: Any) -> dict[str, Any]:
    return chat_body(model, *seeds, **{"max_tokens": 3, **fields})


def explain(http: httpx.Client, body: dict[str, Any], ratio: str = "0.889") -> httpx.Response:
    return http.post("/v1/pruning/explain", json=body, headers={HEADER: ratio})


def test_config_has_the_settings_in_force(http: httpx.Client) -> None:
    config = http.get("/v1/pruning/config").json()
    assert config["num_layers"] == 16
    assert config["stages"] == ["I", "II", "III"]
    assert config["first_layers"] == [0, 1, 11]
    assert config["prefix_caching"] is True
    assert config["settings"]["max_pruning_ratio"] == 0.95
    assert config["server"]["explain"] is True
    assert config["server"]["max_body_bytes"] == 64 * 2**20


@pytest.mark.parametrize("ratio", [0, 0.3, 0.667, 0.889])
def test_the_plan_agrees_with_usage(http: httpx.Client, model: str, ratio: float) -> None:
    plan = http.get("/v1/pruning/plan", params={"width": 64, "height": 48, "ratio": ratio}).json()
    answer = http.post("/v1/chat/completions", json=chat(model, 1, pruning_ratio=ratio)).json()
    tokens = answer["usage"]["visual_tokens"]
    assert [stage["tokens"] for stage in plan["stages"]] == tokens["stages"]
    assert plan["encoder_tokens"] == tokens["encoder"] == V
    assert plan["effective_ratio"] == answer["usage"]["pruning_ratio"]
    assert plan["pruning_ratio"] == ratio
    assert plan["decoder_speed_up"] == pytest.approx(1 / (1 - plan["effective_ratio"]))
    saved = plan["kv_bytes"]["saved"] / plan["kv_bytes"]["unpruned"]
    assert saved == pytest.approx(plan["effective_ratio"])
    # Keys and values, 192 wide, in float32, in 16 layers.
    assert plan["kv_bytes"]["unpruned"] == 2 * 192 * 4 * 16 * V


def test_a_plan_without_a_size_is_for_the_model_s_size(http: httpx.Client) -> None:
    plan = http.get("/v1/pruning/plan").json()
    assert (plan["width"], plan["height"], plan["box"]) == (336, 336, [0, 0, 336, 336])
    wide = http.get("/v1/pruning/plan", params={"width": 672, "height": 336}).json()
    assert wide["box"] == [168, 0, 504, 336]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"ratio": "2"}, "ratio"),
        ({"ratio": ""}, "ratio"),
        ({"budget": "0"}, "budget"),
        ({"budget": "64", "ratio": "0.5"}, "budget"),
        ({"width": "64"}, "width"),
        ({"width": "0", "height": "1"}, "query.width"),
        ({"width": "a", "height": "1"}, "query.width"),
        ({"width": "9" * 30, "height": "1"}, "query.width"),
    ],
)
def test_a_bad_query_for_a_plan_is_refused(
    http: httpx.Client, params: dict[str, str], param: str
) -> None:
    answer = http.get("/v1/pruning/plan", params=params)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("ratio", ["0", "0.3", "0.667", "0.889"])
def test_an_explanation_agrees_with_usage(http: httpx.Client, model: str, ratio: str) -> None:
    explained = explain(http, chat(model, 1, 2), ratio)
    assert explained.status_code == 200, explained.text
    assert float(explained.headers[HEADER]) == float(ratio)
    body = explained.json()
    plain = http.post("/v1/chat/completions", json=chat(model, 1, 2), headers={HEADER: ratio})
    assert body["completion"]["choices"][0]["message"] == plain.json()["choices"][0]["message"]
    usage = plain.json()["usage"]
    assert body["completion"]["usage"]["visual_tokens"] == usage["visual_tokens"]
    assert len(body["images"]) == 2
    for number, total in enumerate(usage["visual_tokens"]["stages"]):
        explained_patches = [kept_places(image["stages"][number], V) for image in body["images"]]
        assert sum(map(len, explained_patches)) == total
        for image, patches in zip(body["images"], explained_patches, strict=True):
            assert image["stages"][number]["tokens"] == len(patches)
    for image in body["images"]:
        first, second, third = (kept_places(stage, V) for stage in image["stages"])
        assert first >= second >= third
        assert (image["width"], image["height"]) == (64, 48)
        assert image["box"] == pytest.approx([8, 0, 56, 48], abs=0.1)
        assert (image["saliency"] is None) == (ratio == "0")
        for stage, kept_patches in zip(image["stages"], (first, second, third), strict=True):
            for group in stage["merged"]:
                assert group[0] in kept_patches
                assert not kept_patches & set(group[1:])
                assert first >= set(group)
        if image["clusters"]:
            assert {p for p, label in enumerate(image["clusters"]) if label >= 0} == first


def test_a_repeated_explanation_is_complete(http: httpx.Client, model: str) -> None:
    """An explanation reuses no cached tokens, because the cache has no selections."""
    once, again = (explain(http, chat(model, 5)).json()["images"] for _ in range(2))
    assert once == again
    assert once[0]["stages"][1]["merged"]


def test_text_has_an_empty_explanation(http: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = explain(http, body).json()
    assert answer["images"] == []
    assert answer["completion"]["usage"]["visual_tokens"] is None


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"stream": True}, 400, "stream"),
        ({"n": 2}, 400, "n"),
        ({"pruning_ratio": 2}, 400, "pruning_ratio"),
        ({"model": "nobody"}, 404, "model"),
        ({"mm_processor_kwargs": {"explain_as": "x"}}, 400, "mm_processor_kwargs"),
    ],
)
def test_a_bad_request_for_an_explanation_is_refused(
    http: httpx.Client, model: str, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = http.post("/v1/pruning/explain", json=chat(model, 1) | fields)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


def test_an_alias_sets_the_ratio(http: httpx.Client, model: str) -> None:
    names = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert names == [model, f"{model}@0.667", f"{model}@0.889"]
    answer = http.post("/v1/chat/completions", json=chat(f"{model}@0.889", 1))
    assert answer.headers[HEADER] == "0.889"
    assert answer.json()["usage"]["visual_tokens"]["stages"][0] < V
    unlisted = http.post("/v1/chat/completions", json=chat(f"{model}@0.5", 1))
    assert unlisted.headers[HEADER] == "0.5"
    header = {HEADER: "0.3"}
    both = http.post("/v1/chat/completions", json=chat(f"{model}@0.889", 1), headers=header)
    assert both.headers[HEADER] == "0.3"
    wrong = http.post("/v1/chat/completions", json=chat(f"{model}@1.5", 1))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")


def message_body(model: str, seed: int) -> dict[str, Any]:
    data = png_url(seed).partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def test_anthropic_s_messages_accept_the_header(http: httpx.Client, model: str) -> None:
    body = message_body(model, 1) | {"max_tokens": 3}
    unpruned = http.post("/v1/messages", json=body)
    pruned = http.post("/v1/messages", json=body, headers={HEADER: "0.889"})
    assert pruned.headers[HEADER] == "0.889"
    tokens = [answer.json()["usage"]["input_tokens"] for answer in (unpruned, pruned)]
    plan = http.get("/v1/pruning/plan", params={"ratio": 0.889}).json()
    assert tokens[0] - tokens[1] == V - plan["stages"][0]["tokens"]
    counted = http.post("/v1/messages/count_tokens", json=message_body(model, 1))
    assert counted.json()["input_tokens"] == tokens[0]
    stream = http.post("/v1/messages", json=body | {"stream": True}, headers={HEADER: "0.889"})
    assert "message_stop" in stream.text
    refused = http.post("/v1/messages", json=body | {"pruning_ratio": 0.5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "pruning_ratio")


def test_an_image_stays_usable_after_token_counting(http: httpx.Client, model: str) -> None:
    """vLLM's front end caches the image, but counting does not send it to the engine."""
    body = message_body(model, 7201)
    counted = http.post("/v1/messages/count_tokens", json=body)
    assert counted.status_code == 200
    answer = http.post("/v1/messages", json=body | {"max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["input_tokens"] == counted.json()["input_tokens"]


def response_body(model: str, *seeds: int, text: str = "What is this?", **fields: Any) -> Any:
    images = [{"type": "input_image", "image_url": png_url(seed)} for seed in seeds]
    content = [*images, {"type": "input_text", "text": text}]
    body = {"model": model, "input": [{"role": "user", "content": content}], "temperature": 0}
    return {**body, "max_output_tokens": 4, **fields}


@pytest.mark.parametrize("where", ["header", "field", "model"])
def test_responses_accept_the_ratio(http: httpx.Client, model: str, where: str) -> None:
    headers = {HEADER: "0.889"} if where == "header" else {}
    fields = {"field": {"pruning_ratio": 0.889}, "model": {"model": f"{model}@0.889"}}
    body = response_body(model, 1) | fields.get(where, {})
    response = http.post("/v1/responses", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == "0.889"
    usage = response.json()["usage"]
    chat_answer = http.post("/v1/chat/completions", json=chat(model, 1), headers={HEADER: "0.889"})
    expected = chat_answer.json()["usage"]
    for name in ("pruning_ratio", "visual_tokens"):
        assert usage[name] == expected[name]
    assert usage["input_tokens"] == expected["prompt_tokens"]


def test_responses_stream_the_same_usage(http: httpx.Client, model: str) -> None:
    body = response_body(model, 1, pruning_ratio=0.5)
    whole = http.post("/v1/responses", json=body).json()
    stream = http.post("/v1/responses", json=body | {"stream": True})
    assert stream.headers[HEADER] == "0.5"
    *_, last = (line for line in stream.text.splitlines() if line.startswith("data: "))
    event = json.loads(last.removeprefix("data: "))
    assert event["type"] == "response.completed"
    assert event["response"]["usage"]["visual_tokens"] == whole["usage"]["visual_tokens"]
    texts = [answer["output"][0]["content"][0]["text"] for answer in (event["response"], whole)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"pruning_ratio": 2}, "pruning_ratio"),
        ({"pruning_ratio": "much"}, "pruning_ratio"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
    ],
)
def test_responses_refuse_bad_ratios(
    http: httpx.Client, model: str, fields: dict[str, Any], param: str
) -> None:
    refused = http.post("/v1/responses", json=response_body(model, 1, **fields))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert HEADER not in refused.headers
    unlike = http.post(
        "/v1/responses", json=response_body(model, pruning_ratio=0.5), headers={HEADER: "0.6"}
    )
    assert unlike.status_code == 400


def test_metrics_count_requests_and_tokens(http: httpx.Client, model: str) -> None:
    before = metrics(http)
    plan = http.get("/v1/pruning/plan", params={"ratio": 0.889}).json()
    http.post("/v1/chat/completions", json=chat(model, 77, 78), headers={HEADER: "0.889"})
    http.post("/v1/chat/completions", json=chat(model), headers={HEADER: "0.889"})
    http.post("/v1/chat/completions", json=chat(model, 77), headers={HEADER: "abc"})
    http.post("/detokenize", json={"model": model, "tokens": [5]}, headers={HEADER: "0.5"})
    after = metrics(http)

    def increase(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert increase('vitcop_requests_total{ratio="0.8-0.9"}') == 1
    assert increase('vitcop_requests_total{ratio="none"}') == 1
    assert increase("vitcop_ratio_errors_total") == 2
    for name, stage in zip(STAGES, plan["stages"], strict=True):
        label = f'{{modality="image",stage="{name}"}}'
        assert increase(f"vitcop_visual_tokens_kept_total{label}") == 2 * stage["tokens"]
        dropped = 2 * (V - stage["tokens"])
        assert increase(f"vitcop_visual_tokens_dropped_total{label}") == dropped
        assert increase(f'vitcop_selection_seconds_count{{stage="{name}"}}') >= 1
    assert increase('vitcop_images_total{modality="image"}') == 2
    assert increase('vitcop_images_total{modality="video"}') == 0
    # Two images without some hundred tokens each free blocks of 32 tokens.
    assert increase("vitcop_kv_blocks_not_taken_total") > 0


def test_explanations_are_off_by_default(server_url: str) -> None:
    model = httpx.get(f"{server_url}/v1/pruning/config").json()["model"]
    refused = httpx.post(f"{server_url}/v1/pruning/explain", json=chat(model, 1), timeout=60)
    assert refused.status_code == 404
    assert "server.explain" in refused.json()["error"]["message"]
