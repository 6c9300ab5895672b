"""Engines and servers are slow to start: each is shared by the whole session."""

import os

# Before vLLM is imported anywhere. One process lets tests look into scheduler and cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engine.requests import ENGINE_OPTIONS
from tests.server.process import running_server
from vitcop_vllm.demo.checkpoint import TINY

CONFIGS = Path(__file__).parents[1] / "configs"

if TYPE_CHECKING:
    from vllm import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-1.5: 256 visual tokens, 8 decoder layers, grouped-query heads."""
    from vitcop_vllm.demo.checkpoint import save_random_llava

    path = tmp_path_factory.mktemp("tiny-llava")
    save_random_llava(path, TINY)
    return path


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> "LLM":
    """The pruned engine, in this process, as a user of ``LLM`` gets it."""
    from vllm import LLM

    return LLM(str(checkpoint), disable_log_stats=False, **ENGINE_OPTIONS)


@pytest.fixture(scope="session")
def server_url(checkpoint: Path) -> Iterator[str]:
    """Base URL of ``python -m server`` with the tiny model, as an operator starts it."""
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    with running_server(str(checkpoint), *options) as (url, _):
        yield url


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """Base URL of what `make serve` starts: the demo model, with explanations."""
    with running_server("--config", str(CONFIGS / "demo-cpu.yaml")) as (url, _):
        yield url
