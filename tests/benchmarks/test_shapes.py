"""Shapes of the bench: they are those of served configurations, and say what images cost."""

import pytest
import yaml

from benchmarks.checkpoint import AnySizeShape
from benchmarks.shapes import FAMILIES, SHAPES, family_of, scaled_down_size
from vitcop_vllm.pruning.settings import PruningSettings

ANY_SIZE = {name: shape for name, shape in SHAPES.items() if isinstance(shape, AnySizeShape)}

SERVED = {
    "llava-next-small": "llava-next-7b",
    "llava-onevision-small": "llava-onevision-7b",
    "internvl-small": "internvl3-8b",
    "qwen2.5-vl-small": "qwen2.5-vl-7b",
    "qwen3-vl-small": "qwen3-vl-8b",
}
"""Shape -> the configuration whose model has as many decoder layers."""


def test_each_family_has_a_shape():
    assert {type(shape) for shape in SHAPES.values()} == set(FAMILIES)
    assert SERVED.keys() == ANY_SIZE.keys()


@pytest.mark.parametrize("name", ANY_SIZE)
def test_boundaries_are_those_that_users_get(name):
    with open(f"configs/{SERVED[name]}.yaml") as file:
        served = yaml.safe_load(file).get("pruning", {})
    layers = ANY_SIZE[name].layers
    chosen = {key: value for key, value in served.items() if key.endswith("_boundary")}
    ours = ANY_SIZE[name].boundaries or PruningSettings().boundaries(layers)
    assert ours == PruningSettings(**chosen).boundaries(layers)


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize("share", [1.0, 1 / 3, 1 / 9])
def test_no_other_size_has_a_closer_number_of_tokens(name, share):
    shape = ANY_SIZE[name]
    size = scaled_down_size(shape, share * shape.visual_tokens)
    error = abs(shape.tokens_of(size, size) - share * shape.visual_tokens)
    for other in range(size % 28 or 28, shape.image_size + 1, 28):
        assert error <= abs(shape.tokens_of(other, other) - share * shape.visual_tokens)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("llava-next-small", 336, 576 + 24 * 25),  # the base image, and half of two tiles
        ("llava-onevision-small", 384, 729 + 27 * 28),
        ("internvl-small", 448, 256),
        ("qwen2.5-vl-small", 140, 25),
        ("qwen3-vl-small", 160, 25),
    ],
)
def test_smaller_images_have_fewer_tokens(name, size, tokens):
    assert ANY_SIZE[name].tokens_of(size, size) == tokens
    assert family_of(ANY_SIZE[name]).image_sizes
