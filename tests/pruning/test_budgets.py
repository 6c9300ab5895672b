"""The table of selectors, and the counts of their budgets."""

import subprocess
import sys
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, PruningSettings, SelectorName

NAMES = SELECTOR_NAMES
IN_ENCODER = [name for name in NAMES if SELECTORS[name].prunes_encoder]
IN_DECODER = [name for name in NAMES if not SELECTORS[name].prunes_encoder]

names = st.sampled_from(NAMES)
layers = st.integers(4, 80)
tokens = st.integers(1, 3000)
ratios = st.floats(0.0, 0.999, allow_subnormal=False) | st.sampled_from([0.5, 2 / 3, 7 / 9, 8 / 9])


def settings_of(name: SelectorName, **others) -> PruningSettings:
    return PruningSettings(selector=name, **others)


def reachable(chosen: PruningSettings, ratio: float, num_layers: int) -> float:
    limit = SELECTORS[chosen.selector].max_ratio(chosen.boundaries(num_layers), num_layers)
    return min(ratio, limit)


def test_an_unknown_selector_is_refused_with_the_known_names():
    with pytest.raises(
        ValidationError, match="no selector is called 'none'; choose cls, contrast, dart"
    ):
        PruningSettings.model_validate({"selector": "none"})


def test_a_selector_is_a_file_without_torch():
    """The server plans with selectors, and must not load torch for that."""
    loads = (
        "import sys; from vitcop_vllm.pruning.selectors import selector_of; "
        "from vitcop_vllm.pruning.settings import SELECTOR_NAMES; "
        "print(*[selector_of(name) is selector_of(name) for name in SELECTOR_NAMES]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_selector_has_a_docstring_and_selects_tokens(name):
    module = import_module(f"vitcop_vllm.pruning.selectors.{name}")
    assert module.__doc__
    row = SELECTORS[name]
    assert row is module.SELECTOR
    assert row.prunes_encoder or row.shallow or row.deep
    assert not (row.saliency and row.encoder), "saliency alone decides"


def test_only_fastv_reads_the_question():
    assert [name for name in NAMES if SELECTORS[name].reads_question] == ["fastv"]


@pytest.mark.parametrize(
    ("name", "ratio", "centres", "stages"),
    [
        ("vitcop", 8 / 9, 20, (172, 77, 15)),
        ("cls", 8 / 9, 0, (64, 64, 64)),
        ("random", 2 / 3, 0, (192, 192, 192)),
        ("cls", 0.667, 0, (192, 192, 192)),  # 191.8
        ("grid", 7 / 9, 0, (128, 128, 128)),
        ("divprune", 0.5, 0, (288, 288, 288)),
        # (32/9 - 2) / (20 + 2) * 576 = 40.7
        ("key_norm", 8 / 9, 0, (576, 41, 8)),
        # (32/3 - 2) / 22 * 576 = 226.9
        ("key_norm", 2 / 3, 0, (576, 227, 45)),
        # (32/9 - 2) / 30 * 576 = 29.9
        ("fastv", 8 / 9, 0, (576, 30, 30)),
        # (32/3 - 2) / 30 * 576 = 166.4
        ("dart", 2 / 3, 0, (576, 166, 166)),
        # (32/9) / (22 + 2) * 576 = 85.3
        ("contrast", 8 / 9, 0, (85, 85, 17)),
        # (32/3) / 24 * 576 = 256
        ("contrast", 2 / 3, 0, (256, 256, 51)),
        # 24 / 24 * 576 is all; (28.8 - 22) / 10 * 576 = 391.7
        ("contrast", 0.1, 0, (576, 576, 392)),
        ("fastv", 0.9375, 0, (576, 1, 1)),
        ("key_norm", 0.9375, 0, (576, 1, 1)),
    ],
)
def test_counts_for_llava_1_5_7b(name, ratio, centres, stages):
    assert plan_counts(settings_of(name), ratio, 32, 576) == VisualTokenCounts(576, centres, stages)


@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_prunes_nothing(name):
    assert plan_counts(settings_of(name), 0.0, 32, 576) == VisualTokenCounts.unpruned(576)


@settings(max_examples=400)
@given(names, ratios, layers, tokens)
def test_layer_average_matches_the_ratio(name, ratio, num_layers, encoder_tokens):
    chosen = settings_of(name)
    ratio = reachable(chosen, ratio, num_layers)
    counts = plan_counts(chosen, ratio, num_layers, encoder_tokens)
    if 1 in counts.stages:
        return  # a segment keeps at least one token, so the average may be larger
    average = counts.layer_average(chosen.boundaries(num_layers), num_layers)
    assert abs(average - (1 - ratio) * encoder_tokens) <= 2


@given(names, ratios, layers, tokens)
def test_a_stage_drops_tokens_only_if_the_selector_has_a_function_for_it(
    name, ratio, num_layers, tokens
):
    chosen, row = settings_of(name), SELECTORS[name]
    counts = plan_counts(chosen, reachable(chosen, ratio, num_layers), num_layers, tokens)
    n1, n2, n3 = counts.stages
    assert row.prunes_encoder or n1 == counts.encoder
    assert row.shallow or n2 == n1
    assert row.deep or n3 == n2
    assert counts.centres == 0 or name == "vitcop"


@pytest.mark.parametrize("name", IN_DECODER)
@pytest.mark.parametrize("num_layers", [4, 8, 24, 32, 40])
def test_the_layers_before_the_shallow_boundary_limit_the_ratio(name, num_layers):
    chosen = settings_of(name)
    shallow, _ = chosen.boundaries(num_layers)
    limit = SELECTORS[name].max_ratio(chosen.boundaries(num_layers), num_layers)
    assert limit == 1 - shallow / num_layers
    assert plan_counts(chosen, limit, num_layers, 576).stages == (576, 1, 1)
    with pytest.raises(ValueError, match=f"'{name}' cannot reach pruning ratio"):
        plan_counts(chosen, limit + 1e-6, num_layers, 576)


@pytest.mark.parametrize("name", IN_ENCODER)
def test_the_encoder_reaches_every_ratio(name):
    assert plan_counts(settings_of(name), 0.999, 32, 576).stages[-1] == 1
