"""Is the engine still right when everything happens at once?

A real engine with a tiny model and far too small a KV cache gets a random mix of ratios,
images, videos, conversations that go on, system prompts, cache salts, priorities and aborts. Every
completed answer must be the one that the same request gets alone, without prefix caching. At
the end nothing may be left: blocks, encoder cache, tables of requests, processes.

``make soak`` runs the same with more requests and one model.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil  # type: ignore[import-untyped]
import pytest
from tqdm import tqdm  # type: ignore[import-untyped]
from vllm import LLM

from tests.checkpoints import tiny
from tests.engine.requests import ENGINE_OPTIONS, Answer, RequestSpec, answer_of, generate
from tests.engine.requests import VIDEOS as VIDEO_SIZES
from tests.engine.scheduling import engine_core, start
from tests.families.family import (
    INTERNVL_CHAT,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Saved,
)
from tests.families.stage_one_family import GEMMA3, MISTRAL3
from tests.soak.traffic import MAX_TEXT_TOKENS, Traffic
from vitcop_vllm.demo.checkpoint import TINY

TIE = 1e-3
"""Log-probabilities closer than this are equal: another batch may round them apart."""

SHORT = 150
"""Requests, where pytest is not given another number."""


@dataclass(frozen=True)
class Load:
    """A model to soak.

    Attributes:
        family: A family, whose checkpoint is served.
        images: Seeds of the images.
        max_visual_tokens: Of an image.
        blocks: KV blocks in all: just enough for the longest request.
        concurrency: Requests at a time, two thirds of them running: too many for the blocks.
        videos: Seeds of the videos.
    """

    family: Saved
    images: Sequence[int]
    max_visual_tokens: int
    blocks: int
    concurrency: int
    videos: Sequence[int] = ()

    def engine(self, checkpoint: Path, **options: Any) -> LLM:
        length = 4 * self.max_visual_tokens + MAX_TEXT_TOKENS
        return LLM(str(checkpoint), **{**ENGINE_OPTIONS, "max_model_len": length, **options})


VIDEOS = tuple(VIDEO_SIZES)

LOADS = {
    "llava": Load(LLAVA, range(12), TINY.visual_tokens, blocks=480, concurrency=24),
    "llava-next": Load(
        LLAVA_NEXT,
        range(201, 213),
        tiny.LLAVA_NEXT.visual_tokens,
        blocks=580,
        concurrency=48,
    ),
    "llava-onevision": Load(
        LLAVA_ONEVISION, range(201, 213), 270, blocks=500, concurrency=48, videos=VIDEOS
    ),
    "internvl": Load(INTERNVL_CHAT, range(201, 213), 250, blocks=460, concurrency=48),
    "qwen2.5-vl": Load(
        QWEN2_5_VL,
        range(201, 213),
        tiny.QWEN.max_visual_tokens,
        blocks=540,
        concurrency=48,
        videos=VIDEOS,
    ),
    # Four KV cache groups, where the others have eight.
    "qwen3-vl": Load(
        QWEN3_VL,
        range(201, 213),
        tiny.QWEN3.max_visual_tokens,
        blocks=270,
        concurrency=48,
        videos=VIDEOS,
    ),
    "qwen3-vl-moe": Load(
        QWEN3_VL_MOE,
        range(201, 213),
        tiny.QWEN3_MOE.max_visual_tokens,
        blocks=270,
        concurrency=48,
        videos=VIDEOS,
    ),
    # Stage I alone: KV cache and scheduler are vLLM's.
    "gemma3": Load(GEMMA3, range(12), 64, blocks=68, concurrency=48),
    "mistral3": Load(MISTRAL3, range(201, 213), 110, blocks=42, concurrency=48),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "load" in metafunc.fixturenames:
        names = [metafunc.config.getoption("--model")]
        if names == [None]:
            is_full = metafunc.config.getoption("--full")
            names = list(LOADS) if is_full else ["llava", "qwen2.5-vl"]
        metafunc.parametrize("load", [LOADS[name] for name in names], ids=names)


def held(llm: LLM) -> dict[str, int]:
    """What an idle engine holds; all of it must be as before."""
    generate(llm, [RequestSpec("hello", max_tokens=2)], reuse=True)
    llm.llm_engine.step()  # The runner forgets the last request in the next step.
    core = engine_core(llm)
    manager = core.scheduler.kv_cache_manager
    managers = manager.coordinator.single_type_managers
    encoder = core.scheduler.encoder_cache_manager
    runner = core.model_executor.driver_worker.worker.model_runner
    return {
        "blocks in use": manager.block_pool.num_gpu_blocks
        - manager.block_pool.get_num_free_blocks(),
        "block tables": sum(len(m.req_to_blocks) + len(m.num_cached_block) for m in managers),
        "copies": sum(len(m._partial_hit_reqs) + len(m._pending_cow_copies) for m in managers),
        "requests of the scheduler": len(core.scheduler.requests),
        "plans": len(getattr(core.scheduler, "plans", ())),  # vLLM's scheduler has none
        "encoder embeddings in use": encoder.cache_size - encoder.num_freeable_slots,
        "requests of the runner": len(runner.requests),
        "rows of the batch": runner.input_batch.num_reqs,
        "processes": len(psutil.Process().children(recursive=True)),
    }


def hammer(
    llm: LLM, traffic: Traffic, num_requests: int, concurrency: int
) -> tuple[list[tuple[RequestSpec, Answer]], int]:
    """Send requests, ``concurrency`` at a time; some are aborted on the way.

    Returns:
        All that were completed, and how many were aborted.
    """
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    live: dict[str, RequestSpec] = {}
    done: list[tuple[RequestSpec, Answer]] = []
    aborted = sent = 0
    with tqdm(total=num_requests, desc="soak") as bar:
        while sent < num_requests or live:
            while sent < num_requests and len(live) < concurrency:
                live[str(sent)] = traffic.next()
                start(engine, str(sent), live[str(sent)])
                sent += 1
                if traffic.rng.random() < 0.2:
                    break  # The next one comes in another step.
            if live and traffic.rng.random() < 0.02:
                name = traffic.rng.choice(list(live))
                engine.abort_request([name])
                del live[name]
                aborted += 1
            for output in engine.step():
                if output.finished and output.outputs[0].finish_reason != "abort":
                    spec, answer = live.pop(output.request_id), answer_of(output)
                    done.append((spec, answer))
                    traffic.finished(spec, tokenizer.decode(answer.tokens))
            bar.update(len(done) + aborted - bar.n)
    return done, aborted


def compare_tokens(
    tokens: list[int], alone: list[int], logprobs: list[dict[int, float]]
) -> str | None:
    """None if ``alone`` begins with ``tokens``.

    Else "tie" if they part where the two likeliest of ``logprobs`` are equal, or "wrong".
    """
    for token, other, step in zip(tokens, alone, logprobs, strict=False):
        if token != other:
            first, second = sorted(step.values(), reverse=True)[:2]
            return "tie" if first - second < TIE else "wrong"
    return None


def compare(llm: LLM, done: list[tuple[RequestSpec, Answer]]) -> dict[str | None, list[str]]:
    """Completed requests by :func:`compare_tokens`, with the answers that ``llm`` gives alone."""

    def question(spec: RequestSpec) -> tuple[Any, ...]:
        return spec.system, spec.text, spec.images, spec.videos, spec.order, spec.ratio

    # One run answers all requests with the same prompt, for the longest of their answers.
    longest: dict[tuple[Any, ...], RequestSpec] = {}
    for spec, _ in sorted(done, key=lambda pair: pair[0].max_tokens):
        longest[question(spec)] = replace(spec, cache_salt=None, priority=0)
    alone = {
        key: generate(llm, [spec], reuse=True)[0]
        for key, spec in tqdm(longest.items(), desc="alone")
    }
    found: dict[str | None, list[str]] = {None: [], "tie": [], "wrong": []}
    for spec, answer in done:
        whole = alone[question(spec)]
        kind = compare_tokens(answer.tokens, whole.tokens, whole.logprobs)
        found[kind].append(f"{answer.tokens}, alone {whole.tokens}: {spec}")
    return found


@pytest.mark.slow
def test_answers_equal_those_of_single_requests(
    load: Load, checkpoint_of: Callable[[Saved], Path], pytestconfig: pytest.Config
) -> None:
    num_requests = pytestconfig.getoption("--requests") or SHORT
    checkpoint = checkpoint_of(load.family)
    llm = load.engine(
        checkpoint,
        max_num_seqs=load.concurrency * 2 // 3,
        num_gpu_blocks_override=load.blocks,
        scheduling_policy="priority",
    )
    before = held(llm)
    traffic = Traffic(pytestconfig.getoption("--seed"), load.images, load.videos)
    scheduler = engine_core(llm).scheduler
    with mock.patch.object(
        scheduler, "_preempt_request", wraps=scheduler._preempt_request
    ) as preempt:
        done, aborted = hammer(llm, traffic, num_requests, load.concurrency)
    assert held(llm) == before
    found = compare(load.engine(checkpoint, enable_prefix_caching=False), done)
    counts = Counter(
        completed=len(done),
        aborted=aborted,
        preempted=preempt.call_count,
        prompt_tokens=sum(len(answer.prompt) for _, answer in done),
        reused_tokens=sum(answer.reused for _, answer in done),
        ties=len(found["tie"]),
        wrong=len(found["wrong"]),
    )
    print(f"\n{dict(counts)}")
    assert found["wrong"] == []
    assert counts["completed"] + counts["aborted"] == num_requests
    assert counts["ties"] <= num_requests / SHORT
    # Else it was no soak.
    assert counts["aborted"] > 0
    assert counts["preempted"] > num_requests / 200
    assert counts["reused_tokens"] > 0.02 * counts["prompt_tokens"]
