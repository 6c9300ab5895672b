"""Models that Stage I alone prunes: their decoder, KV cache and scheduler are vLLM's own."""

from collections.abc import Callable
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.serving import NO_PLUGIN
from tests.engine.requests import (
    Answer,
    RequestSpec,
    generate,
    generate_in_process,
    generate_in_turn,
    sample_image,
)
from tests.engine.scheduling import engine_core
from tests.families.stage_one_family import GEMMA3, STAGE_ONE_FAMILIES, StageOneFamily
from tests.families.test_explain import explained
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

if TYPE_CHECKING:
    from vllm import LLM

    from tests.families.stage_one_oracle import StageOneOracle

RATIOS = (0.5, 2 / 3, 8 / 9)

QUESTIONS = [
    RequestSpec("What is this?", (1,), max_tokens=24),
    RequestSpec("Which is larger, first or second?", (3, 101), max_tokens=24),
    RequestSpec("A strip that stands", (102,), max_tokens=24),
]

UNPRUNED = [
    RequestSpec("What is this?", (1,), 0.0, max_tokens=24),
    RequestSpec("Compare the two images, please.", (3, 101), 0.0, max_tokens=24),
    RequestSpec("And without a ratio?", (5,), max_tokens=24),
    RequestSpec("No image at all.", max_tokens=24),
]


@pytest.fixture(scope="module", params=STAGE_ONE_FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> StageOneFamily:
    chosen: StageOneFamily = request.param
    return chosen


@pytest.fixture(scope="module")
def checkpoint(family: StageOneFamily, checkpoint_of: Callable[[StageOneFamily], Path]) -> Path:
    return checkpoint_of(family)


@pytest.fixture(scope="module")
def llm(family: StageOneFamily, engine_of: Callable[[StageOneFamily], "LLM"]) -> "LLM":
    """Kept to the end of the session: with it would go the process groups of other engines."""
    return engine_of(family)


@pytest.fixture(scope="module")
def oracle(family: StageOneFamily, checkpoint: Path) -> "StageOneOracle":
    module = import_module("tests.families.stage_one_oracle")
    model: StageOneOracle = getattr(module, family.oracle)(checkpoint)
    return model


def counts_of(
    family: StageOneFamily, oracle: "StageOneOracle", spec: RequestSpec
) -> list[VisualTokenCounts]:
    settings = PruningSettings(selector="received")
    tokens = [oracle.visual_tokens(sample_image(seed)) for seed in spec.images]
    return [plan_counts(settings, spec.ratio or 0.0, family.layers, n) for n in tokens]


def differences(
    family: StageOneFamily,
    oracle: "StageOneOracle",
    spec: RequestSpec,
    answer: Answer,
    chosen: list[list[int]] | None = None,
) -> list[float]:
    """Differences of the answer's log-probabilities from the oracle's."""
    logits = oracle.logits(
        answer.prompt + answer.tokens[:-1],
        [sample_image(seed) for seed in spec.images],
        counts_of(family, oracle, spec),
        len(answer.prompt),
        chosen,
    )
    expected = logits.log_softmax(-1)
    return [
        abs(logprob - float(expected[step, token]))
        for step, entries in enumerate(answer.logprobs)
        for token, logprob in entries.items()
    ]


def test_ratio_zero_gives_the_answers_of_stock_vllm(
    family: StageOneFamily, llm: "LLM", checkpoint: Path
) -> None:
    stock = generate_in_process(checkpoint, UNPRUNED, env=NO_PLUGIN, **stock_options(family))
    answers = generate(llm, UNPRUNED)
    assert family.row_mark is None or family.row_mark in answers[0].prompt
    assert [answer.prompt for answer in answers] == [answer.prompt for answer in stock]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in stock]
    assert len({tuple(answer.tokens) for answer in stock}) == len(stock)


def stock_options(family: StageOneFamily) -> dict[str, Any]:
    return {"block_size": None, **family.options} | {"max_num_batched_tokens": 4096}


@pytest.mark.parametrize("ratio", RATIOS)
def test_pruned_answers_equal_the_oracle(
    family: StageOneFamily, llm: "LLM", oracle: "StageOneOracle", ratio: float
) -> None:
    for number, question in enumerate(QUESTIONS):
        spec = RequestSpec(question.text, question.images, ratio, question.max_tokens)
        (answer,) = generate(llm, [spec])
        counts = counts_of(family, oracle, spec)
        assert answer.prompt.count(family.image_token) == sum(n.stages[0] for n in counts)
        assert family.row_mark not in answer.prompt
        prompt, records = explained(llm, spec, f"r{number}")
        assert prompt == answer.prompt
        chosen = [record["patches"] for record in records]
        for seed, record, count in zip(spec.images, records, counts, strict=True):
            _, received = oracle.encode(sample_image(seed))
            assert record["saliency"] == pytest.approx(received.tolist(), rel=0.05, abs=1e-4)
            ranked = sorted(range(count.encoder), key=lambda i: (-record["saliency"][i], i))
            assert record["patches"] == sorted(ranked[: count.stages[0]])
        right = differences(family, oracle, spec, answer, chosen)
        assert mean(right) < family.tolerance
        assert max(right) < family.largest
        # The tolerance tells other tokens from the kept ones.
        others = [sorted(range(len(kept))) for kept in chosen]
        assert mean(differences(family, oracle, spec, answer, others)) > family.tolerance


