"""Every selector end to end: the engine's answers equal a dense forward in plain PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.dense_oracle import DenseLlava, assert_equals_oracle
from tests.engine.requests import (
    ENGINE_OPTIONS,
    IMAGE_TOKEN,
    RequestSpec,
    generate,
    generate_in_process,
    sample_image,
)
from tests.engine.scheduling import free_blocks, start
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.demo.checkpoint import TINY
from vitcop_vllm.models.staged_decoder import StagedDecoder
from vitcop_vllm.pruning.plan import plan_counts
from vitcop_vllm.pruning.settings import CONFIG_KEY, SELECTOR_NAMES, PruningSettings, SelectorName
from vitcop_vllm.pruning.signals import SIGNALS

SHALLOW, _ = BOUNDARIES = PruningSettings().boundaries(TINY.layers)
LIMIT = 1 - SHALLOW / TINY.layers
OTHERS = [name for name in SELECTOR_NAMES if name != "vitcop"]
READERS = [name for name in OTHERS if SELECTORS[name].reads_question]

# A prompt of four images is all that a step can hold.
LONGEST = 1200

ASKS = [
    RequestSpec("What is this?", (1,), 0.5, max_tokens=6),
    RequestSpec("Which is larger, first or second?", (2, 3), 0.8, max_tokens=6),
    RequestSpec("A question of some length " * 3, (4,), LIMIT, max_tokens=4),
    RequestSpec("first or second?", (3, 2), 0.1, max_tokens=4),
    RequestSpec("the same images again", (2, 3), 0.8, max_tokens=4),
    RequestSpec("unpruned", (4,), 0.0, max_tokens=6),
    RequestSpec("no image, " * 20),
    RequestSpec("seeded", (5,), 0.8, sampling={"temperature": 1.0, "seed": 7}),
]


def settings_with(selector: str) -> PruningSettings:
    return PruningSettings.model_validate({"selector": selector, "max_pruning_ratio": LIMIT})


STARTED_AS: SelectorName = "fastv"
OPTIONS: dict[str, Any] = {
    **ENGINE_OPTIONS,
    "max_model_len": LONGEST,
    "max_num_batched_tokens": LONGEST,
    "additional_config": {"pruning": settings_with(STARTED_AS).model_dump(mode="json")},
}


@pytest.fixture(scope="session")
def engine(checkpoint) -> Any:
    """Kept to the end: with it would go the process groups of every engine in this process."""
    from vllm import LLM

    return LLM(str(checkpoint), **OPTIONS)


@pytest.fixture
def llm_with(engine) -> Iterator[Callable[[str], Any]]:
    """The engine with a selector. One engine for all: what start-up settles, put elsewhere."""
    core = engine.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    processor = engine.llm_engine.renderer.mm_processor
    assert model.pruning == processor.info.settings

    def llm_with(selector: str) -> Any:
        settings = settings_with(selector)
        row = SELECTORS[settings.selector]
        setattr(model.config, CONFIG_KEY, settings.model_dump(mode="json"))
        model._set_up_stage_one(core.vllm_config, model.columns.width)
        vars(processor.info)["settings"] = settings
        core.scheduler._reads_question = row.reads_question
        decoder = model.language_model.model
        model.staged_decoder = StagedDecoder(
            decoder, BOUNDARIES, row, model.kernels, SIGNALS["keys"], core.vllm_config
        )
        # Equal counts of another selector would hit.
        core.reset_encoder_cache()
        return engine

    yield llm_with
    llm_with(STARTED_AS)


def test_the_engine_starts_with_the_selector_of_its_settings(engine):
    core = engine.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    assert model.selector is SELECTORS[STARTED_AS]
    assert core.scheduler._reads_question
    assert engine.llm_engine.renderer.mm_processor.info.settings.selector == STARTED_AS


@pytest.mark.parametrize("selector", OTHERS)
def test_answers_of_a_mixed_batch_equal_the_dense_oracle(llm_with, checkpoint, selector):
    settings = settings_with(selector)
    oracle = DenseLlava(checkpoint, BOUNDARIES, selector=selector)
    for ask, answer in zip(ASKS, generate(llm_with(selector), ASKS), strict=True):
        if ask.images:
            assert_equals_oracle(oracle, ask, answer, settings)


@pytest.mark.parametrize("selector", OTHERS)
def test_a_request_alone_gets_the_answer_of_the_batch(llm_with, selector):
    llm = llm_with(selector)
    alone = [generate(llm, [ask])[0].tokens for ask in ASKS]
    # Whatever the encoder has kept would hide another choice.
    llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
    together = generate(llm, [*reversed(ASKS), *ASKS])
    assert [answer.tokens for answer in together] == [*reversed(alone), *alone]


def test_selectors_choose_differently(llm_with):
    """Else one would stand for all of them above."""
    ask = replace(ASKS[0], ratio=0.8)
    answers = {s: generate(llm_with(s), [ask])[0].logprobs[0] for s in ("vitcop", *OTHERS)}
    assert len({str(logprobs) for logprobs in answers.values()}) == len(answers)


@pytest.mark.parametrize("selector", OTHERS)
def test_the_prompt_holds_what_the_encoder_keeps(llm_with, selector):
    (answer,) = generate(llm_with(selector), [ASKS[1]])
    counts = plan_counts(settings_with(selector), 0.8, TINY.layers, TINY.visual_tokens)
    assert answer.prompt.count(IMAGE_TOKEN) == 2 * counts.stages[0]


# Selectors that read the question.


@contextmanager
def recorded_chunks(scheduler) -> Iterator[list[tuple[str, int, int]]]:
    """(request, tokens before, tokens after) of every chunk scheduled."""
    seen = []
    schedule = scheduler.schedule

    def recording(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            after = scheduler.requests[name].num_computed_tokens
            seen.append((name, after - count, after))
        return output

    scheduler.schedule = recording
    try:
        yield seen
    finally:
        del scheduler.schedule


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.mark.parametrize("selector", READERS)
def test_a_prompt_that_is_read_is_never_split(llm_with, selector):
    llm = llm_with(selector)
    scheduler = scheduler_of(llm)
    asks = [
        RequestSpec("x" * (19 * i), tuple(range(i, i + 1 + i % 4)), ratio, max_tokens=6)
        for i, ratio in enumerate([0.5, LIMIT, 0.3, 0.8, 0.5, 0.7, 0.4, 0.6])
    ]
    text = RequestSpec("t" * (LONGEST - 100), max_tokens=20)
    prompts: dict[str, int] = {}
    update_plan = scheduler._update_plan

    def recording(request):
        update_plan(request)
        if request.request_id in scheduler.plans:
            prompts[request.request_id] = request.num_prompt_tokens

    scheduler._update_plan = recording
    try:
        with recorded_chunks(scheduler) as chunks:
            generate(llm, [text, *asks, text])
    finally:
        del scheduler._update_plan
    assert len(prompts) == len(asks)
    split = 0
    for name, before, after in chunks:
        if name in prompts:
            assert not 0 < before < prompts[name]
            assert not 0 < after < prompts[name]
        else:
            split += after < LONGEST - 100
    assert split > 0, "no other prompt was split either: nothing was tested"


@pytest.mark.parametrize("selector", READERS)
def test_after_preemption_the_prompt_s_last_token_is_the_same(llm_with, selector):
    llm = llm_with(selector)
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    asks = [
        RequestSpec(
            "Count the " + "very " * i + "small things.", (i, i + 1)[: 1 + i % 2], ratio, 10
        )
        for i, ratio in enumerate([0.8, 0.5, 0.7, LIMIT], start=1)
    ]
    alone = [generate(llm, [ask])[0].tokens for ask in asks]
    free = free_blocks(scheduler)
    with recorded_chunks(scheduler) as chunks:
        for i, ask in enumerate(asks):
            start(core, str(i), ask)
        while any(len(r.output_token_ids) < 4 for r in scheduler.requests.values()):
            core.step()
        prompts = [request.num_prompt_tokens for request in scheduler.requests.values()]
        scheduler.reset_prefix_cache(reset_running_requests=True)
        together = {}
        while core.has_unfinished_requests():
            for output in core.step():
                together[output.request_id] = list(output.outputs[0].token_ids)
    # Computed with its prompt: what a resumed request had answered already.
    resumed = [(name, after) for name, before, after in chunks if before == 0][len(asks) :]
    assert len(resumed) == len(asks)
    assert all(after > prompt for (_, after), prompt in zip(resumed, prompts, strict=True))
    assert [together[str(i)] for i in range(len(asks))] == alone
    assert free_blocks(scheduler) == free


@pytest.mark.parametrize("selector", READERS)
def test_the_choice_depends_on_the_question(llm_with, checkpoint, selector):
    """And on nothing else would the oracle agree: it is shown another last token."""
    ask = RequestSpec("What is this?", (1,), 0.8, max_tokens=1)
    (answer,) = generate(llm_with(selector), [ask])
    counts = plan_counts(settings_with(selector), 0.8, TINY.layers, TINY.visual_tokens)
    oracle = DenseLlava(checkpoint, BOUNDARIES, selector=selector)
    whole = len(answer.prompt)
    right, wrong = (
        oracle.logits(answer.prompt, [sample_image(1)], [counts], length)[-1].log_softmax(-1)
        for length in (whole, whole - 8)
    )
    got = answer.logprobs[0]
    assert all(abs(got[token] - float(right[token])) < 1e-3 for token in got)
    assert any(abs(got[token] - float(wrong[token])) > 1e-2 for token in got)


def test_two_ranks_select_the_tokens_of_one_rank(llm_with, checkpoint):
    asks = ASKS[:3]
    two = generate_in_process(
        checkpoint,
        asks,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        **OPTIONS | {"tensor_parallel_size": 2},
    )
    one = generate(llm_with(STARTED_AS), asks)
    assert [answer.tokens for answer in two] == [answer.tokens for answer in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.logprobs == [pytest.approx(step, abs=1e-3) for step in theirs.logprobs]
