"""A segment's attention metadata, as a replayed full CUDA graph reads it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.utils import AttentionGroup

from tests.worker.steps import ScheduledRequest, build_step, common_metadata
from vitcop_vllm.engine.attention import (
    StagedAttention,
    begin_builds,
    create_staged_attention_backend,
)
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.pruning.settings import CONFIG_KEY

CPU = torch.device("cpu")
CAPTURED_REQUESTS = 4
PLAN = RequestPlan((VisualSpan(2, VisualTokenCounts(30, 4, (12, 7, 3))),))

# Decode steps: for each request its plan and the tokens computed before.
STEPS: list[list[tuple[RequestPlan | None, int]]] = [
    [(PLAN, 20), (None, 9), (PLAN, 33)],
    [(None, 15), (None, 4)],  # no request is pruned
    [(PLAN, 21), (None, 10), (PLAN, 34), (PLAN, 40)],
]


def staged_groups(llm, backend, segments=(1, 1, 1, 2, 2)):
    """Attention groups with the given segments, built as vLLM's runners build them."""
    core = llm.llm_engine.engine_core.engine_core
    specs = {
        group.kv_cache_spec.segment: group.kv_cache_spec
        for group in core.scheduler.kv_cache_config.kv_cache_groups
    }
    groups = []
    for number, segment in enumerate(segments):
        staged = create_staged_attention_backend(backend) if segment else backend
        groups.append(AttentionGroup(staged, [], specs[segment], number))
        groups[-1].create_metadata_builders(llm.llm_engine.vllm_config, CPU)
    return groups


class Buffers:
    """The runner's metadata, whose tensors keep their addresses from step to step."""

    def __init__(self):
        self.common = common_metadata([(0, 1)] * CAPTURED_REQUESTS)

    def write(self, spans):
        step = common_metadata(spans, padding=CAPTURED_REQUESTS - len(spans))
        self.common.seq_lens.copy_(step.seq_lens)
        return self.common.replace(
            seq_lens_cpu_upper_bound=step.seq_lens_cpu_upper_bound, max_seq_len=step.max_seq_len
        )


def build_as_v1(groups, common):
    """Build the metadata once per segment; other groups of the segment replace the block table."""
    built: dict[KVCacheSpec, Any] = {}
    for group in groups:
        builder = group.get_metadata_builder()
        if (first := built.get(group.kv_cache_spec)) is None:
            built[group.kv_cache_spec] = group.build_metadata(common)
        else:
            builder.update_block_table(first, common.block_table_tensor, common.slot_mapping)


def build_as_v2(groups, common):
    """Build the metadata of every group."""
    for group in groups:
        group.build_metadata(common)


@pytest.mark.parametrize("build", [build_as_v1, build_as_v2])
def test_a_graph_reads_the_lengths_of_the_step_that_replays_it(llm, build):
    groups = staged_groups(llm, TritonAttentionBackend)
    buffers = Buffers()
    begin_builds(groups, {})
    captured = [
        group.build_metadata_for_cudagraph_capture(buffers.write([(0, 1)] * CAPTURED_REQUESTS))
        for group in groups
    ]
    for requests in STEPS:
        scheduled = [ScheduledRequest(plan, n, n + 1, 16) for plan, n in requests]
        step = build_step(scheduled)
        begin_builds(groups, step.segments if step else {})
        build(groups, buffers.write([(request.start, request.end) for request in scheduled]))
        for group, metadata in zip(groups, captured, strict=True):
            expected = [
                request.plan.num_slots(request.end, group.kv_cache_spec.segment)
                if request.plan
                else request.end
                for request in scheduled
            ]
            padding = [0] * (CAPTURED_REQUESTS - len(expected))
            assert metadata.seq_lens.tolist() == expected + padding
            for name in ("query_start_loc", "slot_mapping"):
                runner_tensor = getattr(buffers.common, name)
                assert getattr(metadata, name).data_ptr() == runner_tensor.data_ptr()


