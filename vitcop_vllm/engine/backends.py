"""Attention backends that stages can run on, and the choice among them for an NVIDIA GPU."""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends whose metadata holds block table and slots as plain fields. Others plan kernels from
them while they build metadata, so groups of one stage could not share one build."""

_TRITON_KV_CAPABILITY = {"fp8": (8, 9), "bfloat16": (8, 0)}
"""Least compute capability of a KV cache dtype with TRITON_ATTN. vLLM 0.32 lists the backend as
valid below it too and raises in the worker (``TritonAttentionImpl.__init__``)."""


def choose_backend(vllm_config: "VllmConfig") -> None:
    """Set the attention backend of an NVIDIA GPU, where the user set none.

    vLLM's default is FLASHINFER for some pairs of GPU and KV cache dtype. Stages then take the
    next of vLLM's own order that is one of :data:`BACKENDS`.

    Raises:
        ValueError: If no backend of :data:`BACKENDS` is valid for this GPU, model and KV cache
            dtype, or if the user chose another one.
    """
    attention = vllm_config.attention_config
    kind = "full_attention"  # of all layers that are staged
    chosen = attention.backend_per_kind.get(kind, attention.backend)
    cache_dtype = vllm_config.cache_config.cache_dtype
    valid = _valid_backends(vllm_config, cache_dtype)
    if not valid:
        raise ValueError(_why_none(vllm_config, cache_dtype))
    names = [backend.name for backend in valid]
    if chosen is None:
        attention.backend = valid[0]
        logger.info("Attention backend of the stages: %s.", names[0])
    elif chosen.name not in names:
        raise ValueError(
            f"visual token pruning cannot use attention backend {chosen.name} on "
            f"{_here(cache_dtype)}; set --attention-backend to {' or '.join(names)}, or leave it "
            "out"
        )


def _here(cache_dtype: str) -> str:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    assert capability is not None
    return (
        f"{current_platform.get_device_name()} (compute capability "
        f"{capability.as_version_str()}) with KV cache dtype {cache_dtype}"
    )


def _valid_backends(vllm_config: "VllmConfig", cache_dtype: str) -> list[Any]:
    """Backends of :data:`BACKENDS` that work here, in vLLM's order."""
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
    least = next((c for d, c in _TRITON_KV_CAPABILITY.items() if cache_dtype.startswith(d)), (0, 0))
    return [
        candidate.backend
        for candidate in candidates
        if candidate.backend.name in BACKENDS
        and (candidate.backend.name != "TRITON_ATTN" or capability >= least)
    ]


def _why_none(vllm_config: "VllmConfig", cache_dtype: str) -> str:
    sentence = f"visual token pruning has no attention backend for {_here(cache_dtype)}"
    if cache_dtype != "auto" and _valid_backends(vllm_config, "auto"):
        return f"{sentence}; set --kv-cache-dtype auto"
    return (
        f"{sentence} and this model (head size {vllm_config.model_config.get_head_size()}, "
        f"{vllm_config.model_config.dtype}); serve it with stock vLLM (VLLM_PLUGINS='')"
    )
