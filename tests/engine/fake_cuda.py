"""A program that prints the backend and worker chosen at start-up on simulated NVIDIA GPUs.

Argument: a JSON list of [compute capability, engine options]. Prints a JSON list with the attention
backend, the worker and the quantisation, or the error, of each case.

vLLM's own CUDA platform makes the choice. Its compiled operators are stubs, and the simulated
GPU reports the case's capability.
"""

import json
import os
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

OPERATORS = (
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp8",
    "rotary_embedding",
)
"""Compiled operators that vLLM looks up at import. The program calls none of them."""

capability = (0, 0)


def stub(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def become_cuda() -> None:
    """Make this CPU build of vLLM use its CUDA platform with the simulated GPU."""
    stub("vllm._C_stable_libtorch")
    for name in OPERATORS:
        setattr(torch.ops._C, name, MagicMock())
    # FlashAttention 2, 3 and 4 seem installed; vLLM knows on which GPUs each runs.
    stub("vllm.vllm_flash_attn._vllm_fa2_C")
    stub("vllm.vllm_flash_attn._vllm_fa3_C")
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Card(cuda.NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "Some GPU"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 2**30

    import vllm.platforms

    vllm.platforms._current_platform = Card()
    from vllm.vllm_flash_attn import flash_attn_interface

    flash_attn_interface.FA4_AVAILABLE = True


def choose(options: dict[str, Any]) -> dict[str, str | None]:
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(max_model_len=1024, **options).create_engine_config()
    except ValueError as error:
        return {"error": str(error)}
    backend = config.attention_config.backend
    return {
        "backend": backend.name if backend else "",
        "worker": config.parallel_config.worker_cls,
        "quantization": config.model_config.quantization,
    }


def main() -> None:
    global capability
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    become_cuda()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    choices = []
    for (major, minor), options in json.loads(sys.argv[1]):
        capability = (major, minor)
        choices.append(choose(options))
    print(json.dumps(choices))


if __name__ == "__main__":
    main()
