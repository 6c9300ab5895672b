"""What people do without pruning: scale images down, so that they give fewer visual tokens."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import yaml
from PIL import Image

from benchmarks.serving import ServerError
from evaluation.exam import Example
from vitcop_vllm.demo.checkpoint import resolve

MAX_PIXELS: Final = "max_pixels"
"""Stands where a selector's name stands, in arguments and in tables."""


def scaled_down_arguments(config: Path, ratio: Fraction, examples: Sequence[Example]) -> list[str]:
    """Arguments that serve ``config`` with images of fewer pixels, without pruning.

    Images get as many visual tokens, on average over the exam's images, as pruning at ``ratio``
    leaves them on average over layers; or the next number that is possible, which is more.

    Raises:
        ServerError: If the file cannot be read, or its model has no limit on pixels.
    """
    from transformers import AutoImageProcessor

    try:
        model = resolve(yaml.safe_load(config.read_text())["model"])
        processor: Any = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ServerError(f"{config}: {error}") from None
    if "longest_edge" not in processor.size or not hasattr(processor, "merge_size"):
        raise ServerError(f"{config}: the model's images have one size; leave {MAX_PIXELS} out")
    sizes = [Image.open(path).size for example in examples for path in example.images]
    pixels = (processor.patch_size * processor.merge_size) ** 2  # of a visual token

    def mean_tokens(limits: dict[str, int]) -> float:
        patches = (
            processor.get_number_of_image_patches(height, width, limits) for width, height in sizes
        )
        return fmean(patches) / processor.merge_size**2

    wanted = float(1 - ratio) * mean_tokens({})
    limits = ({"min_pixels": tokens * pixels, "max_pixels": tokens * pixels} for tokens in count(1))
    chosen = next(each for each in limits if mean_tokens(each) >= wanted)
    flags = [f"--mm-processor-kwargs.{name}={value}" for name, value in chosen.items()]
    return ["--config", str(config), *flags]
