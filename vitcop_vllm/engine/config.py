"""Start-up: change vLLM's configuration for pruning, or refuse it with a sentence.

vLLM calls :class:`PrunedModelConfig` while it builds its configuration, before it chooses workers
and scheduler. So a user only chooses a model whose architecture is pruned.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vitcop_vllm import __version__
from vitcop_vllm.engine.backends import choose_backend
from vitcop_vllm.engine.checks import (
    BREAKABLE_VARIABLE,
    ENGINE_CHECKS,
    SETTINGS_CHECKS,
    STAGE_ONE_CHECKS,
    STAGED_CHECKS,
    V2_VARIABLE,
    StartUp,
    asks_for_v2,
    find_obstacles,
)
from vitcop_vllm.engine.families import FAMILIES
from vitcop_vllm.pruning.amount import default_amount
from vitcop_vllm.pruning.plan import why_uncacheable
from vitcop_vllm.pruning.settings import CONFIG_KEY, PruningSettings, format_validation_error
from vitcop_vllm.pruning.signals import DEFAULT_SIGNAL, DEFAULT_SIGNAL_OF_NORMALISED_KEYS

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import CacheConfig, ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

CPU_BLOCK_SIZE = 32
"""Tokens. vLLM's CPU kernels want multiples of 32; its default 128 wastes most of the
last block of a segment that holds a few dozen tokens."""

SCHEDULER = "vitcop_vllm.engine.scheduler.create_scheduler"
WORKERS = {
    "cpu": "vitcop_vllm.worker.cpu_worker.StagedCPUWorker",
    "cuda": "vitcop_vllm.worker.gpu_worker.StagedGPUWorker",
}

STAGE_ONE_WORKERS = {
    "cpu": "vitcop_vllm.worker.cpu_worker.StageOneCPUWorker",
    "cuda": "vitcop_vllm.worker.gpu_worker.StageOneGPUWorker",
}
"""Workers of models that Stage I alone prunes."""

SPAN_LIMIT_KEY = "pruning_span_limit"
"""Attribute of hf_config: most tokens of a pruned image in a step."""


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


VLLM_HOOKS: dict[str, type[VerifyAndUpdateConfig]] = {}
"""Architecture -> vLLM's own hook for it, which ours calls first."""


class PrunedModelConfig(VerifyAndUpdateConfig):
    """The hook that vLLM calls for each pruned architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        if (hook := VLLM_HOOKS.get(model_config.architecture)) is not None:
            hook.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot work, then choose block size, worker, scheduler and model runner.

        Raises:
            ValueError: Naming every obstacle and what to change.
        """
        settings = _read_settings(vllm_config)
        architecture = vllm_config.model_config.architecture
        if (hook := VLLM_HOOKS.get(architecture)) is not None:
            hook.verify_and_update_config(vllm_config)
        family = FAMILIES[architecture]
        if family.decoders:
            _choose_block_size(vllm_config.cache_config)
        start_up = StartUp(
            vllm_config, settings, family.has_cls, family.decoders, family.compares_frames
        )
        start_up = _with_defaults(start_up)
        staged = start_up.is_staged
        of_stages = STAGED_CHECKS if staged else STAGE_ONE_CHECKS
        checks = (*ENGINE_CHECKS, *of_stages, *family.checks, *SETTINGS_CHECKS)
        if obstacles := find_obstacles(checks, start_up):
            raise ValueError(
                "visual token pruning cannot start with this configuration: " + "; ".join(obstacles)
            )
        settings = start_up.settings
        _warn_of_untried_signal(start_up)
        _choose_worker(vllm_config, WORKERS if staged else STAGE_ONE_WORKERS)
        if staged:
            _stage_decoder(vllm_config, settings)
        _pass_settings_on(vllm_config, settings, start_up.span_limit)
        _choose_model_runner(vllm_config)
        logger.info(
            "Visual token pruning: selector %s%s; %s; ratio %s by default, at most %g; "
            "%s positions; prefix caching %s.",
            settings.selector,
            ", frames of videos compared" if settings.compare_frames else "",
            _describe_segments(start_up),
            default_amount(settings),
            settings.max_pruning_ratio,
            settings.positions,
            "on" if vllm_config.cache_config.enable_prefix_caching else "off",
        )


def _describe_segments(start_up: StartUp) -> str:
    if not start_up.is_staged:
        return "Stage I alone"
    shallow, deep = start_up.boundaries
    return f"segments begin at layers 0, {shallow}, {deep} of {start_up.text.num_hidden_layers}"


