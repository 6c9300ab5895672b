"""Start-up with quantised checkpoints of every family, on a simulated NVIDIA GPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.stage_one_checkpoints import (
    save_random_gemma3,
    save_random_mistral3,
    save_random_qwen3_5,
)
from tests.engine.test_backends import choices_of
from tests.families.family import FAMILIES, Family

pytestmark = pytest.mark.slow

H100 = 9, 0

QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
}
"""``quantization_config`` of published checkpoints, by method."""

STAGE_ONE: dict[str, Callable[[Path], None]] = {
    "gemma3": save_random_gemma3,
    "qwen3_5": save_random_qwen3_5,
    "qwen3_5_moe": partial(save_random_qwen3_5, experts=4),
    "mistral3": save_random_mistral3,
}
CASES = [
    *((family.name, "fp8") for family in FAMILIES),
    *((name, "fp8") for name in STAGE_ONE),
    # Two decoders, one of experts: the others take no other way. A start-up takes seconds.
    *((name, method) for name in ("qwen2_5_vl", "qwen3_vl_moe") for method in ("awq", "gptq")),
]


@pytest.fixture(scope="module")
def choices(
    checkpoint_of: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """(model type, method) -> start-up's choice or error."""
    paths = {family.name: checkpoint_of(family) for family in FAMILIES}
    for name, save in STAGE_ONE.items():
        paths[name] = tmp_path_factory.mktemp(name)
        save(paths[name])
    cases = [
        (
            H100,
            {
                "model": str(paths[name]),
                "dtype": "bfloat16",
                "trust_remote_code": True,
                "hf_overrides": {"quantization_config": QUANTISED[method]},
            },
        )
        for name, method in CASES
    ]
    return dict(zip(CASES, choices_of(cases), strict=True))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_quantised_checkpoint_starts(
    choices: dict[tuple[str, str], dict[str, Any]], name: str, method: str
) -> None:
    choice = choices[name, method]
    assert "error" not in choice, choice
    assert method in choice["quantization"]  # vLLM may choose a faster variant, such as awq_marlin
    kind = "StageOne" if name in STAGE_ONE else "Staged"
    assert choice["worker"] == f"vitcop_vllm.worker.gpu_worker.{kind}GPUWorker"
