"""In random traffic every request reads its own prefix, and every block is freed.

Hypothesis drives the staged scheduler, vLLM's cache manager and block pool, and ``fake_worker``,
which checks every slot that it reads.
"""

from collections import Counter, deque
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm import LLM, SamplingParams
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from tests.engine.fake_worker import FakeWorker
from tests.engine.requests import BLOCK, IMAGE_TOKEN
from tests.engine.scheduling import engine_core, new_scheduler
from tests.families.family import LLAVA
from vitcop_vllm.pruning.identity import tag_identifier
from vitcop_vllm.pruning.plan import RequestPlan

RATIOS = [0.0, 0.2, 2 / 3, 8 / 9, 17 / 18]
COUNTS = {ratio: LLAVA.counts(ratio, image=1) for ratio in RATIOS}
"""Plans for the tiny model. They need few blocks, so in a small pool requests compete."""

texts = st.integers(0, 2).flatmap(
    lambda kind: st.integers(0, 75).map(lambda length: [40 + kind] * length)
)
parts = st.lists(st.one_of(texts, st.integers(0, 2)), min_size=1, max_size=5)
"""Parts of a prompt: lists of token ids, and numbers of images."""

seen: Counter[str] = Counter()


def cacheable_lengths(num_tokens: int, features: Sequence[Any]) -> set[int]:
    """Lengths at which a prefix of a prompt can be cached: whole blocks, ends of pruned images.

    Args:
        num_tokens: Length of the prompt.
        features: The pruned images. A prefix that ends inside one of them is not cached.
    """
    spans = [(f.mm_position.offset, f.mm_position.offset + f.mm_position.length) for f in features]
    lengths = {*range(0, num_tokens + 1, BLOCK), *(end for _, end in spans if end <= num_tokens)}
    return {n for n in lengths if not any(start < n < end for start, end in spans)}


