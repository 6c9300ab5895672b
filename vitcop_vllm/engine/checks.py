"""Rows of what start-up refuses: a combination of options that pruning cannot do right."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import floor
from typing import Any

from vitcop_vllm.engine.compiler import has_cpp_compiler
from vitcop_vllm.pruning.amount import AMOUNT_KEYS
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.settings import PruningSettings

V2_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
BREAKABLE_VARIABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def asks_for_v2() -> bool:
    """Whether the operator chose model runner V2, vLLM's default on GPUs.

    Our default is V1: V2 with pruning has run on CPUs only, with Triton's interpreter.
    """
    return os.environ.get(V2_VARIABLE) == "1"


def step_tokens(scheduler: Any) -> int:
    """Most tokens of a step, by vLLM's ``SchedulerConfig``."""
    tokens: int = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    return tokens


_KEY_NORM_DECODERS = ("qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text")
"""``model_type`` of decoders that normalise each head's key before attention."""


@dataclass(frozen=True)
class StartUp:
    """A configuration that the rows check.

    Attributes:
        vllm: vLLM's configuration, a ``VllmConfig``.
        settings: The operator's settings of pruning.
        has_cls: Whether the model's encoder has [CLS].
        decoders: ``model_type`` of the decoders that Stages II and III can prune; empty if
            they prune no decoder of the model's family.
        compares_frames: Whether Stage I can compare the frames of a video.
    """

    vllm: Any
    settings: PruningSettings
    has_cls: bool
    decoders: tuple[str, ...]
    compares_frames: bool = False

    @property
    def selector(self) -> Selector:
        return selector_of(self.settings.selector)

    @property
    def text(self) -> Any:
        """Configuration of the decoder."""
        return self.vllm.model_config.hf_text_config

    @property
    def is_staged(self) -> bool:
        """Whether all three Stages can prune the model. If not, only Stage I does."""
        return bool(self.decoders)

    @property
    def normalises_keys(self) -> bool:
        """Whether the decoder normalises each head's key before attention."""
        return self.text.model_type in _KEY_NORM_DECODERS

    @property
    def multimodal(self) -> Any:
        return self.vllm.model_config.get_multimodal_config()

    @property
    def vision(self) -> Any:
        """Configuration of the encoder."""
        return self.vllm.model_config.hf_config.vision_config

    @property
    def deepstack_levels(self) -> int:
        """First decoder layers after which the model adds features of the encoder."""
        return len(getattr(self.vision, "deepstack_visual_indexes", ()))

    @property
    def span_limit(self) -> int:
        """Most tokens of a pruned image: with Stages II and III, those of one request in a step."""
        if not self.is_staged:
            return sys.maxsize
        scheduler = self.vllm.scheduler_config
        limit, threshold = step_tokens(scheduler), scheduler.long_prefill_token_threshold
        return min(limit, threshold) if threshold > 0 else limit

    @property
    def boundaries(self) -> tuple[int, int]:
        return self.settings.boundaries(self.text.num_hidden_layers)

    @property
    def max_ratio(self) -> float:
        """Largest ratio that the selector can reach."""
        return self.selector.max_ratio(self.boundaries, self.text.num_hidden_layers)

    @property
    def max_ratio_down(self) -> float:
        """``max_ratio`` rounded down to four decimals: a setting of it is accepted."""
        return floor(self.max_ratio * 1e4) / 1e4


@dataclass(frozen=True)
class Check:
    """A row.

    Attributes:
        reason: What cannot work; ``str.format`` puts attributes of ``StartUp`` into braces.
        remedy: What to change, likewise.
        fails: Whether a start-up is refused.
    """

    reason: str
    remedy: str
    fails: Callable[[StartUp], object]

    def sentence(self, start_up: StartUp) -> str:
        return f"{self.reason}; {self.remedy}".format(start=start_up)


def find_obstacles(checks: Iterable[Check], start_up: StartUp) -> list[str]:
    """The sentences of all rows that refuse a start-up."""
    return [check.sentence(start_up) for check in checks if check.fails(start_up)]


def _has_head_scales(start: StartUp) -> bool:
    from vllm.v1.kv_cache_interface import kv_cache_uses_per_token_head_scales

    uses: bool = kv_cache_uses_per_token_head_scales(start.vllm.cache_config.cache_dtype)
    return uses


def _offloads_without_uva(start: StartUp) -> bool:
    from vllm import envs
    from vllm.utils.platform_utils import is_uva_available

    has_uva = is_uva_available() and not envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA
    return start.vllm.offload_config.uva.cpu_offload_gb > 0 and not has_uva


def _prefetches_weights(start: StartUp) -> bool:
    offload = start.vllm.offload_config
    prefetches: bool = offload.offload_backend != "uva" and offload.prefetch.offload_group_size > 0
    return prefetches


def _publishes_kv_events(start: StartUp) -> bool:
    events = start.vllm.kv_events_config
    return events is not None and events.enable_kv_cache_events


def _has_sliding_window(start: StartUp) -> bool:
    has_window = bool(getattr(start.text, "sliding_window", None))
    return has_window and getattr(start.text, "use_sliding_window", True)


