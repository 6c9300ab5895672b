"""The ratio of a request, and errors for bad ratios."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcop_server.errors import RequestError
from vitcop_server.ratio import Accepted, Asked, accept
from vitcop_vllm.pruning.amount import (
    BUDGET_HEADER,
    BUDGET_KEY,
    AutoRatio,
    FixedRatio,
    TokenBudget,
    auto_of,
    default_amount,
    ratio_text,
)
from vitcop_vllm.pruning.settings import RATIO_HEADER, PruningSettings

SETTINGS = PruningSettings(default_ratio=0.25)


def got(
    headers: Sequence[str] = (),
    field: object = None,
    *,
    least: float = 0.0,
    settings: PruningSettings = SETTINGS,
    **asked: Any,
) -> Accepted:
    """What a request gets that sends these headers and this field."""
    request = Asked(headers, field, **asked)
    return accept(settings, request, default_amount(settings), least)


@pytest.mark.parametrize(
    ("headers", "body", "ratio"),
    [
        ([], None, 0.25),
        (["0.5"], None, 0.5),
        ([" 0.5\t"], None, 0.5),
        ([".5"], None, 0.5),
        (["0.95"], None, 0.95),
        (["0"], None, 0.0),
        ([], 0, 0.0),
        ([], 0.889, 0.889),
        ([], 1e-05, 1e-05),
        (["0.50"], 0.5, 0.5),
        (["0"], 0.0, 0.0),
    ],
)
def test_valid_ratios_are_accepted(headers: list[str], body: object, ratio: float) -> None:
    assert got(headers, body) == Accepted(FixedRatio(ratio))


@pytest.mark.parametrize(
    "value",
    [
        *["", " ", "abc", "0x1", "0,5", "0.5,0.5", "0.5, 0.6", "0.5; q=1", "-0.1", "-0", "+0.5"],
        *["1", "1.5", "0.9500001", "nan", "inf", "-inf", "1e-1", "1e-400", "٠.٥", "²"],
        *["0.5\x00", "0.5\n", "0_5", "9" * 9000],
    ],
)
def test_a_bad_header_is_refused(value: str) -> None:
    with pytest.raises(RequestError, match=r"X-Pruning-Ratio.* 0 to 0\.95") as refusal:
        got([value])
    assert refusal.value.param == RATIO_HEADER
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("values", [["0.5", "0.5"], ["0.5", "0.6"], ["", ""], ["x"] * 3])
def test_a_repeated_header_is_refused(values: list[str]) -> None:
    with pytest.raises(RequestError, match=r"X-Pruning-Ratio must be sent once") as refusal:
        got(values)
    assert refusal.value.param == RATIO_HEADER


@pytest.mark.parametrize(
    "value",
    ["abc", -0.1, 1, 1.5, float("nan"), float("inf"), 10**400, True, False, [0.5], {"ratio": 0.5}],
)
def test_a_bad_body_field_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=r"pruning_ratio.* 0 to 0\.95") as refusal:
        got([], value)
    assert refusal.value.param == "pruning_ratio"


def test_header_and_body_must_agree() -> None:
    with pytest.raises(RequestError, match=r"X-Pruning-Ratio.*0\.5 .*pruning_ratio.*0\.6"):
        got(["0.50"], 0.6)


def test_one_bad_value_is_refused_beside_a_good_one() -> None:
    with pytest.raises(RequestError):
        got(["2"], 0.5)
    with pytest.raises(RequestError):
        got(["0.5"], 2)


@pytest.mark.parametrize(
    ("least", "largest", "ratio"),
    [
        (0.0, "0.1", 0.1),
        (0.0, "0.25", 0.25),
        (0.0, "0.99", 0.25),
        (0.75, "1", 0.75),
        (0.75, "0.5", 0.5),
        (0.75, "0.25", 0.25),
        (0.75, "0", 0.0),
    ],
)
def test_load_raises_the_default_up_to_the_client_s_maximum(
    least: float, largest: str, ratio: float
) -> None:
    accepted = got(max_headers=[largest], least=least)
    assert accepted == Accepted(FixedRatio(ratio), is_raised=ratio > 0.25)


@pytest.mark.parametrize(
    ("least", "largest", "expected"),
    [
        (0.0, "1", AutoRatio(7 / 9, 11 / 12)),
        (0.8, "1", AutoRatio(0.8, 11 / 12)),
        (0.95, "1", AutoRatio(0.95, 0.95)),
        (0.8, "0.85", AutoRatio(0.8, 0.85)),
        (0.8, "0.5", AutoRatio(0.5, 0.5)),
        (0.0, "0.5", AutoRatio(0.5, 0.5)),
    ],
)
@pytest.mark.parametrize("is_default", [True, False])
def test_load_raises_auto_up_to_the_client_s_maximum(
    least: float, largest: str, expected: AutoRatio, is_default: bool
) -> None:
    settings = PruningSettings(default_ratio="auto") if is_default else SETTINGS
    headers = [] if is_default else ["auto"]
    amount, is_raised = got(headers, max_headers=[largest], least=least, settings=settings)
    assert amount == expected
    assert is_raised == (least > 0 and expected != AutoRatio(0.5, 0.5))


def test_load_does_not_change_what_a_request_names() -> None:
    every: list[dict[str, Any]] = [{"headers": ["0.5"]}, {"field": 0.5}, {"alias": FixedRatio(0.5)}]
    for asked in every:
        assert got(**asked, max_headers=["0.5"], least=0.75) == Accepted(FixedRatio(0.5))
        with pytest.raises(RequestError, match=r"asks for ratio 0\.5.*X-Pruning-Max.* 0\.4") as no:
            got(**asked, max_headers=["0.4"])
        assert no.value.param == "X-Pruning-Max"
    assert got(budget_field=64, least=0.75) == Accepted(TokenBudget(64, 0.95))


@pytest.mark.parametrize("values", [[""], ["x"], ["-0.1"], ["1.1"], ["1e-1"], ["0.5", "0.5"]])
def test_a_bad_maximum_is_refused(values: list[str]) -> None:
    with pytest.raises(RequestError, match="X-Pruning-Max must be ") as refusal:
        got(max_headers=values)
    assert refusal.value.param == "X-Pruning-Max"


@pytest.mark.parametrize(
    ("headers", "field"), [(["64"], None), ([], 64), ([" 64"], 64), ([], "64")]
)
def test_a_budget_is_accepted(headers: list[str], field: object) -> None:
    asked: dict[str, Any] = {"budget_headers": headers, "budget_field": field}
    assert got(**asked) == Accepted(TokenBudget(64, 0.95))
    assert got(**asked, alias=FixedRatio(0.5)) == Accepted(TokenBudget(64, 0.95))
    assert got(**asked, max_headers=["0.5"]) == Accepted(TokenBudget(64, 0.5))


@pytest.mark.parametrize(
    ("headers", "field", "param"),
    [
        (["0"], None, BUDGET_HEADER),
        (["64,64"], None, BUDGET_HEADER),
        (["64", "64"], None, BUDGET_HEADER),
        ([], 64.5, BUDGET_KEY),
        ([], -1, BUDGET_KEY),
        (["64"], 65, BUDGET_KEY),
    ],
)
def test_a_bad_budget_is_refused(headers: list[str], field: object, param: str) -> None:
    with pytest.raises(RequestError, match=param) as refusal:
        got(budget_headers=headers, budget_field=field)
    assert refusal.value.param == param


def test_a_ratio_and_a_budget_contradict_each_other() -> None:
    with pytest.raises(RequestError, match=r"a ratio, 0\.5, and a budget, 64: send one") as refusal:
        got(["0.5"], budget_field=64)
    assert refusal.value.param == BUDGET_KEY


def test_auto_is_accepted_wherever_a_ratio_is() -> None:
    auto = Accepted(auto_of(SETTINGS))
    assert got(["auto"]) == got([], "auto") == got(["auto"], "auto") == auto
    with pytest.raises(RequestError, match="header X-Pruning-Ratio is auto but"):
        got(["auto"], 0.5)


def test_minus_zero_prints_as_zero() -> None:
    assert str(got([], -0.0).amount) == "0.0"


@given(st.floats(min_value=1e-15, max_value=0.95))
def test_a_printed_ratio_reads_back(ratio: float) -> None:
    text = ratio_text(ratio)
    assert "e" not in text.lower()
    assert float(text) == ratio


def test_error_has_the_shape_of_openai() -> None:
    error = RequestError("no", param="pruning_ratio").body()["error"]
    assert error == {
        "message": "no",
        "type": "BadRequestError",
        "param": "pruning_ratio",
        "code": 400,
    }