class Traffic(RuleBasedStateMachine):
    """Random requests; at most two steps are in flight."""

    llm: Any

    @initialize(
        blocks=st.sampled_from([120, 170, 400]),
        is_async=st.booleans(),
        is_v2=st.booleans(),
        policy=st.sampled_from(list(SchedulingPolicy)),
        budget=st.sampled_from([260, 400, 900]),
        threshold=st.sampled_from([0, 256]),
    )
    def start(self, blocks, is_async, policy, budget, threshold, is_v2=False):
        config = copy(self.llm.llm_engine.vllm_config)
        config.scheduler_config = copy(config.scheduler_config)
        config.scheduler_config.async_scheduling = is_async
        config.scheduler_config.policy = policy.value
        config.scheduler_config.max_num_batched_tokens = budget
        # A threshold leaves tokens of a step to later requests, which may preempt a long prompt.
        config.scheduler_config.long_prefill_token_threshold = threshold
        cache = replace(
            engine_core(self.llm).scheduler.kv_cache_manager.kv_cache_config, num_blocks=blocks
        )
        self.scheduler = new_scheduler(self.llm, config, cache)
        self.scheduler.use_v2_model_runner = is_v2
        self.depth = 2 if is_async else 1
        self.salts: dict[str, str | None] = {}
        self.worker = FakeWorker(self.scheduler, BLOCK, self.salts)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.in_flight: deque[Any] = deque()
        self.history: list[tuple[list[Any], float]] = []
        self.live: dict[str, tuple[Request, list[Any], float]] = {}
        self.evicted: set[str] = set()
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free = self.pool.get_num_free_blocks()
        self.counter = 0

    @rule(
        parts=parts,
        ratio=st.sampled_from(RATIOS),
        max_tokens=st.integers(1, 50),
        salt=st.sampled_from([None, None, "s"]),
        priority=st.integers(0, 2),
        again=st.one_of(st.none(), st.integers(0, 30)),
        times=st.integers(1, 3),
    )
    def add_requests(self, parts, ratio, max_tokens, salt, priority, again, times):
        """Add a new prompt, or the continuation of an earlier one."""
        if again is not None and self.history:
            earlier, ratio = self.history[again % len(self.history)]
            parts = [*earlier, *parts]
        for _ in range(times):
            self._add_request(parts, ratio, max_tokens, salt, priority)

    def _add_request(self, parts, ratio, max_tokens, salt, priority):
        self.counter += 1
        request = self._request(f"r{self.counter}", parts, ratio, max_tokens, salt, priority)
        # vLLM's front end refuses requests that do not fit into the cache.
        groups = len(self.worker.segments)
        if (request.num_tokens + max_tokens) // BLOCK + 2 > self.free // groups:
            return
        self.live[request.request_id] = request, parts, ratio
        self.history.append((parts, ratio))
        self.scheduler.add_request(request)

    def _request(self, request_id, parts, ratio, max_tokens, salt=None, priority=0, **options):
        counts = COUNTS[ratio]
        tokens: list[int] = [1]
        features = []
        for part in parts:
            if isinstance(part, list):
                tokens += part
                continue
            place = PlaceholderRange(offset=len(tokens), length=counts.stages[0])
            name = tag_identifier(f"image {part}", counts)
            data = MultiModalKwargsItem.dummy()
            features.append(MultiModalFeatureSpec(data, "image", name, place))
            tokens += [IMAGE_TOKEN] * counts.stages[0]
        self.salts[request_id] = salt
        return Request(
            request_id,
            tokens,
            SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
            None,
            arrival_time=float(self.counter),
            mm_features=features,
            cache_salt=salt,
            priority=priority,
            block_hasher=self.hasher,
            **options,
        )

    @precondition(lambda self: self.live or self.in_flight)
    @rule(steps=st.integers(1, 30))
    def run(self, steps):
        for _ in range(steps):
            self._step()

    def _step(self):
        scheduled = self.scheduler.schedule()
        if scheduled.total_num_scheduled_tokens:
            self.in_flight.append(scheduled)
        if self.in_flight and (
            len(self.in_flight) == self.depth or not scheduled.total_num_scheduled_tokens
        ):
            done = self.in_flight.popleft()
            outputs = self.scheduler.update_from_output(done, self.worker.execute(done))
            for output in outputs[0].outputs if 0 in outputs else ():
                self._check_usage(output)
        for name, (request, parts, ratio) in list(self.live.items()):
            if request.is_finished():
                del self.live[name]
                self.history.append(([*parts, list(request.output_token_ids)], ratio))
                seen["preemptions"] += request.num_preemptions

    def _check_usage(self, output: Any) -> None:
        """Tokens read from the cache plus tokens written to it are all cacheable tokens."""
        stats = output.prefill_stats
        if stats is None or output.request_id not in self.live:
            return
        request, _, ratio = self.live[output.request_id]
        images = request.mm_features if COUNTS[ratio].is_pruned else ()
        lengths = cacheable_lengths(request.num_prompt_tokens, images)
        cached = stats.num_cached_tokens + stats.num_cache_creation_tokens
        assert cached in lengths
        if output.request_id in self.evicted:
            return  # its blocks may have lost their keys before vLLM counted them
        if not request.num_preemptions:
            assert cached == max(lengths)
            seen["read and wrote"] += 0 < stats.num_cached_tokens < cached
        else:
            # vLLM counts the request's blocks that have keys. A resumed request may read a prefix
            # that ends inside a block. Its copy of that block gets a key at the next checkpoint.
            seen["preempted before the first token"] += 1
            seen["of these, all counted"] += cached == max(lengths)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def abort(self, which):
        name = sorted(self.live)[which % len(self.live)]
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        del self.live[name]

    @rule(every=st.integers(2, 9), first=st.integers(0, 8))
    def evict(self, every, first):
        """Evict cached blocks of some segments only."""
        cached = [block.block_id for block in self.pool.blocks if block.block_hash is not None]
        self.scheduler.kv_cache_manager.evict_blocks(set(cached[first::every]))
        self.evicted |= self.live.keys()

    @invariant()
    def no_block_is_lost(self):
        if not hasattr(self, "pool"):
            return
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        held = {
            block.block_id
            for manager in managers
            for blocks in manager.req_to_blocks.values()
            for block in blocks
        }
        waiting = {
            block.block_id for _, blocks in self.scheduler.deferred_frees for block in blocks
        }
        assert self.pool.get_num_free_blocks() == self.free - len(held | waiting)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for _ in range(5000):
            if not self.live and not self.in_flight:
                break
            self._step()
        assert not self.live
        self.scheduler.schedule()
        assert self.pool.get_num_free_blocks() == self.free
        assert not self.scheduler.plans
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block
            assert not manager._cached_tokens
            assert not manager._partial_hit_reqs
        seen["copies"] += self.worker.copies
        seen["resent images"] += self.worker.resent
        seen["requests"] += self.counter