def _compiles_whole_model(start: StartUp) -> bool:
    from vllm.config import CompilationMode

    return bool(start.vllm.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE)


def _compiles_without_compiler(start: StartUp) -> bool:
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    mode = start.vllm.compilation_config.mode
    if mode is None:  # vLLM chooses it after this check.
        compiles = start.vllm.optimization_level > 0 and not start.vllm.model_config.enforce_eager
    else:
        compiles = mode != CompilationMode.NONE
    return compiles and current_platform.is_cpu() and not has_cpp_compiler()


def _lacks_triton(start: StartUp) -> bool:
    from vllm.triton_utils import HAS_TRITON

    return not HAS_TRITON


ENGINE_CHECKS = (
    Check(
        "pipeline parallelism splits the decoder, which must stay in one process",
        "use --tensor-parallel-size instead",
        lambda start: start.vllm.parallel_config.pipeline_parallel_size > 1,
    ),
    Check(
        "microbatching splits a step, which is pruned as a whole",
        "remove --enable-dbo / --ubatch-size",
        lambda start: start.vllm.parallel_config.use_ubatching,
    ),
    Check(
        "the drafter of speculative decoding does not prune",
        "remove --speculative-config",
        lambda start: start.vllm.speculative_config is not None,
    ),
    Check(
        "a KV connector moves logical blocks",
        "remove --kv-transfer-config",
        lambda start: start.vllm.kv_transfer_config is not None,
    ),
    Check(
        # vLLM makes it a connector after this check.
        "KV offloading moves logical blocks",
        "remove --kv-offloading-size",
        lambda start: start.vllm.cache_config.kv_offloading_size is not None,
    ),
    Check(
        "an encoder-cache connector is untested here",
        "remove --ec-transfer-config",
        lambda start: start.vllm.ec_transfer_config is not None,
    ),
    Check(
        "LoRA maps adapters to unpruned rows",
        "remove --enable-lora",
        lambda start: start.vllm.lora_config is not None,
    ),
    Check(
        "prompt embeddings carry no image to prune",
        "remove --enable-prompt-embeds",
        lambda start: start.vllm.model_config.enable_prompt_embeds,
    ),
    Check(
        "another worker class is configured",
        "remove --worker-cls",
        lambda start: start.vllm.parallel_config.worker_cls != "auto",
    ),
    Check(
        f"{' and '.join(AMOUNT_KEYS[:2])} in --mm-processor-kwargs are not read",
        "set default_ratio instead",
        lambda start: {*AMOUNT_KEYS} & {*(start.multimodal.mm_processor_kwargs or {})},
    ),
)
"""What no pruned model can run with."""

STAGED_CHECKS = (
    Check(
        "context parallelism shards the KV cache by logical position",
        "unset --decode-context-parallel-size and --prefill-context-parallel-size",
        lambda start: (
            start.vllm.parallel_config.decode_context_parallel_size > 1
            or start.vllm.parallel_config.prefill_context_parallel_size > 1
        ),
    ),
    Check(
        "all layers must hold equal KV blocks",
        "remove --kv-cache-dtype-skip-layers",
        lambda start: start.vllm.cache_config.kv_cache_dtype_skip_layers,
    ),
    Check(
        # vLLM's own layers write scales in a warm-up; ours would write over other groups' blocks.
        "KV cache dtype {start.vllm.cache_config.cache_dtype} keeps scales of each token and head "
        "in KV blocks, which layers share",
        "set --kv-cache-dtype to auto or fp8",
        _has_head_scales,
    ),
    Check(
        "weights are prefetched for whole layers, and pruning can split a layer",
        "remove --offload-group-size, or offload with --cpu-offload-gb",
        _prefetches_weights,
    ),
    Check(
        "weights offloaded without UVA are fetched for whole layers, and pruning can split a layer",
        "unset VLLM_WEIGHT_OFFLOADING_DISABLE_UVA or remove --cpu-offload-gb",
        _offloads_without_uva,
    ),
    Check(
        "KV cache events name blocks by prompt position, and blocks of pruned layers have none",
        "remove --kv-events-config",
        _publishes_kv_events,
    ),
    Check(
        "prefixes are matched in whole blocks and at images' ends",
        "remove --prefix-match-unit",
        lambda start: (
            start.vllm.cache_config.prefix_match_unit
            not in (None, start.vllm.cache_config.block_size)
        ),
    ),
    Check(
        "pruned layers need their own KV cache groups",
        "remove --disable-hybrid-kv-cache-manager",
        lambda start: start.vllm.scheduler_config.disable_hybrid_kv_cache_manager is True,
    ),
    Check(
        "another scheduler class is configured",
        "remove --scheduler-cls",
        lambda start: start.vllm.scheduler_config.scheduler_cls is not None,
    ),
    Check(
        "sliding window attention already drops tokens by position",
        "serve this model with stock vLLM (VLLM_PLUGINS='')",
        _has_sliding_window,
    ),
    Check(
        "watermarking needs model runner V2",
        f"set {V2_VARIABLE}=1 or remove --watermark-config",
        lambda start: (
            getattr(start.vllm, "watermark_config", None) is not None and not asks_for_v2()
        ),
    ),
    Check(
        "model runner V2 needs Triton, which does not work here",
        f"unset {V2_VARIABLE}",
        lambda start: asks_for_v2() and _lacks_triton(start),
    ),
    Check(
        "model runner V2 would run a step that drops tokens from a breakable CUDA graph",
        f"unset {BREAKABLE_VARIABLE}",
        lambda start: asks_for_v2() and os.environ.get(BREAKABLE_VARIABLE) == "1",
    ),
    Check(
        "the decoder is compiled, and there is no C++ compiler",
        "install g++, or set --enforce-eager",
        _compiles_without_compiler,
    ),
    Check(
        "torch.compile of the whole model cannot follow dropped tokens",
        "unset the compilation config's mode",
        _compiles_whole_model,
    ),
    Check(
        "the decoder is {start.text.model_type}, and this model is pruned with one of "
        "{start.decoders}",
        "serve it with stock vLLM (VLLM_PLUGINS='')",
        lambda start: start.text.model_type not in start.decoders,
    ),
)
"""What Stages II and III cannot run with."""

