"""Videos are pruned frame by frame, exactly, and a step or a prefix hit may end after any frame.

All tests also run with ``compare_frames``: the first frame then keeps more tokens than the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, count
from math import ceil

import pytest

from tests.engine.comparing import comparing_frames
from tests.engine.dense_oracle import assert_equals_oracle
from tests.engine.requests import BLOCK, Answer, RequestSpec, generate, generate_in_turn
from tests.engine.scheduling import (
    decoding_steps,
    engine_core,
    recorded_ends,
    start,
    tokens_after_preemption,
)
from tests.families.family import LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, Family
from tests.families.stock import VIDEOS, videos_of
from tests.families.test_prefix_caching import blocks_of, generate_with_cache
from vitcop_vllm.pruning.plan import VisualTokenCounts

CASES = [
    (family, compares)
    for family in (QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, LLAVA_ONEVISION)
    for compares in (0, 1)
]

# Not a fixture `family`: engines of other files' family would stay the fixture `llm`.
pytestmark = pytest.mark.parametrize(
    ("family", "compares"),
    CASES,
    ids=[family.name + "-compared" * compares for family, compares in CASES],
    indirect=["family"],
)

RATIOS = (2 / 3, 8 / 9, 0.2)

REQUESTS = [
    RequestSpec("What happens?", videos=(1,)),
    RequestSpec("Which one is longer?", videos=(2, 3), max_tokens=5),
    RequestSpec("Is the image part of the video?", (1, 101), videos=(5, 1), order="vivi"),
    RequestSpec("A long one", videos=(4,), max_tokens=4),
]


PlanOf = Callable[[float, int], list[VisualTokenCounts]]
"""Ratio and video -> counts of each frame."""


@pytest.fixture
def plan_of(family: Family, compares: int) -> PlanOf:
    return lambda ratio, video: family.video(ratio, video, compares=bool(compares))


@pytest.fixture(autouse=True)
def compared(llm, oracle, compares) -> Iterator[None]:
    """Engine and oracle compare frames, or do not."""
    with comparing_frames(llm, bool(compares)), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(oracle, "compares_frames", bool(compares))
        yield


def at(spec: RequestSpec, ratio: float) -> RequestSpec:
    return RequestSpec(**{**vars(spec), "ratio": ratio})


def kept(frames: list[VisualTokenCounts]) -> list[int]:
    """n1 of each frame."""
    return [counts.stages[0] for counts in frames]


def frame_starts(family: Family, answer: Answer, frames: list[VisualTokenCounts]) -> list[int]:
    """Prompt positions at which frames begin, of a prompt with one video only."""
    tokens = [i for i, token in enumerate(answer.prompt) if token == family.video_token]
    *starts, end = accumulate(kept(frames), initial=0)
    assert end + family.video_tail == len(tokens)
    return [tokens[start] for start in starts]


def inside_frames(starts: list[int], frames: list[VisualTokenCounts]) -> set[int]:
    """Prompt positions after the first token of a frame, up to the last."""
    return {first + i for first, n1 in zip(starts, kept(frames), strict=True) for i in range(1, n1)}


def test_ratio_zero_gives_the_answers_of_stock_vllm(family, llm, stock_videos):
    for spec, expected in zip(videos_of(family), stock_videos, strict=True):
        (answer,) = generate(llm, [spec])
        assert answer == expected or answer.tokens == expected.tokens
        assert answer.prompt == expected.prompt
        assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in expected.logprobs]
    assert len({tuple(answer.tokens) for answer in stock_videos}) == len(VIDEOS)


def test_the_unpruned_dense_oracle_equals_stock_vllm(family, oracle, stock_videos):
    for spec, answer in zip(videos_of(family), stock_videos, strict=True):
        assert_equals_oracle(oracle, at(spec, 0.0), answer)


def test_unpruned_videos_of_different_lengths_equal_the_dense_oracle(family, llm, oracle):
    """Some stock vLLMs cannot encode these together."""
    spec = at(REQUESTS[1], 0.0)
    assert_equals_oracle(oracle, spec, generate(llm, [spec])[0])


@pytest.mark.parametrize("ratio", RATIOS)
def test_pruned_videos_equal_the_dense_oracle(family, llm, oracle, plan_of, ratio):
    specs = [at(spec, ratio) for spec in REQUESTS]
    for spec, answer in zip(specs, generate(llm, specs), strict=True):
        num_kept = sum(sum(kept(plan_of(ratio, video))) for video in spec.videos)
        num_kept += family.video_tail * len(spec.videos)
        assert answer.prompt.count(family.video_token) == num_kept
        assert answer.prompt.count(family.image_token) == family.kept(ratio, *spec.images)
        assert_equals_oracle(oracle, spec, answer)


def test_a_mixed_batch_gives_the_same_tokens_as_single_requests(family, llm):
    specs = [at(spec, ratio) for spec in REQUESTS for ratio in (8 / 9, 0.5)]
    specs += [RequestSpec("no video, " * 9), RequestSpec("an image", (2,), 7 / 9), *VIDEOS[:1]]
    alone = [generate(llm, [spec])[0].tokens for spec in specs]
    assert [answer.tokens for answer in generate(llm, specs)] == alone


def ends_at(family: Family, llm, plan_of: PlanOf, place: int, frame: int) -> RequestSpec:
    """A request whose first step ends ``place`` tokens after a frame of its video begins, if
    nothing prevents it."""
    spec = RequestSpec("Where does the square go?", ratio=0.5, videos=(4,), max_tokens=4)
    (answer,) = generate(llm, [spec])
    starts = frame_starts(family, answer, plan_of(0.5, 4))
    budget = engine_core(llm).scheduler.max_num_scheduled_tokens
    assert starts[frame] + place <= budget, "no room for a system text"
    return RequestSpec(**{**vars(spec), "system": "x" * (budget - starts[frame] - place)})


@pytest.mark.parametrize("frame", [0, 3, -1])
@pytest.mark.parametrize("edge", ["ends", "is cut"])
def test_a_step_may_end_after_any_frame_and_in_none(
    family, llm, oracle, plan_of, monkeypatch, frame, edge
):
    """A step that would end inside a frame ends before it."""
    frames = plan_of(0.5, 4)
    if frame == -1 and sum(kept(frames)) > engine_core(llm).scheduler.max_num_scheduled_tokens:
        pytest.skip("the video does not fit into one step")
    n1 = frames[frame].stages[0]
    spec = ends_at(family, llm, plan_of, n1 if edge == "ends" else n1 // 2, frame)
    ends = recorded_ends(engine_core(llm).scheduler, monkeypatch)
    (answer,) = generate(llm, [spec])
    starts = frame_starts(family, answer, frames)
    assert len(starts) == len(frames) >= 7
    assert ends[0] == starts[frame] + (n1 if edge == "ends" else 0)
    assert not inside_frames(starts, frames) & set(ends)
    assert_equals_oracle(oracle, spec, answer)


@pytest.mark.parametrize("ratio", [2 / 3, 8 / 9])
def test_a_second_question_computes_nothing_of_the_video_again(family, llm, ratio):
    first, second = generate_with_cache(
        llm,
        [
            RequestSpec("What is it?", ratio=ratio, videos=(4,)),
            RequestSpec("Where does the square go?", ratio=ratio, videos=(4,)),
        ],
    )
    end = len(first.prompt) - first.prompt[::-1].index(family.video_token)
    assert first.reused == 0
    assert second.reused >= end


def test_other_ratios_and_other_videos_are_not_reused(family, llm):
    specs = [
        RequestSpec("What?", ratio=8 / 9, videos=(1,)),
        RequestSpec("What?", ratio=2 / 3, videos=(1,)),
        RequestSpec("What?", ratio=8 / 9, videos=(3,)),
        RequestSpec("What?", ratio=0.0, videos=(1,)),
    ]
    assert [answer.reused for answer in generate_with_cache(llm, specs)] == [0] * 4


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_a_hit_may_end_after_any_frame(family, llm, plan_of, segment):
    """In each turn another block is evicted, and with it the hits of all longer prefixes."""
    spec = RequestSpec("Where does the square go?", ratio=0.5, videos=(1,), max_tokens=2)
    if family is LLAVA_ONEVISION:  # small frames: here a block of each segment ends among them
        spec = replace(spec, system="x" * 16, videos=(4,))
    (expected,) = generate(llm, [spec])
    frames = plan_of(0.5, *spec.videos)
    starts = frame_starts(family, expected, frames)
    manager = engine_core(llm).scheduler.kv_cache_manager
    group = next(
        i
        for i, group in enumerate(manager.kv_cache_config.kv_cache_groups)
        if group.kv_cache_spec.segment == segment
    )
    reused = []
    for block in count():
        generate_in_turn(llm, [spec])
        blocks = blocks_of(manager.block_pool, group)
        if block >= len(blocks):
            break
        manager.evict_blocks({blocks[block]})
        (answer,) = generate(llm, [spec], reuse=True)
        assert answer.tokens == expected.tokens
        assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in expected.logprobs]
        reused.append(answer.reused)
    assert reused == sorted(reused)
    assert not inside_frames(starts, frames) & set(reused)
    ends = [first + n1 for first, n1 in zip(starts, kept(frames), strict=True)]
    assert set(reused) & set(ends[:-1])


def test_frames_of_an_aborted_prefill_are_reused(family, llm, plan_of):
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    spec = ends_at(family, llm, plan_of, 2, 3)
    (cold,) = generate(llm, [spec])
    assert llm.reset_prefix_cache()
    start(engine, "gone", spec)
    engine.step()
    (request,) = scheduler.requests.values()
    computed = request.num_computed_tokens
    engine.abort_request(["gone"])
    while engine.has_unfinished_requests():
        engine.step()
    (answer,) = generate(llm, [spec], reuse=True)
    frames = plan_of(0.5, 4)
    third = frame_starts(family, cold, frames)[2]
    assert third + frames[2].stages[0] <= answer.reused <= computed < len(cold.prompt)
    assert answer.tokens == cold.tokens
    assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in cold.logprobs]


@pytest.mark.parametrize("ratio", [0.0, 0.2, 8 / 9])
def test_a_running_request_holds_the_plan_s_blocks_in_every_stage(family, llm, plan_of, ratio):
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    spec = RequestSpec("How many?", (1,), ratio, videos=(4, 2), order="viv", max_tokens=20)
    plans = [counts for video in spec.videos for counts in plan_of(ratio, video)]
    plans.append(family.counts(ratio, 1))
    dropped = [sum(counts.dropped[segment] for counts in plans) for segment in range(3)]
    start(engine, "r", spec)
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    seen = 0
    for request in decoding_steps(llm):
        seen += 1
        blocks = scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        for group, held in zip(groups, blocks, strict=True):
            slots = request.num_computed_tokens - dropped[group.kv_cache_spec.segment]
            assert sum(not block.is_null for block in held) == ceil(slots / BLOCK)
    assert seen > 10


def test_a_video_preempted_between_frames_resumes_and_answers_as_if_alone(family, llm, plan_of):
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    spec = ends_at(family, llm, plan_of, 2, 3)
    (expected,) = generate(llm, [spec])
    assert llm.reset_prefix_cache()
    engine.reset_encoder_cache()
    start(engine, "r", spec)
    engine.step()
    request = scheduler.running[-1]
    assert len(spec.system) + 20 < request.num_computed_tokens < request.num_prompt_tokens
    assert tokens_after_preemption(llm) == expected.tokens


def test_a_video_with_more_patches_than_the_encoder_s_budget_is_encoded_in_parts(
    family, llm, plan_of, monkeypatch
):
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    spec = RequestSpec("Where to?", ratio=0.5, videos=(4,), max_tokens=3)
    (expected,) = generate(llm, [spec])
    frames = plan_of(0.5, 4)
    budget = 2 * frames[0].encoder
    assert sum(kept(frames)) > budget
    model = engine_core(llm).model_executor.driver_worker.worker.model_runner.get_model()
    monkeypatch.setattr(scheduler, "max_num_encoder_input_tokens", budget)
    monkeypatch.setattr(model, "_encoder_tokens", budget)
    encoded = []
    embed = model._embed_pruned

    def recording(inputs, images, *others):
        encoded.append(len(images))
        return embed(inputs, images, *others)

    monkeypatch.setattr(model, "_embed_pruned", recording)
    assert llm.reset_prefix_cache()
    engine.reset_encoder_cache()
    start(engine, "r", spec)
    outputs = []
    for _ in range(20):
        if engine.has_unfinished_requests():
            outputs = engine.step()
    assert list(outputs[0].outputs[0].token_ids) == expected.tokens
    assert sum(encoded) == len(frames)
    assert max(encoded) == 2
