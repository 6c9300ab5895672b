"""A worker that computes nothing and checks the content of every KV slot that it reads.

It builds block tables from the scheduler's output, as vLLM's runner does. Into each slot it
writes a hash of the prefix that determines the slot's keys and values. If a request reads a
hash of another prefix, a block was cached, copied or evicted wrongly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

from vitcop_vllm.engine.output import StagedSchedulerOutput
from vitcop_vllm.pruning.identity import plan_request
from vitcop_vllm.pruning.plan import NUM_SEGMENTS, RequestPlan

Content = tuple[bytes, int]


def _name(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=8).digest()


@dataclass
class _State:
    """A runner's state of a request; ``contents`` is the expected content of slots, by segment."""

    tokens: list[int]
    prompt_tokens: int
    salt: str | None
    features: Sequence[Any]
    tables: tuple[list[int], ...]

    def __post_init__(self) -> None:
        self.plan = plan_request(self.features) or RequestPlan(())
        self.contents: list[list[Content]] = [[] for _ in range(NUM_SEGMENTS)]
        self.prefix = _name(self.salt)
        self.length = 0

    def extend(self, end: int) -> None:
        """Extend ``contents`` to the first ``end`` tokens."""
        images = {f.mm_position.offset: f.identifier for f in self.features}
        for position in range(self.length, end):
            self.prefix = _name(self.prefix, self.tokens[position], images.get(position))
            for segment, contents in enumerate(self.contents):
                slots = self.plan.num_slots(position + 1, segment)
                if segment and self.plan.cuts_span(position + 1):
                    continue
                # The kept tokens of a span depend on the prefix up to the span's end.
                contents.extend((self.prefix, slot) for slot in range(len(contents), slots))
        self.length = max(self.length, end)


class FakeWorker:
    """Executes steps in the order in which they were scheduled.

    Attributes:
        memory: Block -> content of its slots.
        encoded: Identifiers of images in the encoder cache.
        copies: Blocks copied so far.
        computed: Tokens computed so far.
        resent: Images encoded with data that the scheduler sent after the request.
    """

    def __init__(self, scheduler: Any, block_size: int, salts: dict[str, str | None]) -> None:
        groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        self.segments = [group.kv_cache_spec.segment for group in groups]
        self.block_size = block_size
        self.salts = salts
        self.memory: dict[int, list[Content | None]] = {}
        self.states: dict[str, _State] = {}
        self.encoded: set[str] = set()
        self.copies = self.computed = self.resent = 0

    def _block(self, block: int) -> list[Content | None]:
        return self.memory.setdefault(block, [None] * self.block_size)

    def _update(self, scheduled: Any) -> dict[str, int]:
        """Update the requests' states. Returns request -> tokens computed before the step."""
        for name in scheduled.finished_req_ids:
            self.states.pop(name, None)
        starts = {}
        for new in scheduled.scheduled_new_reqs:
            # Model runner V2 receives a resumed request as a new one, with its answer so far.
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            tables = tuple(map(list, new.block_ids))
            self.states[new.req_id] = _State(
                tokens,
                len(new.prompt_token_ids),
                self.salts.get(new.req_id),
                new.mm_features,
                tables,
            )
            starts[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            state, blocks = self.states[name], cached.new_block_ids[i]
            if name in cached.all_token_ids:
                state.tokens = list(cached.all_token_ids[name])
            if name in cached.resumed_req_ids:
                state.tables = tuple(map(list, blocks))
            elif blocks is not None:
                for table, more in zip(state.tables, blocks, strict=True):
                    table.extend(more)
            starts[name] = cached.num_computed_tokens[i]
        return starts

    def execute(self, scheduled: Any) -> ModelRunnerOutput:
        """Run a step and check every slot that it reads."""
        starts = self._update(scheduled)
        self.encoded -= set(scheduled.free_encoder_mm_hashes)
        sent = scheduled.image_data if isinstance(scheduled, StagedSchedulerOutput) else {}
        for name, inputs in scheduled.scheduled_encoder_inputs.items():
            features = [self.states[name].features[i] for i in inputs]
            for i, feature in zip(inputs, features, strict=True):
                assert feature.data is not None or i in sent[name]
                self.resent += feature.data is None
            self.encoded |= {feature.identifier for feature in features}
        copies = scheduled.kv_cache_block_copies or ()
        # vLLM reads all sources before it writes, so the copies are one update.
        self.memory |= {copy.dst_block_id: list(self.memory[copy.src_block_id]) for copy in copies}
        self.copies += len(copies)
        for name, count in scheduled.num_scheduled_tokens.items():
            self._write(self.states[name], starts[name], starts[name] + count)
            self.computed += count
        sampled: list[list[int]] = []
        for name, count in scheduled.num_scheduled_tokens.items():
            state, end = self.states[name], starts[name] + count
            self._check(name, state, end)
            if end < state.prompt_tokens or end < len(state.tokens):
                sampled.append([])
                continue
            # Equal prefixes get equal tokens. With three tokens, many answers share prefixes.
            token = 70 + state.prefix[0] % 3
            state.tokens.append(token)
            sampled.append([token])
        names = list(scheduled.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _write(self, state: _State, start: int, end: int) -> None:
        assert not state.plan.cuts_span(start)
        assert not state.plan.cuts_span(end)
        for feature in state.features:
            first = feature.mm_position.offset
            if start < first + feature.mm_position.length and first < end:
                assert feature.identifier in self.encoded
        state.extend(end)
        for segment, table in zip(self.segments, state.tables, strict=True):
            first, last = (state.plan.num_slots(n, segment) for n in (start, end))
            for slot in range(first, last):
                block = self._block(table[slot // self.block_size])
                block[slot % self.block_size] = state.contents[segment][slot]

    def _check(self, name: str, state: _State, end: int) -> None:
        for segment, table in zip(self.segments, state.tables, strict=True):
            slots = state.plan.num_slots(end, segment)
            assert len(table) == -(-slots // self.block_size), (name, segment, slots, len(table))
            assert len(set(table)) == len(table)
            held: list[Content | None] = []
            for block in table:
                held += self._block(block)
            assert held[:slots] == state.contents[segment][:slots], (name, segment)
