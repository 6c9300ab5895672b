"""Every test in this folder that uses an engine runs for each model family."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.serving import NO_PLUGIN
from tests.engine.requests import STOCK, Answer, generate_in_process
from tests.families.family import FAMILIES, Family
from tests.families.stock import IN_TURN, TOGETHER, WITH_RATIO, videos_of

if TYPE_CHECKING:
    from vllm import LLM

    from tests.engine.dense_oracle import DenseModel


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture(scope="session")
def checkpoint(family: Family, checkpoint_of: Callable[[Family], Path]) -> Path:
    return checkpoint_of(family)


@pytest.fixture(scope="session")
def llm(family: Family, engine_of: Callable[[Family], "LLM"]) -> "LLM":
    """The family's pruned engine, in this process."""
    return engine_of(family)


@pytest.fixture(scope="session")
def oracle(family: Family, checkpoint: Path) -> "DenseModel":
    return family.oracle_class()(checkpoint, family.boundaries)


@pytest.fixture(scope="session")
def stock_of(checkpoint_of: Callable[[Family], Path]) -> Callable[[Family], list[Answer]]:
    """Family -> answers of stock vLLM to all requests of ``stock.py``."""

    @cache
    def stock_of(family: Family) -> list[Answer]:
        together, in_turn = TOGETHER, [*IN_TURN, WITH_RATIO, *videos_of(family)]
        if not family.stock_ignores_ratio:
            together, in_turn = (
                [replace(spec, ratio=None) for spec in specs] for specs in (together, in_turn)
            )
        return generate_in_process(
            checkpoint_of(family),
            together,
            in_turn=in_turn,
            env=NO_PLUGIN,
            **STOCK | {"enable_prefix_caching": True},
        )

    return stock_of


@pytest.fixture(scope="session")
def stock(family: Family, stock_of: Callable[[Family], list[Answer]]) -> list[Answer]:
    """Answers of stock vLLM, in a child process, to ``TOGETHER``."""
    return stock_of(family)[: len(TOGETHER)]


@pytest.fixture(scope="session")
def stock_in_turn(family: Family, stock_of: Callable[[Family], list[Answer]]) -> list[Answer]:
    """Answers of the same stock engine to ``IN_TURN``, with prefix caching."""
    return stock_of(family)[len(TOGETHER) :][: len(IN_TURN)]


@pytest.fixture(scope="session")
def stock_with_ratio(family: Family, stock_of: Callable[[Family], list[Answer]]) -> Answer:
    """Answer of the same stock engine to ``WITH_RATIO``."""
    return stock_of(family)[len(TOGETHER) + len(IN_TURN)]


@pytest.fixture(scope="session")
def stock_videos(family: Family, stock_of: Callable[[Family], list[Answer]]) -> list[Answer]:
    """Answers of the same stock engine to ``videos_of`` the family."""
    return stock_of(family)[-len(videos_of(family)) :]