def test_a_mixed_batch_gets_what_each_request_gets_alone(llm: "LLM") -> None:
    specs = [
        RequestSpec(question.text, question.images, ratio)
        for question, ratio in zip(QUESTIONS, (8 / 9, 0.0, 0.5), strict=True)
    ]
    together = generate(llm, [*specs, UNPRUNED[-1]])
    for spec, answer in zip([*specs, UNPRUNED[-1]], together, strict=True):
        (alone,) = generate(llm, [spec])
        assert answer.tokens == alone.tokens
        assert answer.prompt == alone.prompt


def test_a_second_question_gets_the_answer_that_it_gets_alone(
    family: StageOneFamily, llm: "LLM"
) -> None:
    block = llm.llm_engine.vllm_config.cache_config.block_size
    system = "x" * 40
    questions = [
        RequestSpec("What is it? " + "Well? " * (block // 4) + end, (1,), 0.5, system=system)
        for end in ("Now.", "Or not?")
    ]
    alone = [generate(llm, [spec])[0] for spec in questions]
    first, second = generate_in_turn(llm, questions)
    assert first.tokens == alone[0].tokens
    assert second.tokens == alone[1].tokens
    end = max(i for i, token in enumerate(second.prompt) if token == family.image_token)
    both = zip(first.prompt, second.prompt, strict=False)
    common = len(list(takewhile(lambda tokens: tokens[0] == tokens[1], both)))
    assert second.reused == common // block * block > end
    (other,) = generate(
        llm, [RequestSpec(questions[1].text, (1,), 8 / 9, system=system)], reuse=True
    )
    assert other.reused < end, "another ratio reuses nothing of the image"


def test_scheduler_and_kv_cache_are_vllm_s(llm: "LLM") -> None:
    core = engine_core(llm)
    assert type(core.scheduler).__module__.startswith("vllm.")
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert all(type(manager).__module__.startswith("vllm.") for manager in managers)


def expect_the_same(answers: list[Answer], expected: list[Answer], tolerance: float) -> None:
    for answer, other in zip(answers, expected, strict=True):
        assert answer.prompt == other.prompt
        assert answer.tokens == other.tokens
        assert answer.logprobs == [pytest.approx(step, abs=tolerance) for step in other.logprobs]


MIXED = [
    *(RequestSpec(q.text, q.images, ratio) for q, ratio in zip(QUESTIONS, RATIOS, strict=True)),
    *UNPRUNED[-2:],
]


@pytest.mark.slow
def test_a_compiled_decoder_gives_the_same_answers(
    engine_of: Callable[[StageOneFamily], "LLM"], compiled_gemma3: "LLM"
) -> None:
    worker = engine_core(compiled_gemma3).model_executor.driver_worker.worker
    decoder = worker.model_runner.get_model().language_model.model
    assert not decoder.do_not_compile
    assert decoder.compiled
    expected = generate(engine_of(GEMMA3), MIXED)
    expect_the_same(generate(compiled_gemma3, MIXED), expected, 1e-4)


@pytest.fixture(scope="session")
def compiled_gemma3(checkpoint_of: Callable[[StageOneFamily], Path]) -> "LLM":
    """Kept to the end of the session, like all engines."""
    from vllm import LLM
    from vllm.config import CompilationMode

    # The eager backend skips the generation of C++ code, which would take minutes.
    compilation = {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"}
    options = GEMMA3.options | {"enforce_eager": False, "compilation_config": compilation}
    return LLM(str(checkpoint_of(GEMMA3)), **options)


@pytest.mark.slow
def test_two_ranks_give_the_answers_of_one_rank(
    checkpoint_of: Callable[[StageOneFamily], Path], engine_of: Callable[[StageOneFamily], "LLM"]
) -> None:
    two = generate_in_process(
        checkpoint_of(GEMMA3),
        MIXED,
        tensor_parallel_size=2,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    # Sums over ranks round differently. Another selection would change the values by more.
    expect_the_same(two, generate(engine_of(GEMMA3), MIXED), 1e-3)
