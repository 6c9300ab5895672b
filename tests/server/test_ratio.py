"""The ratio of a request, and errors for bad ratios."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcop_server.errors import RequestError
from vitcop_server.ratio import accepted_ratio, ratio_text
from vitcop_vllm.pruning.settings import RATIO_HEADER, PruningSettings

SETTINGS = PruningSettings(default_ratio=0.25)


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
    accepted = accepted_ratio(SETTINGS, headers, body)
    assert accepted.ratio == ratio
    assert accepted.is_named == (headers != [] or body is not None)


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
        accepted_ratio(SETTINGS, [value], None)
    assert refusal.value.param == RATIO_HEADER
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("values", [["0.5", "0.5"], ["0.5", "0.6"], ["", ""], ["x"] * 3])
def test_a_repeated_header_is_refused(values: list[str]) -> None:
    with pytest.raises(RequestError, match=r"once.* 0 to 0\.95") as refusal:
        accepted_ratio(SETTINGS, values, None)
    assert refusal.value.param == RATIO_HEADER


@pytest.mark.parametrize(
    "value",
    ["abc", -0.1, 1, 1.5, float("nan"), float("inf"), 10**400, True, False, [0.5], {"ratio": 0.5}],
)
def test_a_bad_body_field_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match=r"pruning_ratio.* 0 to 0\.95") as refusal:
        accepted_ratio(SETTINGS, [], value)
    assert refusal.value.param == "pruning_ratio"


def test_header_and_body_must_agree() -> None:
    with pytest.raises(RequestError, match=r"X-Pruning-Ratio.*0\.5 .*pruning_ratio.*0\.6"):
        accepted_ratio(SETTINGS, ["0.50"], 0.6)


def test_one_bad_value_is_refused_beside_a_good_one() -> None:
    with pytest.raises(RequestError):
        accepted_ratio(SETTINGS, ["2"], 0.5)
    with pytest.raises(RequestError):
        accepted_ratio(SETTINGS, ["0.5"], 2)


@pytest.mark.parametrize(
    ("default", "largest", "ratio"),
    [
        (None, "0.1", 0.1),
        (None, "0.25", 0.25),
        (None, "0.99", 0.25),
        (0.75, "1", 0.75),
        (0.75, "0.5", 0.5),
        (0.75, "0", 0.0),
    ],
)
def test_the_default_is_lowered_to_the_client_s_maximum(
    default: float | None, largest: str, ratio: float
) -> None:
    accepted = accepted_ratio(SETTINGS, [], None, default=default, max_values=[largest])
    assert accepted == (ratio, False)


def test_load_does_not_change_a_named_ratio() -> None:
    for headers, body, alias in ((["0.5"], None, None), ([], 0.5, None), ([], None, 0.5)):
        accepted = accepted_ratio(SETTINGS, headers, body, alias, default=0.75, max_values=["0.5"])
        assert accepted == (0.5, True)
        with pytest.raises(RequestError, match=r"asks for ratio 0\.5.*X-Pruning-Max.* 0\.4") as no:
            accepted_ratio(SETTINGS, headers, body, alias, max_values=["0.4"])
        assert no.value.param == "X-Pruning-Max"


@pytest.mark.parametrize("values", [[""], ["x"], ["-0.1"], ["1.1"], ["1e-1"], ["0.5", "0.5"]])
def test_a_bad_maximum_is_refused(values: list[str]) -> None:
    with pytest.raises(RequestError, match=r"X-Pruning-Max must be .* 0 to 1\b") as refusal:
        accepted_ratio(SETTINGS, [], None, max_values=values)
    assert refusal.value.param == "X-Pruning-Max"


def test_minus_zero_prints_as_zero() -> None:
    assert ratio_text(accepted_ratio(SETTINGS, [], -0.0).ratio) == "0.0"


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
