"""A running server whose default ratio follows load.

The engine is paused while requests are sent, so that the number of waiting requests is known.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.clients import CHAT, metrics
from tests.server.process import TINY_OPTIONS, running_server
from tests.server.sample_images import chat_body, image_message

pytestmark = pytest.mark.slow

RATIO, MAX = "X-Pruning-Ratio", "X-Pruning-Max"
ELASTIC = {"to": 0.889, "waiting": [1, 5], "fall_seconds": 0.5}
RATIOS = (0.0, 0.222, 0.445, 0.667, 0.889)
HELLO = [{"role": "user", "content": "Hi"}]
ROUND_OFF = 0.02
"""Counts of visual tokens are integers."""


@pytest.fixture(scope="module")
def http(checkpoint: Path) -> Iterator[httpx.Client]:
    options = ("--max-num-seqs", "1", "--server", json.dumps({"elastic": ELASTIC}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # has the routes /pause and /resume
        with (
            running_server(str(checkpoint), *TINY_OPTIONS, *options) as (url, _),
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            yield client


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    name: str = http.get("/v1/pruning/config").json()["model"]
    return name


def default_ratio(http: httpx.Client) -> float:
    ratio: float = http.get("/v1/pruning/config").json()["default_ratio"]
    return ratio


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pause(http: httpx.Client, path: str) -> None:
    answer = http.post(path, params={"mode": "keep"})
    assert answer.status_code == 200, answer.text


def accepted(http: httpx.Client) -> float:
    """How many requests the server has accepted."""
    of_ratios = metrics(http).items()
    return sum(value for name, value in of_ratios if name.startswith("vitcop_requests_total"))


class Queue:
    """Streamed answers that wait for the paused engine, and so do their headers."""

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http, self._model = http, model
        self._clients = ThreadPoolExecutor(16)
        self._jobs: list[Future[httpx.Response]] = []
        self._accepted_before = accepted(http)

    def send(self, seed: int, headers: dict[str, str] | None = None, **fields: Any) -> None:
        """Send a chat request about an image."""
        options = {"stream_options": {"include_usage": True}, "max_tokens": 2}
        self.post(CHAT, headers, **chat_body(self._model, seed, **options) | fields)

    def post(self, path: str, headers: dict[str, str] | None, **fields: Any) -> None:
        """Send a request for a stream."""
        body = {"model": self._model, "stream": True, **fields}
        self._jobs.append(self._clients.submit(self._http.post, path, json=body, headers=headers))

    def wait_until_accepted(self) -> None:
        """Wait until the server has accepted all requests, and so has chosen their ratios."""
        wait_until(lambda: accepted(self._http) == self._accepted_before + len(self._jobs))

    def answers(self) -> list[httpx.Response]:
        """The complete answers, in the order of the requests."""
        with self._clients:
            return [job.result().raise_for_status() for job in self._jobs]


def usage_of(answer: httpx.Response) -> dict[str, Any]:
    usage: dict[str, Any] = json.loads(answer.text.split("data: ")[-2])["usage"]
    return usage


def test_the_default_follows_the_queue(http: httpx.Client, model: str) -> None:
    before = metrics(http)
    pause(http, "/pause")
    queue = Queue(http, model)
    given = ["0.0", "0.0", "0.222", "0.445", "0.667", "0.889"]
    for number, ratio in enumerate((*RATIOS, RATIOS[-1]), start=1):
        queue.send(number)
        wait_until(lambda ratio=ratio: default_ratio(http) == ratio)  # type: ignore[misc]

    # Requests that name a ratio get it, and no request gets more than its own maximum.
    queue.send(11, {RATIO: "0.3"})
    queue.send(12, pruning_ratio=0.3)
    queue.send(13, model=f"{model}@0.3")
    queue.send(14, {MAX: "0.5"})
    queue.send(15, {MAX: "0.99"})
    queue.send(16, {MAX: "0.3", RATIO: "0.3"})
    given += ["0.3", "0.3", "0.3", "0.5", "0.889", "0.3"]

    queue.wait_until_accepted()
    pause(http, "/resume")
    answers = queue.answers()
    assert [answer.headers[RATIO] for answer in answers] == given
    pruned = [usage_of(answer)["pruning_ratio"] for answer in answers]
    assert pruned == pytest.approx([*map(float, given)], abs=ROUND_OFF)
    # Of those that name no ratio, six got more than the operator's default.
    raised = "vitcop_requests_raised_total"
    assert metrics(http)[raised] - before.get(raised, 0.0) == 6

    wait_until(lambda: metrics(http)["vitcop_default_ratio"] == 0)
    calm = Queue(http, model)
    calm.send(21)
    (answer,) = calm.answers()
    assert answer.headers[RATIO] == "0.0"
    assert usage_of(answer)["pruning_ratio"] == 0


def test_all_routes_show_the_same_default(http: httpx.Client, model: str) -> None:
    pause(http, "/pause")
    queue = Queue(http, model)
    for number in range(1, 6):
        queue.send(number)
    wait_until(lambda: default_ratio(http) == 0.889)
    given = []
    image = {"model": model, "messages": [image_message(1)]}
    source = {"type": "base64", "media_type": "image/png"}
    url = image["messages"][0]["content"][0]["image_url"]["url"]  # type: ignore[index]
    source["data"] = url.partition(",")[2]
    counted = {
        "model": model,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": source},
                    {"type": "text", "text": "What is this?"},
                ],
            }
        ],
    }
    try:
        for headers, ratio in (({}, "0.889"), ({MAX: "0.5"}, "0.5")):
            plan = http.get("/v1/pruning/plan", headers=headers).json()
            assert plan["pruning_ratio"] == float(ratio)
            for path, prompt, count in (
                ("/tokenize", image, "count"),
                ("/v1/messages/count_tokens", counted, "input_tokens"),
            ):
                answer = http.post(path, json=prompt, headers=headers)
                named = http.post(path, json=prompt, headers={RATIO: ratio})
                assert answer.headers[RATIO] == ratio
                assert answer.json()[count] == named.json()[count]
            fields: dict[str, Any]
            for path, fields in (
                ("/v1/responses", {"input": "Hi", "max_output_tokens": 1}),
                ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
                ("/v1/completions", {"prompt": "Hi", "max_tokens": 1}),
            ):
                queue.post(path, headers, **fields)
                given.append(ratio)
        queue.wait_until_accepted()
    finally:
        pause(http, "/resume")
        answers = queue.answers()
    assert [answer.headers[RATIO] for answer in answers[5:]] == given


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({MAX: "much"}, "header X-Pruning-Max must be a decimal number from 0 to 1"),
        ({MAX: "0.5", RATIO: "0.6"}, "asks for ratio 0.6, and its header X-Pruning-Max allows 0.5"),
    ],
)
def test_a_bad_maximum_is_refused_in_the_route_s_format(
    http: httpx.Client, model: str, headers: dict[str, str], words: str
) -> None:
    body = {"model": model, "max_tokens": 1, "messages": HELLO}
    for path in (CHAT, "/v1/messages"):
        answer = http.post(path, json=body, headers=headers)
        assert answer.status_code == 400
        assert ("type" in answer.json()) == (path == "/v1/messages")
        assert words in answer.json()["error"]["message"]
        # vLLM's Anthropic handler drops the parameter.
        assert answer.json()["error"]["param"] == (MAX if path == CHAT else None)
    # This route would ignore it.
    answer = http.post("/v1/chat/completions/render", json=body, headers=headers)
    assert "is not supported on this route" in answer.json()["error"]["message"]
