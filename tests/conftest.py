"""Engines and servers are slow to start: each is shared by the whole session."""

import os

# Before vLLM is imported anywhere. One process lets tests look into scheduler and cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over what each engine is given
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.engine.requests import ENGINE_OPTIONS
from tests.families.family import LLAVA, Family
from tests.server.process import LITTLE_MEMORY, LOGS, TINY_OPTIONS, last_words, running_server

CONFIGS = Path(__file__).parents[1] / "configs"

if TYPE_CHECKING:
    from vllm import LLM


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak", "tests/soak")
    group.addoption("--model", choices=("llava", "qwen2.5-vl"), help="soak this one; default: both")
    group.addoption("--requests", type=int, help="requests that a soak sends; default: 150")
    group.addoption("--seed", type=int, default=0, help="of a soak's requests")


def pytest_configure(config: pytest.Config) -> None:
    """Keep a parallel worker, and what it starts, on its share of the cores.

    Threads of two engines on the same cores wait for each other: OpenMP's spin at barriers.
    """
    told = getattr(config, "workerinput", None)
    if told is None:
        return
    cores, number = sorted(os.sched_getaffinity(0)), int(told["workerid"].removeprefix("gw"))
    mine = cores[number % len(cores) :: told["workercount"]]
    os.sched_setaffinity(0, mine)
    os.environ["OMP_NUM_THREADS"] = str(len(mine))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, mine))


ENGINES = ("engine/", "families/", "worker/", "soak/", "benchmarks/test_bench.py")
"""Where engines in the tests' own process are used, or processes that end with a test."""

SERVERS = (
    "server/",
    "demo/test_model.py",
    "docker/test_dashboard.py",
    "docker/test_proxy.py",
    "benchmarks/test_bench_http.py",
    "evaluation/test_evaluate.py",
    "benchmarks/test_serving.py",
)
"""Where servers are used that a session shares."""

ALONE = tuple(
    f"server/{name}.py"
    for name in (
        *("page/test_grids", "test_arguments", "test_data_urls", "test_error_shape"),
        *("test_fields", "test_formats", "test_image_cache", "test_media", "test_middleware"),
        *("test_pixels", "test_preview", "test_serving", "test_usage"),
    )
)
"""Among them, files that use none."""


class SharedProcesses(LoadScopeScheduling):
    """Tests with engines to one worker, those with servers to another, the rest to who is free.

    Two copies of what a session shares would not fit into a small machine's memory.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.removeprefix("tests/").partition("::")[0]
        if file in ALONE:
            return file
        for scope, files in (("engines", ENGINES), ("servers", SERVERS)):
            if file.startswith(files):
                return scope
        return file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedProcesses:
    return SharedProcesses(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that fails what the servers said."""
    report = yield
    if report.failed:
        report.sections += [("Log of a server", last_words(log)) for log in LOGS]
    return report


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """A tiny random model of a family."""

    @cache
    def checkpoint_of(family: Family) -> Path:
        path = tmp_path_factory.mktemp(f"tiny-{family.name}")
        family.save(path)
        return path

    return checkpoint_of


@pytest.fixture(scope="session")
def engine_of(checkpoint_of: Callable[[Family], Path]) -> "Callable[[Family], LLM]":
    """The pruned engine of a family, in this process, as a user of ``LLM`` gets it."""

    @cache
    def engine_of(family: Family) -> "LLM":
        from vllm import LLM

        return LLM(str(checkpoint_of(family)), disable_log_stats=False, **ENGINE_OPTIONS)

    return engine_of


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[[Family], Path]) -> Path:
    """A tiny random LLaVA-1.5: 256 visual tokens, 8 decoder layers, grouped-query heads."""
    return checkpoint_of(LLAVA)


@pytest.fixture(scope="session")
def llm(engine_of: "Callable[[Family], LLM]") -> "LLM":
    """The pruned engine of the tiny LLaVA."""
    return engine_of(LLAVA)


@pytest.fixture(scope="session")
def server_url(checkpoint: Path) -> Iterator[str]:
    """Base URL of ``vitcop-serve`` with the tiny model, as an operator starts it."""
    with running_server(str(checkpoint), *TINY_OPTIONS) as (url, _):
        yield url


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """Base URL of what `make serve` starts: the demo model, with explanations."""
    with running_server("--config", str(CONFIGS / "demo-cpu.yaml"), *LITTLE_MEMORY) as (url, _):
        yield url
