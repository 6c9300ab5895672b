"""Start-up: settle vLLM's configuration for pruning, or refuse with a sentence.

vLLM calls :class:`PrunedModelConfig` while it builds its configuration, before platform,
workers and scheduler are chosen. Selecting a pruned architecture is thus all a user does.
"""

import os
from math import floor
from typing import TYPE_CHECKING

from pydantic import ValidationError
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vitcop_vllm import __version__
from vitcop_vllm.engine.backends import choose_backend
from vitcop_vllm.engine.families import FAMILIES, Checks, Family
from vitcop_vllm.pruning.budgets import SELECTORS, why_uncacheable
from vitcop_vllm.pruning.settings import (
    CONFIG_KEY,
    RATIO_KEY,
    PruningSettings,
    format_validation_error,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

CPU_BLOCK_SIZE = 32
"""Tokens. vLLM's CPU kernels want multiples of 32; its default 128 wastes most of the
last block of a stage that holds a few dozen tokens."""

SCHEDULER = "vitcop_vllm.engine.scheduler.create_scheduler"
WORKERS = {
    "cpu": "vitcop_vllm.worker.cpu_worker.StagedCPUWorker",
    "cuda": "vitcop_vllm.worker.gpu_worker.StagedGPUWorker",
}

SPAN_LIMIT_KEY = "pruning_span_limit"
"""Where start-up puts how many tokens of a pruned image a step can hold, in hf_config."""

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def pruning_settings_of(hf_config: "PretrainedConfig") -> PruningSettings:
    """The settings start-up has put into a pruned model's configuration."""
    return PruningSettings(**getattr(hf_config, CONFIG_KEY))


def span_limit_of(hf_config: "PretrainedConfig") -> int:
    """Largest n1 of a pruned image: a step computes all of it."""
    limit: int = getattr(hf_config, SPAN_LIMIT_KEY)
    return limit


def _read_settings(vllm_config: "VllmConfig") -> PruningSettings:
    additional = vllm_config.additional_config
    given = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else None
    if not isinstance(given, dict):
        raise ValueError(
            f"additional config must be a mapping, and {CONFIG_KEY!r} in it a mapping of "
            "pruning settings"
        )
    try:
        return PruningSettings(**given)
    except ValidationError as error:
        raise ValueError(f"bad pruning settings: {format_validation_error(error)}") from None


def _round_down(ratio: float) -> float:
    """To four decimals; who sets what a sentence names must not be refused again."""
    return floor(ratio * 1e4) / 1e4


def _asks_for_v2() -> bool:
    """Whether the operator chose model runner V2, vLLM's default on GPUs.

    Ours is V1 unless told otherwise: pruning in V2 has been run on CPUs only, with Triton's
    interpreter.
    """
    return os.environ.get(_RUNNER) == "1"


def step_tokens(scheduler: "SchedulerConfig") -> int:
    """Most tokens of a step."""
    tokens: int = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    return tokens


def _span_limit(scheduler: "SchedulerConfig") -> int:
    """Most tokens of one request in a step."""
    threshold = scheduler.long_prefill_token_threshold
    return min(step_tokens(scheduler), threshold) if threshold > 0 else step_tokens(scheduler)


def _engine_checks(vllm_config: "VllmConfig") -> Checks:
    """What the engine cannot do right together with stages, whatever the model."""
    from vllm import envs
    from vllm.config import CompilationMode
    from vllm.utils.platform_utils import is_uva_available
    from vllm.v1.kv_cache_interface import kv_cache_uses_per_token_head_scales

    v2 = _asks_for_v2()
    model_config = vllm_config.model_config
    cache_config = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    offload = vllm_config.offload_config
    text_config = model_config.hf_text_config
    mm_config = model_config.get_multimodal_config()
    return {
        "pipeline parallelism splits the stages; use --tensor-parallel-size instead": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism shards the KV cache by logical position; unset "
        "--decode-context-parallel-size and --prefill-context-parallel-size": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "microbatching cuts a step between stages; remove --enable-dbo / --ubatch-size": (
            parallel.use_ubatching
        ),
        "speculative decoding has no stages in its drafter; remove --speculative-config": (
            vllm_config.speculative_config is not None
        ),
        "a KV connector moves logical blocks; remove --kv-transfer-config": (
            vllm_config.kv_transfer_config is not None
        ),
        # vLLM makes it a connector after this.
        "KV offloading moves logical blocks; remove --kv-offloading-size": (
            cache_config.kv_offloading_size is not None
        ),
        "layers of one stage must hold equal blocks; remove --kv-cache-dtype-skip-layers": (
            bool(cache_config.kv_cache_dtype_skip_layers)
        ),
        # vLLM's own layers write scales in a warm-up; ours would write over other groups'.
        f"KV cache dtype {cache_config.cache_dtype} keeps scales of each token and head in the "
        "blocks, which stages share; set --kv-cache-dtype to auto or fp8": (
            kv_cache_uses_per_token_head_scales(cache_config.cache_dtype)
        ),
        "prefetched weights are fetched for whole layers, and stages end inside one; remove "
        "--offload-group-size, or offload with --cpu-offload-gb": (
            offload.offload_backend != "uva" and offload.prefetch.offload_group_size > 0
        ),
        "weights offloaded without UVA are fetched for whole layers, and stages end inside one; "
        "unset VLLM_WEIGHT_OFFLOADING_DISABLE_UVA or remove --cpu-offload-gb": (
            offload.uva.cpu_offload_gb > 0
            and (envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA or not is_uva_available())
        ),
        "KV cache events tell blocks of prompt positions, which a stage's are not; remove "
        "--kv-events-config": (
            vllm_config.kv_events_config is not None
            and vllm_config.kv_events_config.enable_kv_cache_events
        ),
        "prefixes are matched in whole blocks and at images' ends; remove --prefix-match-unit": (
            cache_config.prefix_match_unit not in (None, cache_config.block_size)
        ),
        "an encoder-cache connector is untested here; remove --ec-transfer-config": (
            vllm_config.ec_transfer_config is not None
        ),
        "LoRA maps adapters to unpruned rows; remove --enable-lora": (
            vllm_config.lora_config is not None
        ),
        "prompt embeddings carry no image to prune; remove --enable-prompt-embeds": (
            model_config.enable_prompt_embeds
        ),
        "stages need their own KV cache groups; remove --disable-hybrid-kv-cache-manager": (
            scheduler.disable_hybrid_kv_cache_manager is True
        ),
        "another scheduler class is configured; remove --scheduler-cls": (
            scheduler.scheduler_cls is not None
        ),
        "another worker class is configured; remove --worker-cls": (parallel.worker_cls != "auto"),
        "sliding window attention already drops tokens by position": (
            bool(getattr(text_config, "sliding_window", None))
            and getattr(text_config, "use_sliding_window", True)
        ),
        f"{RATIO_KEY} in --mm-processor-kwargs is not read; set default_ratio instead": (
            RATIO_KEY in (mm_config.mm_processor_kwargs or {})
        ),
        f"watermarking needs model runner V2; set {_RUNNER}=1 or remove --watermark-config": (
            getattr(vllm_config, "watermark_config", None) is not None and not v2
        ),
        "model runner V2 would run a step that drops tokens from a breakable CUDA graph; unset "
        f"{_BREAKABLE}": v2 and os.environ.get(_BREAKABLE) == "1",
        "torch.compile of the whole model cannot follow dropped tokens; unset the compilation "
        "config's mode": (
            vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE
        ),
    }


def _settings_checks(
    vllm_config: "VllmConfig", settings: PruningSettings, boundaries: tuple[int, int]
) -> Checks:
    """What the selector and the other settings need."""
    from vllm.triton_utils import HAS_TRITON

    scheduler = vllm_config.scheduler_config
    longest = vllm_config.model_config.max_model_len
    name, selector = settings.selector, SELECTORS[settings.selector]
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    max_ratio = selector.max_ratio(boundaries, num_layers)
    whole_prompt = f"selector {name} reads the question, so a step must hold the longest prompt"
    return {
        f"selector {name} keeps every visual token in the first {boundaries[0]} of {num_layers} "
        f"layers; set max_pruning_ratio to at most {_round_down(max_ratio)}": (
            settings.max_pruning_ratio > max_ratio
        ),
        f"{whole_prompt}; raise --max-num-batched-tokens (and --max-num-scheduled-tokens) to "
        f"{longest}, or lower --max-model-len": selector.reads_question
        and step_tokens(scheduler) < longest,
        f"{whole_prompt}; unset --long-prefill-token-threshold": (
            selector.reads_question and 0 < scheduler.long_prefill_token_threshold < longest
        ),
        "kernels: triton needs a GPU that Triton supports; set kernels to auto or torch": (
            settings.kernels == "triton" and not HAS_TRITON
        ),
    }


def _family_checks(vllm_config: "VllmConfig", settings: PruningSettings, family: Family) -> Checks:
    """What the model's family needs, of itself and of the settings."""
    model_config = vllm_config.model_config
    text_config = model_config.hf_text_config
    return {
        f"the decoder must be {' or '.join(family.decoders)}, not {text_config.model_type}; serve "
        "it with stock vLLM (VLLM_PLUGINS='')": text_config.model_type not in family.decoders,
        f"selector {settings.selector} reads [CLS], which this model's encoder does not have; set "
        "selector to vitcop or received": (
            SELECTORS[settings.selector].encoder == "cls_attention" and not family.has_cls
        ),
        "positions: reference renumbers positions that this model takes from the image's grid; "
        "set positions: original": settings.positions == "reference" and model_config.uses_mrope,
        **family.checks(vllm_config),
    }


VLLM_HOOKS: dict[str, type[VerifyAndUpdateConfig]] = {}
"""Architecture -> the hook that vLLM itself has for it; ours calls it first."""


class PrunedModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook per architecture, for all pruned ones."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        if (theirs := VLLM_HOOKS.get(model_config.architecture)) is not None:
            theirs.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot work, then choose block size, runner, worker, scheduler.

        Raises:
            ValueError: Naming every obstacle and what to change.
        """
        from vllm.platforms import current_platform

        settings = _read_settings(vllm_config)
        model_config = vllm_config.model_config
        cache_config = vllm_config.cache_config
        architecture = model_config.architecture
        if (theirs := VLLM_HOOKS.get(architecture)) is not None:
            theirs.verify_and_update_config(vllm_config)
        if current_platform.is_cpu() and not cache_config.user_specified_block_size:
            cache_config.block_size = CPU_BLOCK_SIZE
            cache_config.user_specified_block_size = True
        num_layers = model_config.hf_text_config.num_hidden_layers
        boundaries = settings.boundaries(num_layers)
        checks = {
            **_engine_checks(vllm_config),
            **_family_checks(vllm_config, settings, FAMILIES[architecture]),
            **_settings_checks(vllm_config, settings, boundaries),
        }
        if broken := [sentence for sentence, is_broken in checks.items() if is_broken]:
            raise ValueError(
                "visual token pruning cannot start with this configuration: " + "; ".join(broken)
            )
        # ROCm also calls its devices "cuda".
        device = "rocm" if current_platform.is_rocm() else current_platform.device_type
        worker = WORKERS.get(device)
        if worker is None:
            raise ValueError(
                f"visual token pruning runs on CPUs and NVIDIA GPUs, not on {device}; serve with "
                "stock vLLM there (VLLM_PLUGINS='')"
            )
        if current_platform.is_cuda():
            choose_backend(vllm_config)

        # The processor sees the model's configuration and nothing else of vLLM's.
        setattr(model_config.hf_config, CONFIG_KEY, settings.model_dump(mode="json"))
        if cache_config.enable_prefix_caching and (reason := why_uncacheable(settings)):
            # Whether it was asked for or is vLLM's default, nobody can tell any more. Our
            # server still can, and refuses.
            logger.warning("Prefix caching is off: %s.", reason)
            cache_config.enable_prefix_caching = False
        # A pruned image's tokens are selected together, so a step computes all of them.
        setattr(model_config.hf_config, SPAN_LIMIT_KEY, _span_limit(vllm_config.scheduler_config))
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        vllm_config.parallel_config.worker_cls = worker
        # vLLM's key for compiled code is made of this. It sees neither our attention layers
        # nor hf_config, and would take a pruned model's code for the stock one's.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            CONFIG_KEY: settings.model_dump(mode="json"),
            "vitcop_vllm": __version__,
        }
        asked_for_v2 = _asks_for_v2()
        if asked_for_v2:
            # vLLM would choose breakable graphs for batch invariance, after this.
            os.environ.setdefault(_BREAKABLE, "0")
        else:
            # Read wherever vLLM asks which runner it has; child processes inherit it, and so
            # does any other engine that this process starts later.
            os.environ[_RUNNER] = "0"
        if vllm_config.use_v2_model_runner != asked_for_v2:
            raise ValueError(
                f"model runner {'V2' if asked_for_v2 else 'V1'} was asked for, and something in "
                "this configuration, or an engine started earlier in this process, asks for the "
                f"other: set {_RUNNER}={int(not asked_for_v2)}"
            )
        logger.info(
            "Visual token pruning: selector %s; stages begin at layers 0, %d, %d of %d; ratio "
            "%g by default, at most %g; %s positions; prefix caching %s.",
            settings.selector,
            *boundaries,
            num_layers,
            settings.default_ratio,
            settings.max_pruning_ratio,
            settings.positions,
            "on" if cache_config.enable_prefix_caching else "off",
        )
