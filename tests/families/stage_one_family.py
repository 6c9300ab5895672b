"""Families that Stage I alone prunes, and their tiny checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.qwen_checkpoint import SPECIALS
from tests.checkpoints.stage_one_checkpoints import (
    GEMMA_SPECIALS,
    MISTRAL_SPECIALS,
    save_random_gemma3,
    save_random_mistral3,
    save_random_qwen3_5,
)
from tests.engine.requests import ENGINE_OPTIONS


@dataclass(frozen=True)
class StageOneFamily:
    """A family and its tiny checkpoint.

    Attributes:
        name: Model type, as in the checkpoint's configuration.
        save: Writes the checkpoint to a folder.
        oracle: Class in ``stage_one_oracle``, which is imported late, like torch.
        image_token: Id of the image token.
        layers: Decoder layers.
        options: Of its engine.
        tolerance: Mean difference of log-probabilities from the oracle, which computes in float32.
        largest: Largest such difference. In bfloat16 it depends on the processor, and does not
            tell other tokens from the kept ones.
        row_mark: Id of the token after each row of an unpruned image, if there is one.
    """

    name: str
    save: Callable[[Path], None]
    oracle: str
    image_token: int
    layers: int
    options: dict[str, Any] = field(hash=False)
    tolerance: float
    largest: float
    row_mark: int | None = None


GEMMA3 = StageOneFamily(
    "gemma3",
    save_random_gemma3,
    "Gemma3",
    GEMMA_SPECIALS.index("<image_soft_token>"),
    layers=6,
    options=ENGINE_OPTIONS,
    tolerance=1e-4,
    largest=1e-3,
)
QWEN3_5 = StageOneFamily(
    "qwen3_5",
    save_random_qwen3_5,
    "Qwen35",
    SPECIALS.index("<|image_pad|>"),
    layers=4,
    # vLLM's linear attention on CPUs runs in bfloat16 and chooses its own block size.
    options={k: v for k, v in ENGINE_OPTIONS.items() if k != "block_size"} | {"dtype": "bfloat16"},
    tolerance=0.07,
    largest=0.3,
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    save=partial(save_random_qwen3_5, experts=4),
    oracle="Qwen35Moe",
)

MISTRAL3 = StageOneFamily(
    "mistral3",
    save_random_mistral3,
    "Mistral3",
    MISTRAL_SPECIALS.index("[IMG]"),
    layers=4,
    options=ENGINE_OPTIONS,
    tolerance=1e-4,
    largest=1e-3,
    row_mark=MISTRAL_SPECIALS.index("[IMG_BREAK]"),
)

STAGE_ONE_FAMILIES = (GEMMA3, QWEN3_5, QWEN3_5_MOE, MISTRAL3)
