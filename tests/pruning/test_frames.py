"""Frames compared with the frame before."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.device_guard import CUDA, no_host_sync
from tests.pruning import oracle
from vitcop_vllm.pruning.frames import changed_first, changed_tokens


def changes(before: torch.Tensor, pixels: torch.Tensor) -> list[bool]:
    found: list[bool] = changed_tokens(before, pixels).tolist()
    return found


def test_all_tokens_of_a_first_frame_show_something_new() -> None:
    assert changed_tokens(None, torch.rand(5, 12)).tolist() == [True] * 5


def test_an_equal_frame_shows_nothing_new() -> None:
    pixels = torch.rand(5, 12)
    assert changes(pixels, pixels.clone()) == [False] * 5
    black = torch.zeros(5, 12)
    assert changes(black, black.clone()) == [False] * 5


def test_any_change_of_an_even_frame_is_one() -> None:
    before = torch.zeros(3, 12)
    before[1, 0] = 1e-3
    assert changes(before, torch.zeros(3, 12)) == [False, True, False]


@pytest.mark.parametrize(("noise", "changed"), [(0.05, False), (0.2, True)])
@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tenth_of_the_standard_deviation_is_noise(
    noise: float, changed: bool, scale: float, dtype: torch.dtype
) -> None:
    """Whatever a checkpoint's processor divides pixels by."""
    generator = torch.Generator().manual_seed(0)
    pixels, other = (torch.randn(2, 40, 1176, generator=generator) * scale).unbind()
    assert changes((pixels + noise * other).to(dtype), pixels.to(dtype)) == [changed] * 40


def test_pixels_may_be_bytes() -> None:
    """As vLLM's processor makes them for models that normalise pixels on the device."""
    before = torch.randint(0, 256, (6, 300), dtype=torch.uint8)
    pixels = before.clone()
    pixels[2] = 255 - pixels[2]
    pixels[4] = pixels[4] ^ 1
    assert changes(before, pixels) == [False, False, True, False, False, False]


@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_what_compression_changes_is_noise(kind: str, tmp_path: Path) -> None:
    """A square moves before a still background; the camera's noise has 3 of 255 levels."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    still = np.asarray(coarse.resize((448, 336), Image.Resampling.BICUBIC), dtype=np.float64)
    path = str(tmp_path / f"video.{kind}")
    codec = cv2.VideoWriter.fourcc(*{"mp4": "mp4v", "avi": "MJPG"}[kind])
    writer = cv2.VideoWriter(path, codec, 12, (448, 336))
    for left in range(0, 224, 28):
        frame = still + rng.normal(0, 3, still.shape)
        frame[112:168, left : left + 56] = 220, 40, 40
        writer.write(np.clip(frame, 0, 255).astype(np.uint8))
    writer.release()
    reader = cv2.VideoCapture(path)
    frames = [torch.from_numpy(reader.read()[1]).float() for _ in range(8)]
    tokens = [
        frame.unfold(0, 28, 28).unfold(1, 28, 28).flatten(0, 1).flatten(1) for frame in frames
    ]
    for number in range(1, 8):
        columns = {number - 1, number + 1}  # one uncovered, one covered
        expected = [
            row in (4, 5) and column in columns for row in range(12) for column in range(16)
        ]
        assert changes(tokens[number - 1], tokens[number]) == expected


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 8))
def test_changes_equal_the_oracle_s(seed: int, num_tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(num_tokens, width, generator=generator)
    size = torch.rand(num_tokens, 1, generator=generator) * 0.3
    pixels = before + size * torch.randn(num_tokens, width, generator=generator)
    assert changes(before, pixels) == oracle.shows_change(before.numpy(), pixels.numpy())


@given(st.data())
def test_unchanged_tokens_come_after_all_others(data: Any) -> None:
    num_tokens = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(1, num_tokens))
    values = st.lists(
        st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=num_tokens, max_size=num_tokens
    )
    flags = st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)
    saliency, changed = [data.draw(values) for _ in "ab"], [data.draw(flags) for _ in "ab"]
    kept = changed_first(torch.tensor(saliency), torch.tensor(changed), count)
    assert kept.tolist() == [
        oracle.largest_of_changed(saliency[i], changed[i], count) for i in range(2)
    ]


@no_host_sync()
def test_comparing_does_not_make_the_host_wait_for_the_gpu() -> None:
    before, pixels = torch.rand(2, 6, 12, device=CUDA).unbind()
    changed = torch.stack([changed_tokens(None, pixels), changed_tokens(before, pixels)])
    assert changed_first(torch.rand(2, 6, device=CUDA), changed, 4).shape == (2, 4)