def with_engine(llm: LLM) -> type[Traffic]:
    return type("EngineTraffic", (Traffic,), {"llm": llm})


def test_every_slot_holds_its_request_s_prefix(llm, pytestconfig):
    seen.clear()
    run_state_machine_as_test(
        with_engine(llm),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            # Equal traffic in every run, or the numbers below would fail by chance.
            derandomize=not pytestconfig.getoption("--full"),
            suppress_health_check=list(HealthCheck),
        ),
    )
    if pytestconfig.getoption("--full"):
        return
    # Enough of each event occurred.
    assert seen["copies"] > 500
    assert seen["preemptions"] > 100
    assert seen["read and wrote"] > 10
    assert seen["of these, all counted"] > 0


@pytest.mark.parametrize("parts", [[[40] * 1199], [[40] * 700, 1, [40] * 400]])
def test_a_chunk_whose_request_is_preempted_in_its_step_is_not_cached(llm, parts):
    """The scheduler preempts the request after it scheduled the request's chunk."""
    traffic = with_engine(llm)()
    traffic.start(
        blocks=600, is_async=False, policy=SchedulingPolicy.PRIORITY, budget=400, threshold=256
    )
    traffic._add_request(parts, 8 / 9, 3, None, 2)
    traffic._step()
    traffic._add_request([[41] * 63], 0.0, 40, None, 0)
    traffic._step()
    (victim, *_), (other, *_) = traffic.live.values()
    assert (victim.num_computed_tokens, other.num_computed_tokens) == (656, 64)
    # The victim's next chunk fits and is scheduled first. Then the other request does not fit.
    plan = traffic.scheduler.plans.get(victim.request_id) or RequestPlan(())
    spare = len(traffic.worker.segments) // 2
    for segment in traffic.worker.segments:
        now, then = (ceil(plan.num_slots(n, segment) / BLOCK) for n in (656, 656 + 256))
        spare += then - now
    taken = traffic.pool.get_new_blocks(traffic.pool.get_num_free_blocks() - spare)
    traffic._step()
    assert victim.num_preemptions == 1
    assert other.num_computed_tokens == 65
    traffic.pool.free_blocks(taken)
    traffic._step()
    assert victim.num_computed_tokens == 640 + 256
    traffic.teardown()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_second_session_reuses_the_first_turn_of_an_equal_one(llm, is_async):
    """Streaming input: each turn continues after the previous answer."""
    traffic = with_engine(llm)()
    traffic.start(
        blocks=600, is_async=is_async, policy=SchedulingPolicy.FCFS, budget=400, threshold=0
    )
    turns = [[[40] * 50, 1, [41] * 20], [[42] * 10, 2], [[40] * 3, 1]]

    def talk(name: str) -> Request:
        for turn in turns:
            update = traffic._request(name, turn, 8 / 9, 5, resumable=True)
            traffic.scheduler.add_request(update)
            session = traffic.scheduler.requests[name]
            for _ in range(20):
                traffic._step()
            assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        assert len(traffic.scheduler.plans[name].spans) == 3
        traffic.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        return session

    first = talk("first")
    before = traffic.worker.computed
    second = talk("second")
    assert list(second.all_token_ids) == list(first.all_token_ids)
    # vLLM looks up the first turn only, in whole blocks.
    first_turn = 51 + COUNTS[8 / 9].stages[0] + 20
    assert 2 * before - traffic.worker.computed == first_turn // BLOCK * BLOCK
    traffic._step()
    traffic.teardown()
