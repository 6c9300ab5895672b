"""Fixtures shared by all tests. Engines and servers start slowly, so a session starts each once."""

import os

# Set before the first import of vLLM. In one process, tests can read scheduler and cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # overrides kv_cache_memory_bytes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.families.family import FAMILIES, LLAVA, Family, Saved
from tests.server.process import LITTLE_MEMORY, LOGS, TINY_OPTIONS, log_tail, running_server

# Timing decides no test.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

CONFIGS = Path(__file__).parents[1] / "configs"

if TYPE_CHECKING:
    from vllm import LLM


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak", "tests/soak")
    group.addoption(
        "--model",
        choices=(
            *("llava", "llava-next", "llava-onevision", "internvl"),
            *("qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "gemma3", "mistral3"),
        ),
        help="soak this model; default: llava and qwen2.5-vl, all with --full",
    )
    group.addoption("--full", action="store_true", help="all families in every test")
    group.addoption("--requests", type=int, help="requests that a soak sends; default: 150")
    group.addoption("--seed", type=int, default=0, help="of a soak's requests")
    group.addoption(
        "--deploy", type=int, metavar="ROUNDS", help="run tests/deploy, which needs a Docker engine"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Pin a parallel worker and its child processes to a share of the cores.

    Two engines on the same cores slow each other down: OpenMP threads spin at barriers.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return
    cores, number = sorted(os.sched_getaffinity(0)), int(worker["workerid"].removeprefix("gw"))
    own_cores = cores[number % len(cores) :: worker["workercount"]]
    os.sched_setaffinity(0, own_cores)
    os.environ["OMP_NUM_THREADS"] = str(len(own_cores))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own_cores))


_DECODER_TESTS = {"test_model_runner_v2", "test_compiled_segments"}

_MEMORY_TESTS = {"test_prefix_caching", "test_kv_blocks"}

SAME_AS_ANOTHER = {
    "llava_next": _DECODER_TESTS,
    "llava_onevision": {"test_tensor_parallel", *_DECODER_TESTS},
    "internvl": {*_DECODER_TESTS, *_MEMORY_TESTS},
    "internvl_chat": {"test_tensor_parallel", "test_model_runner_v2"},
    "qwen3_vl_moe": {"test_tensor_parallel", "test_model_runner_v2", "test_videos", *_MEMORY_TESTS},
    "qwen3_vl-compared": {"test_videos"},
    "qwen3_5_moe": {"test_ratio_zero_gives_the_answers_of_stock_vllm"},
}
"""Family, with a case of it -> tests, or files of tests, that run the same code as another case."""

ENGINES = ("engine/", "families/", "worker/", "benchmarks/test_bench.py")
"""Files that use LLaVA's engine in the tests' process, or child processes that end with a test."""

OTHER_ENGINES = {
    "families/test_signals.py": "qwen3_vl",
    "families/test_stage_one.py": "families of Stage I alone",
    "families/test_quantised.py": "no engine",
    "soak/": "soak",
}
"""Files that use another engine, or their own."""

OTHER_FAMILIES = {family.name for family in FAMILIES} - {LLAVA.name}

SERVERS = (
    "server/",
    "demo/test_model.py",
    "docker/test_dashboard.py",
    "docker/test_proxy.py",
    "benchmarks/test_traffic.py",
    "evaluation/test_evaluate.py",
    "benchmarks/test_serving.py",
)
"""Files that use the session's servers."""

WITHOUT_SERVER = tuple(
    f"server/{name}.py"
    for name in (
        *("calibrate/test_agreement", "calibrate/test_bounds", "calibrate/test_calibrate"),
        *("calibrate/test_folder", "calibrate/test_search", "calibrate/test_state"),
        *("page/test_grids", "test_arguments", "test_data_urls", "test_error_shape"),
        *("test_fields", "test_first_event", "test_formats", "test_image_cache", "test_media"),
        *("test_middleware", "test_pixels", "test_preview", "test_serving", "test_stopping"),
        "test_usage",
    )
)
"""Files below ``SERVERS`` that use no server."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run soaks last: the end of a soak's engine ends the process groups of all engines here.

    In parallel runs, few tests are in a group of their own, and such groups are run last.

    Without ``--full``, skip tests that take minutes and run the same code for another family.
    """
    items.sort(key=lambda item: "tests/soak/" in item.nodeid)
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="runs the same code as another test; --full runs it too")
    for item in items:
        test, _, parameters = item.name.rstrip("]").partition("[")
        if any(
            {item.path.stem, test} & same and {*case.split("-")} <= {*parameters.split("-")}
            for case, same in SAME_AS_ANOTHER.items()
        ):
            item.add_marker(skip)


class SharedProcesses(LoadScopeScheduling):
    """Runs tests of one engine on one worker, those of servers on one, other files on any.

    Two copies of the shared engines and servers do not fit into a small machine's memory.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.removeprefix("tests/").partition("::")[0]
        if file in WITHOUT_SERVER:
            return file
        for begin, scope in OTHER_ENGINES.items():
            if file.startswith(begin):
                return scope
        parameters = set(nodeid.partition("[")[2].rstrip("]").split("-"))
        if file.startswith("families/") and (others := parameters & OTHER_FAMILIES):
            return others.pop()
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
    """Add the servers' logs to the report of a failed test."""
    report = yield
    if report.failed:
        report.sections += [("Log of a server", log_tail(log)) for log in LOGS]
    return report


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Saved], Path]:
    """Family -> its tiny random checkpoint, written once."""

    @cache
    def checkpoint_of(family: Saved) -> Path:
        path = tmp_path_factory.mktemp(f"tiny-{family.name}")
        family.save(path)
        return path

    return checkpoint_of


@pytest.fixture(scope="session")
def engine_of(checkpoint_of: Callable[[Saved], Path]) -> "Callable[[Saved], LLM]":
    """Family -> its pruned engine, built with ``LLM`` in this process."""

    @cache
    def engine_of(family: Saved) -> "LLM":
        from vllm import LLM
        from vllm.distributed import parallel_state

        # vLLM makes its groups with a process's first engine, and the group of expert
        # parallelism only if that is an MoE model. With one rank all groups are the same.
        parallel_state._EP = parallel_state._TP
        return LLM(str(checkpoint_of(family)), disable_log_stats=False, **family.options)

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
    """Base URL of ``vitcop-serve`` with the tiny LLaVA."""
    with running_server(str(checkpoint), *TINY_OPTIONS) as (url, _):
        yield url


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """Base URL of the server that `make serve` starts: the demo model, with explanations."""
    config = ("--config", str(CONFIGS / "demo-cpu.yaml"))
    with running_server(*config, *LITTLE_MEMORY, forks=False) as (url, _):
        yield url
