"""The profile ``cpu``, as docs/deploy.md describes it, and how its server restarts and stops."""

import base64
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.deploy.deployment import KEY, Deployment, deployed, docker, wait_until
from tests.docker.files import ROOT

KEY_HEADER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def deployment(images: dict[str, float]) -> Iterator[Deployment]:
    with deployed("cpu") as deployment:
        yield deployment


def sign(url: str, ratio: str | None = None, **fields: Any) -> httpx.Response:
    """Ask what the README's sample says; ``ratio`` is the header's, ``fields`` are the body's."""
    data = base64.b64encode((ROOT / "docs/sample.png").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    text = {"type": "text", "text": "What does the sign say?"}
    body = {
        "model": "demo",
        "max_tokens": 16,
        "messages": [{"role": "user", "content": [image, text]}],
        **fields,
    }
    return httpx.post(
        f"{url}/v1/chat/completions",
        json=body,
        headers=KEY_HEADER | ({"X-Pruning-Ratio": ratio} if ratio else {}),
        timeout=120,
    )


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text.strip()


def test_sizes_are_those_of_the_documentation(images: dict[str, float]) -> None:
    print(f"\nsizes in GB: {images}")
    assert images["vitcop-vllm:cpu"] < 5.6


def test_the_readme_s_question_is_answered(deployment: Deployment) -> None:
    answer = sign(deployment.url, "0.889")
    assert text_of(answer) == "JAM"
    usage = answer.json()["usage"]
    assert usage["visual_tokens"] == {"encoder": 576, "stages": [172, 77, 15]}
    assert text_of(sign(deployment.url)) == "JAM"


COMPILED: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "top_p": 0.5, "temperature": 0.1}
"""Fields for which vLLM compiles functions at their first use; the image has no compiler."""


def test_no_request_needs_a_compiler(deployment: Deployment) -> None:
    answer = sign(deployment.url, **COMPILED)
    assert text_of(answer) == "JAM"
    assert answer.json()["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}])
def test_the_key_is_needed(deployment: Deployment, header: dict[str, str]) -> None:
    assert httpx.get(f"{deployment.url}/v1/models", headers=header).status_code == 401


@pytest.mark.parametrize("path", ["/metrics", "/tokenize", "/docs", "/v1/../metrics"])
def test_internal_paths_are_not_published(deployment: Deployment, path: str) -> None:
    assert httpx.get(deployment.url + path).status_code == 404


def test_the_server_has_few_rights(deployment: Deployment) -> None:
    status = deployment.python("cpu", "print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapEff"], 16) == 0
    assert int(fields["CapBnd"], 16) == 1 << 23  # SYS_NICE
    written = "import pathlib; pathlib.Path('{}/x').write_text('x'); print('written')"
    for folder in ("/app", "/opt/venv", "/"):
        assert deployment.python("cpu", written.format(folder), check=False) == "", folder
    for folder in ("/tmp", "/run/metrics", "/cache/vllm", "/cache/huggingface"):
        assert deployment.python("cpu", written.format(folder)) == "written\n", folder


def test_the_server_s_only_network_is_internal(deployment: Deployment) -> None:
    identifier = deployment.state("cpu")["Id"]
    networks = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}"
    (network,) = docker("inspect", "--format", networks, identifier).split()
    assert docker("network", "inspect", "--format", "{{.Internal}}", network) == "true\n"


def test_the_server_comes_back(deployment: Deployment) -> None:
    """After its engine is killed, twice, and after a restart."""
    for restarts in (1, 2):
        times = deployment.come_back("cpu", lambda: deployment.kill("cpu", "VLLM::EngineCor"))
        print(
            "\nengine killed: container started after {:.0f} s, healthy {:.0f} s later".format(
                *times
            )
        )
        assert deployment.state("cpu")["RestartCount"] == restarts
        assert text_of(sign(deployment.url)) == "JAM"
    docker("restart", "--time", "60", deployment.state("cpu")["Id"])
    wait_until(lambda: deployment.is_healthy("cpu"), "healthy")
    assert text_of(sign(deployment.url)) == "JAM"


def test_a_stream_ends_before_the_server_stops(deployment: Deployment) -> None:
    started = threading.Event()
    seen: dict[str, Any] = {"events": 0, "reason": None}

    def stream() -> None:
        client = OpenAI(base_url=f"{deployment.url}/v1", api_key=KEY, max_retries=0)
        for event in client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "How many objects are there?"}],
            max_tokens=2000,
            extra_body={"ignore_eos": True},
            stream=True,
        ):
            seen["events"] += 1
            seen["reason"] = event.choices[0].finish_reason
            started.set()

    # Enough time for the answer on a slow machine, as docs/deploy.md describes.
    deployment.up("cpu", "proxy", ARGS="--shutdown-timeout 300")
    since = deployment.state("cpu")["StartedAt"]
    client = threading.Thread(target=stream)
    client.start()
    assert started.wait(60)
    deployment.compose("stop", "--timeout", "330", "cpu")
    client.join()
    assert seen["reason"] == "length"
    assert seen["events"] > 1000
    assert deployment.state("cpu")["ExitCode"] == 0
    log = deployment.log("cpu", since)
    assert "Traceback" not in log, log[-4000:]


def test_one_command_returns_to_stock_vllm(deployment: Deployment) -> None:
    deployment.up("cpu", "proxy", ARGS="--stock")
    answer = sign(deployment.url, "0.889")
    assert text_of(answer) == "JAM"
    assert answer.json()["usage"]["prompt_tokens"] > 576
    assert "visual_tokens" not in answer.json()["usage"]
    assert "X-Pruning-Ratio" not in answer.headers
    assert text_of(sign(deployment.url, pruning_ratio=0.889, **COMPILED)) == "JAM"
    assert sign(deployment.url, model="demo@0.889").status_code == 404
    plan = httpx.get(f"{deployment.url}/v1/pruning/plan?width=9&height=9", headers=KEY_HEADER)
    assert plan.status_code == 404
    deployment.up("cpu", "proxy")
    answer = sign(deployment.url, "0.889")
    assert "visual_tokens" in answer.json()["usage"]
