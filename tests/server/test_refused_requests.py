"""If our own bug makes images contradict the prompt, only that request fails, with an error."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.process import TINY_OPTIONS, running_server
from tests.server.sample_images import chat_body, png_url

pytestmark = pytest.mark.slow

FAULTY = '''
"""A vLLM plugin that injects bugs into the processor and behind it."""

from dataclasses import replace


def forge(identifier):
    from vitcop_vllm.pruning.identity import counts_of_identifier, tag_identifier

    counts = counts_of_identifier(identifier)
    n1, n2, n3 = counts.stages
    return tag_identifier("f0", replace(counts, stages=(n1 - 1, min(n2, n1 - 1), n3)))


def register():
    from vitcop_vllm.models.llava_processor import PrunedLlavaMultiModalProcessor as Processor
    from vllm.v1.engine.input_processor import InputProcessor

    get_hashes, process_inputs = Processor._get_mm_hashes, InputProcessor.process_inputs

    def forged_hashes(self, inputs):
        images = inputs.mm_data_items["image"]
        names = get_hashes(self, inputs)["image"]
        wide = [images.get_image_size(i).width == 97 for i in range(len(names))]
        return {"image": [forge(name) if w else name for name, w in zip(names, wide)]}

    def forged_request(self, *args, **kwargs):
        request = process_inputs(self, *args, **kwargs)
        if len(request.mm_features or ()) == 3:
            request.mm_features[1].identifier = forge(request.mm_features[1].identifier)
        return request

    Processor._get_mm_hashes = forged_hashes
    InputProcessor.process_inputs = forged_request
'''

HEADERS = {"X-Pruning-Ratio": "0.667"}


@pytest.fixture(scope="module")
def faulty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with injected bugs for images 97 pixels wide and for requests with 3 images."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "faulty-1.dist-info").mkdir()
    (folder / "faulty-1.dist-info" / "METADATA").write_text("Name: faulty\nVersion: 1\n")
    (folder / "faulty-1.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfaulty = faulty:register\n"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", path)
        with (
            running_server(str(checkpoint), *TINY_OPTIONS) as (url, _),
            httpx.Client(base_url=url, timeout=120, headers=HEADERS) as client,
        ):
            yield client


def mismatches(http: httpx.Client, found_by: str) -> float:
    pattern = rf'^vitcop_counts_mismatches_total{{found_by="{found_by}"}} (\S+)$'
    return sum(map(float, re.findall(pattern, http.get("/metrics").text, re.MULTILINE)))


def wide_image(route: str) -> list[dict[str, Any]]:
    """A route's messages with an image that triggers the bug."""
    url = png_url(1, (97, 64))
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
    if route == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": url.split(",")[1]}
        part = {"type": "image", "source": source}
    if route == "/v1/responses":
        part = {"type": "input_image", "image_url": url, "detail": "auto"}
    return [{"role": "user", "content": [part]}]


CHAT = "/v1/chat/completions"
ROUTES = [
    (CHAT, "messages", {}),
    (CHAT, "messages", {"stream": True}),
    (f"{CHAT}/batch", "messages", {}),
    ("/v1/responses", "input", {}),
    ("/v1/responses", "input", {"stream": True}),
    ("/v1/messages", "messages", {"max_tokens": 3}),
    ("/v1/messages", "messages", {"max_tokens": 3, "stream": True}),
]


@pytest.mark.parametrize(("route", "key", "fields"), ROUTES)
def test_a_bug_in_the_processor_is_a_503(
    faulty: httpx.Client, route: str, key: str, fields: dict[str, Any]
) -> None:
    name = faulty.get("/v1/models").json()["data"][0]["id"]
    before = mismatches(faulty, "processor")
    messages: Any = wide_image(route)
    body = {"model": name, key: [messages] if route.endswith("batch") else messages, **fields}
    answer = faulty.post(route, json=body)
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    error = answer.json()["error"]
    assert "placeholders in the prompt" in error["message"]
    assert mismatches(faulty, "processor") == before + 1
    assert faulty.get("/health").status_code == 200


def test_a_bug_behind_the_processor_harms_no_other_request(faulty: httpx.Client) -> None:
    name = faulty.get("/v1/models").json()["data"][0]["id"]
    before = mismatches(faulty, "scheduler")

    def ask(*seeds: int) -> httpx.Response:
        body = chat_body(name, *seeds, max_tokens=20, ignore_eos=True)
        return faulty.post(CHAT, json=body)

    expected = ask(1, 2).json()["choices"]
    with ThreadPoolExecutor(4) as clients:
        jobs = [clients.submit(ask, *seeds) for seeds in ((1, 2), (3, 4, 5), (1, 2), (6, 7, 8))]
        good, bad, also_good, also_bad = (job.result() for job in jobs)
    assert (bad.status_code, also_bad.status_code) == (500, 500)
    assert good.json()["choices"] == also_good.json()["choices"] == expected
    assert mismatches(faulty, "scheduler") == before + 2
    assert ask(1, 2).json()["choices"] == expected
