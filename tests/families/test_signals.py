"""Every signal of Stages II and III, in a decoder that normalises keys."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.dense_oracle import assert_equals_oracle
from tests.engine.requests import Answer, RequestSpec, generate, generate_in_turn
from tests.engine.scheduling import engine_core
from tests.families.family import QWEN3_VL, Family
from vitcop_vllm.pruning.settings import SignalName
from vitcop_vllm.pruning.signals import SIGNALS

if TYPE_CHECKING:
    from vllm import LLM

REQUESTS = [
    RequestSpec("What is this?", (1,), 8 / 9),
    RequestSpec("Which of the three is thin?", (103, 101, 104), 2 / 3),
    RequestSpec("Describe it.", (2,), 0.2),
]


@pytest.fixture(params=SIGNALS)
def signal(request: pytest.FixtureRequest) -> SignalName:
    chosen: SignalName = request.param
    return chosen


@pytest.fixture
def llm_by(engine_of: Callable[[Family], "LLM"], signal: SignalName) -> Iterator["LLM"]:
    """The family's engine, ranking tokens by ``signal``: one engine for all signals."""
    # Imported late, because conftest.py must set the number of threads before torch is imported.
    from vitcop_vllm.models.staged_decoder import StagedDecoder

    llm = engine_of(QWEN3_VL)
    core = engine_core(llm)
    model: Any = core.model_executor.driver_worker.worker.model_runner.model
    before = model.staged_decoder
    model.staged_decoder = StagedDecoder(
        model.language_model.model,
        QWEN3_VL.boundaries,
        model.selector,
        model.kernels,
        SIGNALS[signal],
        core.vllm_config,
        model.num_deepstack_levels,
    )
    yield llm
    model.staged_decoder = before


def test_answers_equal_the_dense_oracle(
    llm_by: "LLM", signal: SignalName, checkpoint_of: Callable[[Family], Path]
) -> None:
    oracle = QWEN3_VL.oracle_class()(checkpoint_of(QWEN3_VL), QWEN3_VL.boundaries, signal=signal)
    for spec, answer in zip(REQUESTS, generate(llm_by, REQUESTS), strict=True):
        assert_equals_oracle(oracle, spec, answer)


def test_a_second_question_reuses_the_image_and_gets_the_answer_that_it_gets_alone(
    llm_by: "LLM",
) -> None:
    questions = [RequestSpec(text, (1,), 8 / 9) for text in ("What is it?", "Where is it, then?")]
    alone: list[Answer] = [generate(llm_by, [spec])[0] for spec in questions]
    _, second = generate_in_turn(llm_by, questions)
    assert second.reused >= QWEN3_VL.offset + QWEN3_VL.kept(8 / 9, 1)
    assert second.tokens == alone[1].tokens
    assert second.logprobs == [pytest.approx(step, abs=1e-4) for step in alone[1].logprobs]


def test_a_mixed_batch_gets_what_each_request_gets_alone(llm_by: "LLM") -> None:
    together = generate(llm_by, REQUESTS)
    for spec, answer in zip(REQUESTS, together, strict=True):
        (alone,) = generate(llm_by, [spec])
        assert answer.tokens == alone.tokens
        assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in alone.logprobs]
