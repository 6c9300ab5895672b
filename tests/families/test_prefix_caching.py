"""Prefix caching: a request reuses the longest cached prefix, and its answer does not change."""

import pickle
from dataclasses import replace
from math import ceil, inf
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id

from tests.engine.requests import BLOCK, Answer, RequestSpec, generate, generate_in_turn
from tests.engine.scheduling import engine_core, recorded_steps, start, tokens_after_preemption
from tests.families.family import Family
from tests.families.stock import IN_TURN


def generate_with_cache(llm, specs: list[RequestSpec], *, together: bool = False) -> list[Answer]:
    """Answers with prefix caching, compared with answers from an empty cache."""
    expected = [generate(llm, [spec])[0] for spec in specs]
    answers = generate(llm, specs) if together else generate_in_turn(llm, specs)
    for answer, alone in zip(answers, expected, strict=True):
        assert alone.reused == 0
        assert answer.prompt == alone.prompt
        assert answer.tokens == alone.tokens
        assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in alone.logprobs]
    return answers


def reusable(family: Family, answer: Answer, earlier: Answer) -> int:
    """Longest shared prefix that can be cached: it ends at a block boundary in text, or at the
    end of an image. The prompts' images must be equal as far as their tokens are."""
    shared = 0
    for a, b in zip(answer.prompt[:-1], earlier.prompt, strict=False):
        if a != b:
            break
        shared += 1
    inside = [family.image_token] * 2
    return max(
        end
        for end in range(shared + 1)
        if answer.prompt[max(end - 1, 0) : end + 1] != inside
        and (end % BLOCK == 0 or answer.prompt[end - 1] == family.image_token)
    )


@pytest.mark.parametrize("ratio", [0.2, 0.5, 2 / 3, 7 / 9, 8 / 9])
def test_a_new_question_reuses_the_whole_image(family, llm, ratio):
    first, second, third = generate_with_cache(
        llm,
        [
            RequestSpec("What is it?", (1,), ratio),
            RequestSpec("Where is the dog that you can see?", (1,), ratio),
            RequestSpec("Which one is larger?", (1, 2), ratio),
        ],
    )
    assert first.reused == 0
    assert second.reused == reusable(family, second, first) >= family.offset + family.kept(ratio, 1)
    assert third.reused == max(reusable(family, third, earlier) for earlier in (first, second))


def test_a_new_question_reuses_both_images(family, llm):
    specs = [
        RequestSpec(text, (1, 2), 8 / 9) for text in ("Which is larger?", "Is one of them a dog?")
    ]
    first, second = generate_with_cache(llm, specs)
    assert second.reused == reusable(family, second, first) > family.kept(8 / 9, 1, 2)


@pytest.mark.parametrize("together", [False, True])
def test_many_questions_reuse_the_same_images(family, llm, together):
    """In one batch, later requests wait for the first, which computes the images."""
    specs = [RequestSpec(f"{i}: what is on this page?", (1, 2, 3, 4), 8 / 9) for i in range(8)]
    first, *others = generate_with_cache(llm, specs, together=together)
    for answer in others:
        assert answer.reused == reusable(family, answer, first) > family.kept(8 / 9, 1, 2, 3, 4)


def test_a_second_turn_computes_new_text_only(family, llm, monkeypatch):
    first = RequestSpec("What is it?", (1,), 7 / 9, max_tokens=70)
    (answer,) = generate(llm, [first])
    text = llm.get_tokenizer().decode(answer.tokens)
    second = replace(first, text=f"What is it? ASSISTANT:{text} USER: And where?", max_tokens=8)
    one, two = generate_with_cache(llm, [first, second])
    assert two.reused == reusable(family, two, one) > len(one.prompt) - BLOCK

    llm.llm_engine.reset_encoder_cache()
    steps = recorded_steps(engine_core(llm).scheduler, monkeypatch)
    assert generate(llm, [second], reuse=True)[0].tokens == two.tokens
    assert not any(step.scheduled_encoder_inputs for step in steps)
    assert generate(llm, [second])[0].tokens == two.tokens
    assert any(
        step.scheduled_encoder_inputs for step in steps
    )  # without reuse the image is encoded


def test_other_images_and_other_ratios_are_not_reused(family, llm):
    specs = [
        RequestSpec("What is it?", (1,), 8 / 9),
        RequestSpec("What is it?", (2,), 8 / 9),
        RequestSpec("What is it?", (1,), 7 / 9),
        RequestSpec("What is it?", (1,), 0.0),
        RequestSpec("What is it?", (2, 1), 8 / 9),
    ]
    reused = [answer.reused for answer in generate_with_cache(llm, specs)]
    assert reused == [0, 0, 0, 0, family.offset + family.kept(8 / 9, 2)]


def test_swapped_images_are_not_reused(llm):
    _, swapped = generate_with_cache(
        llm, [RequestSpec("Which?", (1, 2), 8 / 9), RequestSpec("Which?", (2, 1), 8 / 9)]
    )
    assert swapped.reused == 0


def test_requests_with_different_salts_share_nothing(family, llm):
    specs = [
        RequestSpec("What is it?", (1,), 8 / 9, cache_salt=salt)
        for salt in ("one", "other", "one", None)
    ]
    first, other, again, none = generate_with_cache(llm, specs)
    assert (first.reused, other.reused, none.reused) == (0, 0, 0)
    assert again.reused == reusable(family, again, first)


def test_text_before_an_image_is_reused_at_every_ratio(family, llm):
    system = "You look closely and answer in one word, which is never a long one. " * 3
    specs = [
        RequestSpec("What is it?", (1,), 8 / 9, system=system),
        RequestSpec("What is it?", (2,), 2 / 3, system=system),
        RequestSpec("What is it?", (2,), 0.0, system=system),
        RequestSpec("What is it?", system=system),
    ]
    reused = [answer.reused for answer in generate_with_cache(llm, specs)]
    before = (len(system) + family.offset) // BLOCK * BLOCK
    assert reused == [0, before, before, before]