_WHOLE_PROMPT = (
    "selector {start.settings.selector} reads the question, so a step must hold the longest prompt"
)

SETTINGS_CHECKS = (
    Check(
        "selector {start.settings.selector} keeps every visual token in the first "
        "{start.boundaries[0]} of {start.text.num_hidden_layers} layers",
        "set max_pruning_ratio to at most {start.max_ratio_down}",
        lambda start: start.settings.max_pruning_ratio > start.max_ratio,
    ),
    Check(
        _WHOLE_PROMPT,
        "raise --max-num-batched-tokens (and --max-num-scheduled-tokens) to "
        "{start.vllm.model_config.max_model_len}, or lower --max-model-len",
        lambda start: (
            start.selector.reads_question
            and step_tokens(start.vllm.scheduler_config) < start.vllm.model_config.max_model_len
        ),
    ),
    Check(
        _WHOLE_PROMPT,
        "unset --long-prefill-token-threshold",
        lambda start: (
            start.selector.reads_question
            and 0
            < start.vllm.scheduler_config.long_prefill_token_threshold
            < start.vllm.model_config.max_model_len
        ),
    ),
    Check(
        "kernels: triton needs a GPU that Triton supports",
        "set kernels to auto or torch",
        lambda start: start.settings.kernels == "triton" and _lacks_triton(start),
    ),
    Check(
        "selector {start.settings.selector} reads [CLS], which this model's encoder does not have",
        "set selector to vitcop or received",
        lambda start: start.selector.needs_cls and not start.has_cls,
    ),
    Check(
        "selector {start.settings.selector} does not read decoder_signal",
        "remove decoder_signal, or set selector to vitcop or key_norm",
        lambda start: (
            start.settings.decoder_signal is not None and not start.selector.ranks_by_signal
        ),
    ),
    Check(
        "encoder_signal: cls reads [CLS], which this model's encoder does not have",
        "set encoder_signal: received",
        lambda start: start.settings.encoder_signal == "cls" and not start.has_cls,
    ),
    Check(
        "selector {start.settings.selector} does not read encoder_signal",
        "remove encoder_signal, or set selector to vitcop",
        lambda start: (
            start.settings.encoder_signal is not None and not start.selector.has_two_sources
        ),
    ),
    Check(
        "compare_frames changes the order in which Stage I ranks tokens by saliency, and selector "
        "{start.settings.selector} does not rank them",
        "remove compare_frames, or set selector to vitcop or received",
        lambda start: start.settings.compare_frames and not start.selector.saliency,
    ),
    Check(
        "compare_frames compares the frames of a video, and no video of this model can be compared",
        "remove compare_frames",
        lambda start: start.settings.compare_frames and not start.compares_frames,
    ),
    Check(
        "positions: reference renumbers positions that this model takes from the image's grid",
        "set positions: original",
        lambda start: (
            start.settings.positions == "reference" and start.vllm.model_config.uses_mrope
        ),
    ),
)
"""What the selector and other settings need."""

STAGE_ONE_CHECKS = (
    Check(
        "selector {start.settings.selector} drops tokens between decoder layers, and this model "
        "is pruned by Stage I alone",
        "set selector to received, divprune, grid or random",
        lambda start: start.selector.prunes_decoder,
    ),
    Check(
        "this model is pruned by Stage I alone, so its decoder has no boundaries",
        "remove shallow_boundary and deep_boundary",
        lambda start: start.settings.shallow_boundary or start.settings.deep_boundary,
    ),
    Check(
        "this model is pruned by Stage I alone, which leaves all positions as they are",
        "set positions: original",
        lambda start: start.settings.positions == "reference",
    ),
    Check(
        "Stage I alone runs with model runner V1",
        f"unset {V2_VARIABLE}",
        lambda start: asks_for_v2(),
    ),
)
"""What a model cannot run with that Stage I alone prunes."""
