"""Attention backends that segments can run on, and the choice among them for an NVIDIA GPU."""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends whose metadata holds block table and slots as plain fields. Other backends plan kernels
from block table and slots while they build metadata, so groups of a segment cannot share one."""

_TRITON_KV_CAPABILITY = {"fp8": (8, 9), "bfloat16": (8, 0)}
"""KV cache dtype -> minimum compute capability for TRITON_ATTN. On older GPUs vLLM 0.32 lists the
backend as valid all the same, then raises in the worker (``TritonAttentionImpl.__init__``)."""


def choose_backend(vllm_config: "VllmConfig") -> None:
    """Set the attention backend of an NVIDIA GPU if the user set none.

    For some pairs of GPU and KV cache dtype vLLM's default is FLASHINFER, which pruned layers
    cannot use. So this sets the first backend in vLLM's order that is one of :data:`BACKENDS`.

    Raises:
        ValueError: If no backend of :data:`BACKENDS` is valid for this GPU, model and KV cache
            dtype, or if the user chose an invalid backend.
    """
    attention = vllm_config.attention_config
    kind = "full_attention"  # the kind of all staged layers
    chosen = attention.backend_per_kind.get(kind, attention.backend)
    cache_dtype = vllm_config.cache_config.cache_dtype
    valid = _valid_backends(vllm_config, cache_dtype)
    if not valid:
        raise ValueError(_no_backend_message(vllm_config, cache_dtype))
    names = [backend.name for backend in valid]
    if chosen is None:
        attention.backend = valid[0]
        logger.info("Visual token pruning uses attention backend %s.", names[0])
    elif chosen.name not in names:
        raise ValueError(
            f"visual token pruning cannot use attention backend {chosen.name} on "
            f"{_describe_gpu(cache_dtype)}; set --attention-backend to {' or '.join(names)}, or "
            "leave it out"
        )


def _describe_gpu(cache_dtype: str) -> str:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    assert capability is not None
    return (
        f"{current_platform.get_device_name()} (compute capability "
        f"{capability.as_version_str()}) with KV cache dtype {cache_dtype}"
    )


def _valid_backends(vllm_config: "VllmConfig", cache_dtype: str) -> list[Any]:
    """Backends of :data:`BACKENDS` that support this GPU and model, in vLLM's order."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    model, cache = vllm_config.model_config, vllm_config.cache_config
    capability: Any = current_platform.get_device_capability()
    platform: Any = current_platform
    candidates, _ = platform.get_valid_backends(
        capability,
        AttentionSelectorConfig(
            head_size=model.get_head_size(),
            dtype=model.dtype,
            kv_cache_dtype=cache_dtype,
            block_size=cache.block_size if cache.user_specified_block_size else None,
            use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        ),
        num_heads=model.get_num_attention_heads(vllm_config.parallel_config),
    )
    triton_capability = next(
        (c for dtype, c in _TRITON_KV_CAPABILITY.items() if cache_dtype.startswith(dtype)), (0, 0)
    )
    return [
        candidate.backend
        for candidate in candidates
        if candidate.backend.name in BACKENDS
        and (candidate.backend.name != "TRITON_ATTN" or capability >= triton_capability)
    ]


def _no_backend_message(vllm_config: "VllmConfig", cache_dtype: str) -> str:
    sentence = f"visual token pruning has no attention backend for {_describe_gpu(cache_dtype)}"
    if cache_dtype != "auto" and _valid_backends(vllm_config, "auto"):
        return f"{sentence}; set --kv-cache-dtype auto"
    return (
        f"{sentence} and this model (head size {vllm_config.model_config.get_head_size()}, "
        f"{vllm_config.model_config.dtype}); serve it with stock vLLM (VLLM_PLUGINS='')"
    )