@pytest.mark.parametrize("build", [build_as_v1, build_as_v2])
def test_a_graph_reads_flash_attention_3_s_schedule_of_the_step(llm, build, monkeypatch):
    """vLLM V1 builds the schedule for the first group only. Here it is the lengths times 10."""
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 3)
    monkeypatch.setattr(  # no such kernel on a CPU
        flash_attn,
        "get_scheduler_metadata",
        lambda cache_seqlens, **_: cache_seqlens * 10,
        raising=False,
    )
    compilation = llm.llm_engine.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.FULL_DECODE_ONLY)
    monkeypatch.setattr(compilation, "max_cudagraph_capture_size", 16)
    groups = staged_groups(llm, FlashAttentionBackend, segments=(0, 0, 1, 1, 2))
    buffers = Buffers()
    begin_builds(groups, {})
    captured = [
        group.build_metadata_for_cudagraph_capture(buffers.write([(0, 1)] * CAPTURED_REQUESTS))
        for group in groups
    ]
    requests = [ScheduledRequest(PLAN, 20, 21, 16), ScheduledRequest(None, 9, 10, 16)]
    step = build_step(requests)
    assert step is not None
    begin_builds(groups, step.segments)
    build(groups, buffers.write([(20, 21), (9, 10)]))
    schedules = [metadata.scheduler_metadata.tolist() for metadata in captured]
    lengths = [PLAN.num_slots(21, group.kv_cache_spec.segment) for group in groups]
    assert schedules == [[10 * length, 100, 0, 0] for length in lengths]


@pytest.mark.parametrize(
    ("backend", "support"),
    [
        (TritonAttentionBackend, AttentionCGSupport.UNIFORM_BATCH),
        (FlashAttentionBackend, AttentionCGSupport.UNIFORM_BATCH),
        (CPUAttentionBackend, AttentionCGSupport.NEVER),
    ],
)
def test_full_graphs_are_limited_to_decode_steps(llm, backend, support):
    (group,) = staged_groups(llm, CPUAttentionBackend, segments=(1,))
    builder = create_staged_attention_backend(backend).get_builder_cls()
    config = llm.llm_engine.vllm_config
    assert builder.get_cudagraph_support(config, group.kv_cache_spec) == support


def test_renumbered_positions_have_no_full_graphs(llm, monkeypatch):
    """A chunk with only a prompt's last token looks like a decode step, but runs in segments."""
    (group,) = staged_groups(llm, CPUAttentionBackend, segments=(1,))
    builder = create_staged_attention_backend(TritonAttentionBackend).get_builder_cls()
    config = llm.llm_engine.vllm_config
    settings = getattr(config.model_config.hf_config, CONFIG_KEY)
    monkeypatch.setitem(settings, "positions", "reference")
    support = builder.get_cudagraph_support(config, group.kv_cache_spec)
    assert support == AttentionCGSupport.NEVER


def layer_of_vllm(**features: Any) -> Any:
    plain: dict[str, Any] = {
        "sliding_window": None,
        "has_sink": False,
        "kv_sharing_target_layer_name": None,
        "head_size": 64,
        "head_size_v": 64,
        "attn_type": "decoder",
        "impl": SimpleNamespace(logits_soft_cap=0, alibi_slopes=None),
        "layer_name": "layers.3.attn",
    }
    return SimpleNamespace(**{**plain, **features})


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"sliding_window": 1024}, "a sliding window"),
        ({"has_sink": True}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "layers.1.attn"}, "a KV cache of another layer"),
        ({"head_size_v": 32}, "values of another size than keys"),
        ({"attn_type": "encoder_only"}, "type encoder_only"),
        ({"impl": SimpleNamespace(logits_soft_cap=30.0)}, "a soft cap on scores"),
        ({"impl": SimpleNamespace(alibi_slopes=torch.ones(4))}, "ALiBi slopes"),
    ],
)
def test_a_layer_with_a_feature_that_pruned_layers_lack_is_refused(features, name):
    config: Any = None
    with pytest.raises(NotImplementedError, match=f"layers.3.attn has {name}, which pruned layers"):
        StagedAttention.replacing(layer_of_vllm(**features), 1, config)
