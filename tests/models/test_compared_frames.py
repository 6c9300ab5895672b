"""Videos of towers of few blocks, whose frames are compared. No engine runs."""

from typing import Any

import pytest
import torch

from tests.models.test_qwen_vl import (
    PATCHES,
    WIDTH,
    Mixing,
    OneBlockQwen,
    ThreeBlockQwen3,
    set_up,
)
from vitcop_vllm.models.processing import VIDEO_COUNTS_FIELD, video_row
from vitcop_vllm.models.stage_one import ImageShape, VideoShape
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SelectorName

ROWS, COLUMNS = 4, 6
STEPS = range(COLUMNS - 1)
"""Frames: a square of 2 x 2 tokens moves from left to right, a token's width per frame."""


@pytest.fixture(autouse=True)
def frames_attend_within(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = PATCHES * ROWS * COLUMNS
    monkeypatch.setattr(Mixing, "lengths", lambda _, patches: [frame] * (patches // frame))


def moving_square(generator: torch.Generator) -> torch.Tensor:
    """(frames, V, patches * WIDTH) pixels before a still background."""
    still = torch.randn(ROWS, COLUMNS, PATCHES * WIDTH, generator=generator)
    frames = still.repeat(len(STEPS), 1, 1, 1)
    for left in STEPS:
        frames[left, 1:3, left : left + 2] = 3.0
    return frames.flatten(1, 2)


def compared_videos(selector: SelectorName, n1: int) -> tuple[list[VideoShape], dict[str, Any]]:
    """Two such videos, the second of a still image."""
    centres = 2 if selector == "vitcop" else 0
    first = VisualTokenCounts(ROWS * COLUMNS, centres, (10, 6, 2))
    others = VisualTokenCounts(ROWS * COLUMNS, centres, (n1, 3, 1))
    video = VideoShape(ImageShape(others, (Grid(ROWS, COLUMNS),)), len(STEPS), first)
    frames = moving_square(torch.Generator().manual_seed(0))
    still = frames[:1].repeat(len(STEPS), 1, 1)
    grid = [len(STEPS), 2 * ROWS, 2 * COLUMNS]
    fields = {
        "pixel_values_videos": torch.cat([frames, still]).view(-1, WIDTH),
        "video_grid_thw": torch.tensor([grid, grid]),
        VIDEO_COUNTS_FIELD: torch.tensor([video_row(video)] * 2),
    }
    return [video, video], fields


def kept_by_frame(model: Any, videos: list[VideoShape], embedded: Any) -> list[list[set[int]]]:
    """Tokens that each frame of each video keeps."""
    kept = []
    for video, embedding in zip(videos, embedded, strict=True):
        _, _, places = model.columns.split([embedding])
        tokens = places[:, 0] * COLUMNS + places[:, 1]
        lengths = [counts.stages[0] for counts, _ in video.frames]
        kept.append([{*of_frame.tolist()} for of_frame in tokens.split(lengths)])
    return kept


@torch.inference_mode()
@pytest.mark.parametrize("model", [OneBlockQwen, ThreeBlockQwen3])
@pytest.mark.parametrize("selector", ["vitcop", "received"])
@pytest.mark.parametrize("n1", [3, 7])
def test_tokens_that_stay_the_same_are_dropped_first(model, selector, n1):
    torch.manual_seed(0)
    qwen = model(selector)
    set_up(qwen, selector, qwen.columns.width, compare_frames=True)
    videos, fields = compared_videos(selector, n1)
    moving, still = kept_by_frame(qwen, videos, qwen.embed_multimodal(**fields))
    for left, kept in zip(STEPS[1:], moving[1:], strict=True):
        uncovered, covered = left - 1, left + 1
        changed = {row * COLUMNS + column for row in (1, 2) for column in (uncovered, covered)}
        assert (kept < changed) if n1 < len(changed) else (kept > changed)
    # Where nothing changes, saliency alone decides, and it is the same in each frame.
    assert len({frozenset(kept) for kept in still[1:]}) == 1
    assert moving[0] == still[0]

    set_up(qwen, selector, qwen.columns.width)
    alone = kept_by_frame(qwen, videos, qwen.embed_multimodal(**fields))
    assert alone[1] == still
    assert alone[0][0] == moving[0]
    assert alone[0][1:] != moving[1:]


@torch.inference_mode()
@pytest.mark.parametrize("model", [OneBlockQwen, ThreeBlockQwen3])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_frames_in_parts_are_compared_as_those_of_one_run(model, together):
    torch.manual_seed(0)
    qwen = model("vitcop")
    set_up(qwen, "vitcop", qwen.columns.width, compare_frames=True)
    videos, fields = compared_videos("vitcop", 7)
    expected = qwen.embed_multimodal(**fields)
    qwen._encoder_tokens = together * ROWS * COLUMNS
    embedded = qwen.embed_multimodal(**fields)
    assert kept_by_frame(qwen, videos, embedded) == kept_by_frame(qwen, videos, expected)
    for one, other in zip(embedded, expected, strict=True):
        torch.testing.assert_close(one[:, : qwen.columns.width], other[:, : qwen.columns.width])


@torch.inference_mode()
@pytest.mark.parametrize("model", [OneBlockQwen, ThreeBlockQwen3])
def test_a_frame_s_selection_does_not_depend_on_later_frames(model):
    torch.manual_seed(0)
    qwen = model("vitcop")
    set_up(qwen, "vitcop", qwen.columns.width, compare_frames=True)
    videos, fields = compared_videos("vitcop", 7)
    before = kept_by_frame(qwen, videos, qwen.embed_multimodal(**fields))
    pixels = fields["pixel_values_videos"].view(2, len(STEPS), -1)
    pixels[:, 3:] = torch.randn(pixels[:, 3:].shape)
    after = kept_by_frame(qwen, videos, qwen.embed_multimodal(**fields))
    assert [kept[:3] for kept in after] == [kept[:3] for kept in before]
    assert after[0][3:] != before[0][3:]
