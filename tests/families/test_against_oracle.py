"""Answers to pruned requests equal the dense oracle's."""

from dataclasses import replace

import pytest

from tests.engine.dense_oracle import assert_equals_oracle
from tests.engine.requests import Answer, RequestSpec, generate, model_type, sample_image
from tests.engine.scheduling import engine_core, recorded_ends

RATIOS = (2 / 3, 7 / 9, 8 / 9, 0.2)
"""At 0.2, Stages I and III drop tokens and Stage II merges nothing."""

REQUESTS = [
    RequestSpec("What is this?", (1,)),
    RequestSpec("Describe the image in one word.", (2,), max_tokens=12),
    RequestSpec("Which is larger, first or second?", (3, 4)),
]

MIXED_SIZES = [
    RequestSpec("A strip: what is on it?", (101,)),
    RequestSpec("A strip that stands", (102,), max_tokens=4),
    RequestSpec("Which of the three is thin?", (103, 101, 104)),
    RequestSpec("A large one beside a strip", (105, 102), max_tokens=5),
]


def assert_equal(oracle, specs: list[RequestSpec], answers: list[Answer]) -> None:
    for spec, answer in zip(specs, answers, strict=True):
        assert_equals_oracle(oracle, spec, answer)


@pytest.mark.parametrize("ratio", RATIOS)
def test_pruned_tokens_equal_the_dense_oracle(llm, oracle, ratio):
    specs = [replace(spec, ratio=ratio) for spec in (*REQUESTS, *MIXED_SIZES)]
    assert_equal(oracle, specs, generate(llm, specs))


@pytest.mark.parametrize("ratio", RATIOS)
def test_prompt_holds_one_placeholder_per_token_that_stage_one_keeps(family, llm, ratio):
    specs = [replace(spec, ratio=ratio, max_tokens=1) for spec in (*REQUESTS, *MIXED_SIZES)]
    for spec, answer in zip(specs, generate(llm, specs), strict=True):
        assert answer.prompt.count(family.image_token) == family.kept(ratio, *spec.images)


def test_a_prompt_may_end_with_its_image(family, llm, oracle):
    """The first answer token then comes from the image's last kept token."""
    from vllm import SamplingParams

    (output,) = llm.generate(
        {
            "prompt": f"USER: look: {family.opening}",
            "multi_modal_data": {"image": [sample_image(9)]},
            "mm_processor_kwargs": {"pruning_ratio": 8 / 9},
        },
        SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True),
        use_tqdm=False,
    )
    answer = Answer(
        list(output.prompt_token_ids),
        list(output.outputs[0].token_ids),
        [{t: e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs],
    )
    assert answer.prompt[-1] == family.last_token
    assert_equals_oracle(oracle, RequestSpec("", (9,), 8 / 9), answer)


@pytest.mark.parametrize("edge", ["begins", "ends", "is cut"])
def test_a_step_may_end_where_a_span_does(family, llm, oracle, monkeypatch, edge):
    """A step that would end inside a span ends before it."""
    scheduler = engine_core(llm).scheduler
    budget = scheduler.max_num_scheduled_tokens
    kept = family.kept(2 / 3, 105)
    before = {"begins": budget, "ends": budget - kept, "is cut": budget - kept // 2}[edge]
    spec = RequestSpec("What is it?", (105, 101), 2 / 3, system="x" * (before - family.offset))
    ends = recorded_ends(scheduler, monkeypatch)
    (answer,) = generate(llm, [spec])
    assert answer.prompt[before] == family.image_token != answer.prompt[before - 1]
    assert ends[0] == before + (kept if edge == "ends" else 0)
    assert_equals_oracle(oracle, spec, answer)


def test_the_checkpoint_is_of_the_family(family, llm):
    assert model_type(llm) == family.name
