"""The table of what an image costs, in docs/compatibility.md, is what the plans say."""

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from benchmarks import llava_next_checkpoint, qwen3_checkpoint, qwen_checkpoint
from benchmarks.internvl_checkpoint import InternVLShape
from benchmarks.llava_onevision_checkpoint import LlavaOnevisionShape, all_pinpoints
from tests.checkpoints import tiny
from vitcop_vllm.pruning.plan import plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

ROOT = Path(__file__).parents[1]
SIZE = 1024, 768
HEAD_SIZE, BYTES = 128, 2


class Published(NamedTuple):
    """Sizes from a published checkpoint's config.json, and V of an image of :data:`SIZE`."""

    layers: int
    kv_heads: int
    visual_tokens: int


ONEVISION: LlavaOnevisionShape = replace(
    tiny.LLAVA_ONEVISION, tile_size=384, pinpoints=all_pinpoints(384)
)

INTERNVL: InternVLShape = replace(tiny.INTERNVL_CHAT, tile_size=448, max_tiles=12)

PUBLISHED = {
    "llava-1.5-7b": Published(32, 32, 576),
    "llava-1.5-13b": Published(40, 40, 576),
    "llava-next-7b": Published(32, 8, llava_next_checkpoint.SMALL.tokens_of(*SIZE)),
    "llava-onevision-7b": Published(28, 4, ONEVISION.tokens_of(*SIZE)),
    "qwen3-vl-8b": Published(36, 8, qwen3_checkpoint.SMALL.tokens_of(*SIZE)),
    "qwen3-vl-30b-a3b": Published(48, 4, qwen3_checkpoint.SMALL.tokens_of(*SIZE)),
    "internvl3-8b": Published(28, 4, INTERNVL.tokens_of(*SIZE)),
    "qwen2.5-vl-7b": Published(28, 4, qwen_checkpoint.SMALL.tokens_of(*SIZE)),
    "qwen2.5-vl-72b": Published(80, 8, qwen_checkpoint.SMALL.tokens_of(*SIZE)),
}


STAGE_ONE = {
    "gemma-3-12b": 256,
    "qwen3.5-27b": qwen3_checkpoint.SMALL.tokens_of(*SIZE),
    "qwen3.5-35b-a3b": qwen3_checkpoint.SMALL.tokens_of(*SIZE),
    # Tokens of 28 pixels, images of up to 1540.
    "mistral-small-3.1-24b": ceil(SIZE[0] / 28) * ceil(SIZE[1] / 28),
}
"""V of an image of :data:`SIZE`, for models that Stage I alone prunes."""


def row_of(name: str) -> str:
    layers, kv_heads, visual = PUBLISHED[name]
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings = PruningSettings(**config["pruning"])
    shallow, deep = settings.boundaries(layers)
    lengths = [shallow, deep - shallow, layers - deep]
    counts = plan_counts(settings, 8 / 9, layers, visual)
    bytes_per_token = 2 * kv_heads * HEAD_SIZE * BYTES
    unpruned = visual * layers * bytes_per_token / 2**20
    pruned = counts.layer_average((shallow, deep), layers) * layers * bytes_per_token / 2**20
    groups = sum(ceil(length / min(lengths)) for length in lengths)
    kept = " / ".join(f"{n:,}" for n in counts.stages)
    return f"| `{name}` | {visual:,} | {kept} | {unpruned:.0f} MiB | {pruned:.0f} MiB | {groups} |"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_table_of_costs_is_that_of_the_plans(name: str) -> None:
    assert row_of(name) in (ROOT / "docs" / "compatibility.md").read_text()


VIDEO_SIZE = 640, 360
KV_BYTES = 8 * 2**30

FRAMES = {
    "qwen2.5-vl-7b": qwen_checkpoint.SMALL.tokens_of(*VIDEO_SIZE),
    "qwen3-vl-8b": qwen3_checkpoint.SMALL.tokens_of(*VIDEO_SIZE),
}
"""V of a frame of :data:`VIDEO_SIZE`."""


def frames_that_fit(name: str, ratio: float) -> int:
    layers, kv_heads, _ = PUBLISHED[name]
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings = PruningSettings(**config["pruning"])
    counts = plan_counts(settings, ratio, layers, FRAMES[name])
    average = counts.layer_average(settings.boundaries(layers), layers)
    return int(KV_BYTES / (average * layers * 2 * kv_heads * HEAD_SIZE * BYTES))


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_the_table_of_frames_is_that_of_the_plans(name: str) -> None:
    fit = " | ".join(f"{frames_that_fit(name, ratio):,}" for ratio in (0.0, 2 / 3, 8 / 9))
    row = f"| `{name}` | {FRAMES[name]:,} | {fit} |"
    assert row in (ROOT / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("name", sorted(STAGE_ONE))
def test_the_table_of_stage_one_alone_is_that_of_the_plans(name: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings = PruningSettings(**config["pruning"] | {"selector": "received"})
    # The number of layers does not matter: all have the same tokens.
    plans = [plan_counts(settings, ratio, 48, STAGE_ONE[name]) for ratio in (0.5, 2 / 3, 8 / 9)]
    kept = " / ".join(f"{plan.stages[0]:,}" for plan in plans)
    row = f"| `{name}` | {STAGE_ONE[name]:,} | {kept} |"
    assert row in (ROOT / "docs" / "compatibility.md").read_text()


def test_every_configuration_of_a_published_model_is_in_the_table() -> None:
    configs = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert configs - PUBLISHED.keys() - STAGE_ONE.keys() == {
        "demo-cpu",
        "demo-gpu",
        "demo-qwen-cpu",
    }
