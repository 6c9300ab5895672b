"""Images are scaled down to as many visual tokens as pruning leaves."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import AutoImageProcessor

from benchmarks.serving import ServerError
from demo.qwen_form import DEMO_QWEN, save_config
from evaluation.evaluate import parse_arguments
from evaluation.exam import Example, Turn
from evaluation.max_pixels import MAX_PIXELS, scaled_down_arguments

SIZES = ((336, 336), (470, 240), (300, 376))


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    folder = tmp_path_factory.mktemp("images")
    turn = Turn(question="What?", answers=("That.",))
    made = []
    for number, size in enumerate(SIZES):
        path = folder / f"{number}.png"
        Image.new("RGB", size).save(path)
        made.append(Example(images=(path,), family="one", turns=(turn,)))
    return made


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    save_config(folder, DEMO_QWEN)
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"model": str(folder)}))
    return path


def tokens(config: Path, width: int, height: int, **limits: int) -> int:
    """Visual tokens of an image, by the processor's own work on its pixels."""
    processor = AutoImageProcessor.from_pretrained(config.parent)
    image = Image.new("RGB", (width, height))
    grid = processor(images=image, return_tensors="pt", **limits)["image_grid_thw"]
    return int(grid.prod()) // 4


@pytest.mark.parametrize("ratio", ["1/3", "2/3", "8/9"])
def test_images_get_as_many_tokens_as_pruning_leaves(examples, config, ratio):
    flags = scaled_down_arguments(config, Fraction(ratio), examples)
    assert flags[:2] == ["--config", str(config)]
    limits = {}
    for flag in flags[2:]:
        name, value = flag.removeprefix("--mm-processor-kwargs.").split("=")
        limits[name] = int(value)
    assert set(limits) == {"min_pixels", "max_pixels"}

    def total(**limits: int) -> int:
        return sum(tokens(config, *size, **limits) for size in SIZES)

    wanted = (1 - Fraction(ratio)) * total()
    assert total(**limits) >= wanted
    pixels = DEMO_QWEN.token_side**2
    assert total(**{name: limit - pixels for name, limit in limits.items()}) < wanted


def test_a_model_whose_images_have_one_size_is_refused(examples, tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("model: demo")
    with pytest.raises(ServerError, match="one size; leave max_pixels out"):
        scaled_down_arguments(config, Fraction(1, 2), examples)


def test_max_pixels_has_no_ratio_auto(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--selectors", "vitcop", MAX_PIXELS, "--ratios", "0", "auto"])
    assert "max_pixels has no ratio auto: leave one of them out" in capsys.readouterr().err