def _with_defaults(start_up: StartUp) -> StartUp:
    """The start-up with the settings whose defaults depend on the model."""
    settings = start_up.settings
    defaults: dict[str, object] = {}
    if not start_up.is_staged and "selector" not in settings.model_fields_set:
        settings = settings.model_copy(update={"selector": _default_in_encoder(start_up)})
        start_up = replace(start_up, settings=settings)
    levels = start_up.deepstack_levels
    if levels and settings.shallow_boundary is None and start_up.boundaries[0] < levels:
        defaults["shallow_boundary"] = levels
    if settings.decoder_signal is None and start_up.selector.ranks_by_signal:
        defaults["decoder_signal"] = (
            DEFAULT_SIGNAL_OF_NORMALISED_KEYS if start_up.normalises_keys else DEFAULT_SIGNAL
        )
    return replace(start_up, settings=settings.model_copy(update=defaults))


def _default_in_encoder(start_up: StartUp) -> str:
    """The selector of a model that Stage I alone prunes: ViTCoP's Stage I at the whole budget."""
    return "cls" if start_up.has_cls else "received"


def _warn_of_untried_signal(start_up: StartUp) -> None:
    if start_up.normalises_keys and start_up.selector.ranks_by_signal:
        logger.warning(
            "This model's decoder normalises keys, so their published norm tells nothing, and "
            "Stages II and III rank tokens by decoder_signal %r. No trained weights have judged "
            "it yet: compare answers at the ratios that you serve.",
            start_up.settings.decoder_signal,
        )


def _stage_decoder(vllm_config: "VllmConfig", settings: PruningSettings) -> None:
    """Choose what a decoder in segments needs: attention backend and scheduler."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        choose_backend(vllm_config)
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    _turn_caching_off(vllm_config.cache_config, settings)


def _choose_block_size(cache_config: "CacheConfig") -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not cache_config.user_specified_block_size:
        cache_config.block_size = CPU_BLOCK_SIZE
        cache_config.user_specified_block_size = True


def _choose_worker(vllm_config: "VllmConfig", workers: Mapping[str, str]) -> None:
    """Choose the worker of the device.

    Raises:
        ValueError: If there is none for this device.
    """
    from vllm.platforms import current_platform

    # ROCm also calls its devices "cuda".
    device = "rocm" if current_platform.is_rocm() else current_platform.device_type
    if device not in workers:
        raise ValueError(
            f"visual token pruning runs on CPUs and NVIDIA GPUs, not on {device}; serve with "
            "stock vLLM there (VLLM_PLUGINS='')"
        )
    vllm_config.parallel_config.worker_cls = workers[device]


def _turn_caching_off(cache_config: "CacheConfig", settings: PruningSettings) -> None:
    """Turn prefix caching off where it would be wrong."""
    if cache_config.enable_prefix_caching and (reason := why_uncacheable(settings)):
        # Here nothing tells vLLM's default from an operator's flag. Our server still knows the
        # flag, and refuses it.
        logger.warning("Prefix caching is off: %s.", reason)
        cache_config.enable_prefix_caching = False


def _pass_settings_on(
    vllm_config: "VllmConfig", settings: PruningSettings, span_limit: int
) -> None:
    """Put the settings where processor, model and compile cache read them."""
    values = settings.model_dump(mode="json")
    # The processor gets the model's configuration and nothing else of vLLM's.
    hf_config = vllm_config.model_config.hf_config
    setattr(hf_config, CONFIG_KEY, values)
    setattr(hf_config, SPAN_LIMIT_KEY, span_limit)
    # Part of vLLM's key for compiled code. The key contains neither our attention layers nor
    # hf_config, so vLLM would load the stock model's code.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        CONFIG_KEY: values,
        "vitcop_vllm": __version__,
    }


def _choose_model_runner(vllm_config: "VllmConfig") -> None:
    """Model runner V1, unless the operator set V2.

    Raises:
        ValueError: If vLLM takes the other one.
    """
    wants_v2 = asks_for_v2()
    if wants_v2:
        # For batch invariance vLLM would choose breakable graphs later.
        os.environ.setdefault(BREAKABLE_VARIABLE, "0")
    else:
        # vLLM reads the variable in several places. Child processes inherit it, and so does any
        # engine that this process starts later.
        os.environ[V2_VARIABLE] = "0"
    if vllm_config.use_v2_model_runner != wants_v2:
        raise ValueError(
            f"pruning would use model runner {'V2' if wants_v2 else 'V1'}, and something in this "
            "configuration, or an engine started earlier in this process, chose the other: set "
            f"{V2_VARIABLE}={int(not wants_v2)}"
        )