@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_block_evicted_in_one_segment_shortens_the_hit_of_all_segments(
    family, llm, segment, block
):
    specs = [
        RequestSpec("First or second? " + "Say it well. " * 8 + end, (105, 106), 2 / 3)
        for end in ("a", "b")
    ]
    expected = [generate(llm, [spec])[0] for spec in specs]
    earlier = generate_in_turn(llm, specs[:1])[0]
    manager = engine_core(llm).scheduler.kv_cache_manager
    group = next(
        i
        for i, group in enumerate(manager.kv_cache_config.kv_cache_groups)
        if group.kv_cache_spec.segment == segment
    )
    lost = blocks_of(manager.block_pool, group)[block]
    manager.evict_blocks({lost})
    (answer,) = generate(llm, specs[1:], reuse=True)
    assert answer.tokens == expected[1].tokens
    assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in expected[1].logprobs]

    mark = family.image_token
    dropped = [family.counts(2 / 3, image).dropped[segment] for image in specs[0].images]
    whole, kept = reusable(family, answer, earlier), 0
    for end in range(whole + 1):
        images = 0
        for i in range(1, end + 1):
            images += answer.prompt[i - 1] == mark != answer.prompt[i]
        slots = end - sum(dropped[:images])
        cuts = answer.prompt[max(end - 1, 0) : end + 1] == [mark, mark]
        ends = end % BLOCK == 0 or answer.prompt[end - 1] == mark
        if not cuts and ends and ceil(slots / BLOCK) <= block:
            kept = end
    assert answer.reused == kept < whole


def blocks_of(pool: Any, group: int) -> list[int]:
    """Cached blocks of a group, shortest prefix first.

    All blocks of a span are keyed by the prefix at the span's end. Each key but the last
    block's also holds the block's index in the request's block table.
    """
    found = [
        (block.block_hash_num_tokens, get_block_hash(block.block_hash), block.block_id)
        for block in pool.blocks
        if block.block_hash is not None and get_group_id(block.block_hash) == group
    ]
    digest = min(len(key) for _, key, _ in found)

    def order(block: tuple[int, bytes, int]) -> tuple[int, float]:
        prefix, key, _ = block
        return prefix, int.from_bytes(key[digest:]) if len(key) > digest else inf

    return [block_id for _, _, block_id in sorted(found, key=order)]


def test_vllm_s_prefix_cache_counters_match_the_answers(llm):
    def counters() -> dict[str, float]:
        return {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if metric.name in ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
        }

    before = counters()
    answers = generate_in_turn(
        llm, [RequestSpec(text, (1, 2), 8 / 9) for text in ("Which is larger?", "Is one a dog?")]
    )
    after = counters()
    assert [after[name] - before[name] for name in sorted(after)] == [
        answers[1].reused,
        sum(len(answer.prompt) for answer in answers),
    ]


def test_a_request_for_prompt_log_probabilities_has_no_cache_hit(llm):
    spec = RequestSpec("What is it?", (1,), 8 / 9)
    generate(llm, [spec])
    (answer,) = generate(llm, [replace(spec, sampling={"prompt_logprobs": 1})], reuse=True)
    assert answer.reused == 0


def test_a_request_with_a_reused_image_can_encode_it_after_preemption(family, llm):
    """The scheduler sent no pixels with the request, because its image was a cache hit."""
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    specs = [
        RequestSpec(text, (1,), 8 / 9, max_tokens=12) for text in ("What is it?", "Is it a dog?")
    ]
    _, expected = [generate(llm, [spec])[0] for spec in specs]
    generate(llm, specs[:1])
    start(engine, "second", specs[1])
    for _ in range(3):
        engine.step()
    assert scheduler.running[-1].num_computed_tokens > family.kept(8 / 9, 1)
    assert tokens_after_preemption(llm) == expected.tokens


def test_workers_are_not_sent_an_image_that_a_prefix_hit_covers(family, llm, monkeypatch):
    specs = [
        RequestSpec(text, (1,), 8 / 9, max_tokens=2) for text in ("What is it?", "Is it a dog?")
    ]
    steps = recorded_steps(engine_core(llm).scheduler, monkeypatch)
    generate_in_turn(llm, specs)
    first, second = (step for step in steps if step.scheduled_new_reqs)
    pixels = first.scheduled_new_reqs[0].mm_features[0].data[family.pixels].data
    assert len(pickle.dumps(first)) > pixels.nbytes > 100_000
    # For a model with M-RoPE, vLLM still sends the grid.
    assert family.pixels not in (second.scheduled_new_reqs[0].mm_features[0].data or {})
    assert len(pickle.dumps(second)) < 5000


@pytest.mark.parametrize("ratio", [0.0, 2 / 3, 8 / 9])
def test_a_repeated_prefix_computes_at_most_as_many_tokens_as_in_stock_vllm(
    llm, stock_in_turn, ratio
):
    """The requests' system texts place block boundaries differently relative to the images."""
    answers = generate_with_cache(llm, [replace(spec, ratio=ratio) for spec in IN_TURN])
    left = [len(answer.prompt) - answer.reused for answer in answers]
    stock = [len(answer.prompt) - answer.reused for answer in stock_in_turn]
    assert sum(answer.reused > BLOCK for answer in stock_in_turn) == 20
    more = [n - limit for n, limit in zip(left, stock, strict=True)]
    # The requests also share one token after their images. Stock's block may end behind it, and
    # a pruned request's blocks end elsewhere.
    assert max(more) <= (1 if ratio else 0), more
    assert sum(more) <= 0
