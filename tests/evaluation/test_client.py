"""Parsing ratios, and reading a server's usage."""

from fractions import Fraction

import pytest
from openai.types import CompletionUsage

from evaluation.client import UNPRUNED, NotPrunedError, Ratio, Usage, reported_usage


@pytest.mark.parametrize(
    ("text", "label", "value", "decimal"),
    [
        ("8/9", "8/9", Fraction(8, 9), "0.888888888889"),
        ("16/18", "8/9", Fraction(8, 9), "0.888888888889"),
        ("0.889", "0.889", Fraction(889, 1000), "0.889"),
        (" .5 ", ".5", Fraction(1, 2), "0.5"),
        ("1e-5", "1e-5", Fraction(1, 100_000), "0.00001"),
        ("15/16", "15/16", Fraction(15, 16), "0.9375"),
        ("none", "none", None, None),
    ],
)
def test_ratios_are_parsed(text, label, value, decimal):
    ratio = Ratio.parse(text)
    assert (ratio.label, ratio.value, ratio.decimal) == (label, value, decimal)
    assert Ratio.parse(ratio.label) == ratio


@pytest.mark.parametrize("text", ["0", "0.0", "0/7", "-0"])
def test_ratio_0_is_the_baseline(text):
    assert Ratio.parse(text) == UNPRUNED
    assert UNPRUNED.decimal == "0"


@pytest.mark.parametrize("text", ["1", "9/8", "-1/9", "8/0", "1/2/3", "", "nan", "inf", "null"])
def test_bad_ratios_are_refused(text):
    with pytest.raises(ValueError, match="a ratio is"):
        Ratio.parse(text)


def usage(**fields: object) -> CompletionUsage:
    counts = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return CompletionUsage.model_validate({**counts, **fields})


def test_usage_is_read():
    reported = usage(pruning_ratio=0.7, visual_tokens={"encoder": 576, "stages": [172, 76, 15]})
    assert reported_usage(reported, Ratio.parse("2/3")) == Usage(0.7, 576, (172, 76, 15))


@pytest.mark.parametrize(
    "reported", [usage(), usage(pruning_ratio=None, visual_tokens=None), None], ids=str
)
def test_a_server_that_ignores_ratios_is_an_error(reported):
    assert reported_usage(reported, Ratio.parse("none")) is None
    for ratio in (UNPRUNED, Ratio.parse("1/2")):
        with pytest.raises(NotPrunedError, match="--ratios none"):
            reported_usage(reported, ratio)
