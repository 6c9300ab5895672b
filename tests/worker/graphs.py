"""Simulates full CUDA graphs of decode steps in vLLM's real model runners, on the CPU.

A replayed CUDA graph repeats the captured computation on the captured memory. Here, a replay
calls the model again with the captured inputs and metadata.
"""

from typing import Any

import pytest
import torch
from vllm import LLM
from vllm import _custom_ops as ops
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

CAPTURED_SIZES = [2, 4, 8, 16]


class GraphsOfV1(CUDAGraphWrapper):
    """Replaces the wrapper that model runner V1 puts around the model."""

    def __init__(self, model: torch.nn.Module, replayed: list[int]) -> None:
        self.runnable = model
        self.is_debugging_mode = False
        self.replayed = replayed
        self.captured: dict[Any, Any] = {}

    def __call__(self, **inputs: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self.runnable(**inputs)
        assert context.batch_descriptor is not None
        self.replayed.append(context.batch_descriptor.num_tokens)
        context, inputs = self.captured.setdefault(context.batch_descriptor, (context, inputs))
        with override_forward_context(context):
            return self.runnable(**inputs)


def _capture_v1(runner: Any, replayed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "model", GraphsOfV1(runner.model, replayed))
    dispatcher = CudagraphDispatcher(runner.vllm_config)
    monkeypatch.setattr(runner, "cudagraph_dispatcher", dispatcher)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_DECODE_ONLY)
    for mode, descriptors in dispatcher.get_capture_descs():
        runner._capture_cudagraphs(descriptors, cudagraph_runtime_mode=mode)


def _capture_v2(runner: Any, replayed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

    class Graph:
        def __init__(self, forward: Any, size: int) -> None:
            self.forward = forward
            self.size = size

        def replay(self) -> None:
            replayed.append(self.size)
            self.forward(CUDAGraphMode.NONE)

    def capture(manager: Any, create_forward_fn: Any, description: str) -> None:
        for desc in manager._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[desc] = Graph(forward, desc.num_tokens)
        manager._graphs_captured = True

    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    monkeypatch.setattr("vllm.platforms.current_platform.get_global_graph_pool", lambda: None)
    manager = ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1
    )
    monkeypatch.setattr(runner, "cudagraph_manager", manager)
    runner.capture_model(profile_only=True)  # CPUs have no workspace to lock


def capture_decode_graphs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make decode steps run from simulated graphs.

    Returns:
        A list to which each replay appends its graph's size.
    """
    forward = CPUAttentionBackendImpl.forward

    def planned(impl, layer, query, key, value, kv_cache, metadata, *args, **kwargs):
        # The host computes the CPU kernel's schedule, so a replay must compute it again.
        metadata.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=metadata.seq_lens.shape[0],
            num_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            seq_lens=metadata.seq_lens,
            dtype=query.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=False,
        )
        return forward(impl, layer, query, key, value, kv_cache, metadata, *args, **kwargs)

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", planned)
    config = llm.llm_engine.vllm_config.compilation_config
    monkeypatch.setattr(config, "cudagraph_mode", CUDAGraphMode.FULL_DECODE_ONLY)
    monkeypatch.setattr(config, "cudagraph_capture_sizes", CAPTURED_SIZES)
    monkeypatch.setattr(config, "max_cudagraph_capture_size", CAPTURED_SIZES[-1])
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    replayed: list[int] = []
    capture = _capture_v2 if hasattr(runner, "model_state") else _capture_v1
    capture(runner, replayed, monkeypatch)
    replayed.clear()
    return replayed
