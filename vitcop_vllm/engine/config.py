"""Start-up: settle vLLM's configuration for pruning, or refuse with a sentence.

vLLM calls :class:`PrunedModelConfig` while it builds its configuration, before platform,
workers and scheduler are chosen. Selecting a pruned architecture is thus all a user does.
"""

import os
from typing import TYPE_CHECKING

from pydantic import ValidationError
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vitcop_vllm import __version__
from vitcop_vllm.engine.backends import choose_backend
from vitcop_vllm.engine.checks import (
    BREAKABLE_VARIABLE,
    DECODER_CHECK,
    ENGINE_CHECKS,
    SETTINGS_CHECKS,
    V2_VARIABLE,
    StartUp,
    asks_for_v2,
    find_obstacles,
)
from vitcop_vllm.engine.families import FAMILIES
from vitcop_vllm.pruning.plan import why_uncacheable
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.settings import CONFIG_KEY, PruningSettings, format_validation_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, VllmConfig

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
        family = FAMILIES[architecture]
        start_up = StartUp(
            vllm_config,
            settings,
            selector_of(settings.selector),
            has_cls=family.has_cls,
            decoders=family.decoders,
        )
        checks = (*ENGINE_CHECKS, DECODER_CHECK, *family.checks, *SETTINGS_CHECKS)
        if obstacles := find_obstacles(checks, start_up):
            raise ValueError(
                "visual token pruning cannot start with this configuration: " + "; ".join(obstacles)
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
        setattr(model_config.hf_config, SPAN_LIMIT_KEY, start_up.span_limit)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        vllm_config.parallel_config.worker_cls = worker
        # vLLM's key for compiled code is made of this. It sees neither our attention layers
        # nor hf_config, and would take a pruned model's code for the stock one's.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            CONFIG_KEY: settings.model_dump(mode="json"),
            "vitcop_vllm": __version__,
        }
        asked_for_v2 = asks_for_v2()
        if asked_for_v2:
            # vLLM would choose breakable graphs for batch invariance, after this.
            os.environ.setdefault(BREAKABLE_VARIABLE, "0")
        else:
            # Read wherever vLLM asks which runner it has; child processes inherit it, and so
            # does any other engine that this process starts later.
            os.environ[V2_VARIABLE] = "0"
        if vllm_config.use_v2_model_runner != asked_for_v2:
            raise ValueError(
                f"model runner {'V2' if asked_for_v2 else 'V1'} was asked for, and something in "
                "this configuration, or an engine started earlier in this process, asks for the "
                f"other: set {V2_VARIABLE}={int(not asked_for_v2)}"
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
