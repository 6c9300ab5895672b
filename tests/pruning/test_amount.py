from typing import Any

import pytest
from pydantic import ValidationError

from vitcop_vllm.pruning.amount import (
    AutoRatio,
    FixedRatio,
    TokenBudget,
    amount_of,
    auto_of,
    default_amount,
    parse_amount,
    parse_budget,
)
from vitcop_vllm.pruning.plan import plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

DEFAULTS = PruningSettings()


@pytest.mark.parametrize("num_tokens", [64, 300, 576, 2880, 16384])
@pytest.mark.parametrize("tokens", [40, 64, 128, 192, 400])
def test_a_budget_is_kept_of_each_image_averaged_over_layers(num_tokens: int, tokens: int) -> None:
    amount = TokenBudget(tokens, most=0.98)
    ratio = amount.ratio(num_tokens, None)
    counts = plan_counts(DEFAULTS, ratio, 32, num_tokens)
    if tokens >= num_tokens:
        assert not counts.is_pruned
    elif ratio < 0.98:
        kept = counts.layer_average(DEFAULTS.boundaries(32), 32)
        assert kept == pytest.approx(tokens, abs=2)


def test_the_largest_ratio_limits_a_budget() -> None:
    assert TokenBudget(10, most=0.9).ratio(1000, None) == 0.9


@pytest.mark.parametrize(
    ("dense_patches", "expected"), [(0, 0.9), (1, 0.9), (2, 0.75), (60, 0.75), (576, 0.75)]
)
def test_auto_keeps_more_of_images_with_fine_detail(dense_patches: int, expected: float) -> None:
    assert AutoRatio(0.75, 0.9).ratio(576, dense_patches / 576) == expected


def test_bounds_are_narrowed() -> None:
    assert AutoRatio(0.5, 0.9).within(0.7, 1.0) == AutoRatio(0.7, 0.9)
    assert AutoRatio(0.5, 0.6).within(0.7, 1.0) == AutoRatio(0.7, 0.7)
    assert AutoRatio(0.5, 0.9).within(0.7, 0.6) == AutoRatio(0.6, 0.6)


def test_the_largest_allowed_ratio_limits_the_default_bounds() -> None:
    assert auto_of(DEFAULTS) == AutoRatio(7 / 9, 11 / 12)
    assert auto_of(PruningSettings(max_pruning_ratio=0.8)) == AutoRatio(7 / 9, 0.8)
    assert auto_of(PruningSettings(max_pruning_ratio=0.5)) == AutoRatio(0.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto": {"min": 0.5, "max": 0.9}, "max_pruning_ratio": 0.8}, "auto.max 0.9 must not be"),
        ({"auto": {"min": 0.9, "max": 0.5}}, "min 0.9 must not be above max 0.5"),
        ({"default_ratio": "Auto"}, "valid number"),
    ],
)
def test_bad_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruningSettings.model_validate(settings)


def test_the_default_may_be_auto() -> None:
    settings = PruningSettings.model_validate({"default_ratio": "auto", "auto": {"max": 0.85}})
    assert default_amount(settings) == amount_of(settings, {}) == AutoRatio(7 / 9, 0.85)


@pytest.mark.parametrize(
    "amount", [FixedRatio(0.25), TokenBudget(64, DEFAULTS.max_pruning_ratio), AutoRatio(0.7, 0.8)]
)
def test_processor_keywords_say_the_amount(amount: Any) -> None:
    assert amount_of(DEFAULTS, amount.processor_kwargs()) == amount


@pytest.mark.parametrize(
    ("value", "amount"),
    [
        ("auto", auto_of(DEFAULTS)),
        (" auto", auto_of(DEFAULTS)),
        (0.5, FixedRatio(0.5)),
        ("0.5", FixedRatio(0.5)),
    ],
)
def test_a_ratio_or_auto_is_parsed(value: object, amount: Any) -> None:
    assert parse_amount(DEFAULTS, value) == amount


@pytest.mark.parametrize("value", ["AUTO", "aut", 1.5, None, [], "auto,auto"])
def test_anything_else_is_refused_with_what_is_allowed(value: object) -> None:
    with pytest.raises(ValueError, match=r"decimal number from 0 to 0\.95.*'auto' chooses"):
        parse_amount(DEFAULTS, value)


@pytest.mark.parametrize("value", [1, 64, "64", " 64\t"])
def test_a_budget_is_parsed(value: object) -> None:
    assert parse_budget(DEFAULTS, value).tokens == int(value)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "value", [0, -1, 1.0, True, None, "", "0", "1e3", "6 4", "9" * 5000, 10**40]
)
def test_a_bad_budget_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="pruning_budget must be an integer of at least 1"):
        parse_budget(DEFAULTS, value)


def test_a_ratio_and_a_budget_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        amount_of(DEFAULTS, {"pruning_ratio": 0.5, "pruning_budget": 64})


def test_texts_are_values_of_headers() -> None:
    amounts = (FixedRatio(1e-7), TokenBudget(64, 0.95), AutoRatio(0.1, 0.2))
    assert [*map(str, amounts)] == ["0.0000001", "64", "auto"]
