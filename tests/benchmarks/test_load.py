"""Clients' arrivals, questions and answers; what they should gain."""

from math import log
from random import Random
from statistics import mean, median, stdev

import pytest

from benchmarks import load
from benchmarks.asks import text_of, user_turn


def test_poisson_arrivals():
    arrivals = load.poisson_arrivals(5.0, 20_000, Random(3))
    assert arrivals[-1] == pytest.approx(20_000 / 5.0)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0
    # Of an exponential distribution, and of no regular one.
    assert mean(gap * gap for gap in gaps) == pytest.approx(2 / 5**2, rel=0.06)
    assert arrivals == load.poisson_arrivals(5.0, 20_000, Random(3))
    assert arrivals != load.poisson_arrivals(5.0, 20_000, Random(4))


@pytest.mark.parametrize(
    "requests", [load.REQUESTS, *(load.REQUESTS_PER_CLIENT * n for n in load.CLIENTS)]
)
def test_mixed_ratios(requests):
    ratios = load.mixed_ratios(requests, Random(0))
    assert mean(ratios) == pytest.approx(8 / 9, abs=1e-12)
    assert set(ratios) == {7 / 9, 8 / 9, 17 / 18}
    assert ratios == load.mixed_ratios(requests, Random(0))
    assert ratios != load.mixed_ratios(requests, Random(1))
    assert ratios != sorted(ratios)


def test_chat_lengths():
    rng = Random(0)
    lengths = [load.chat_length(64, rng) for _ in range(20_000)]
    assert median(lengths) == pytest.approx(64, rel=0.05)
    assert (min(lengths), max(lengths)) == (16, 256)
    inside = [log(length) for length in lengths if 16 < length < 256]
    assert stdev(inside) == pytest.approx(0.63, abs=0.03)  # of 0.8, cut at both ends
    assert min(load.chat_length(1, rng) for _ in range(100)) == 1


@pytest.mark.parametrize("tokens", [1, 7, 2048])
def test_text_has_the_length_that_was_asked_for(tokens):
    assert len(text_of(tokens)) == tokens
    assert len(text_of(tokens, Random(0))) == tokens
    assert "<" not in text_of(tokens)
    assert text_of(2048, Random(0)) != text_of(2048, Random(1))


def test_a_turn_holds_its_images():
    assert user_turn("Why?", 3).count("<image>") == 3
    assert user_turn("Why?") == "USER: <image>\nWhy? ASSISTANT:"


def test_chat_asks():
    images, arrivals = range(load.REQUESTS), [0.5 * i for i in range(load.REQUESTS)]
    asks = load.chat_asks(images, arrivals, 16, Random(0))
    assert [ask.images for ask in asks] == [(image,) for image in images]
    assert [ask.arrival for ask in asks] == arrivals
    assert {ask.prompt.count("<image>") for ask in asks} == {1}
    assert len({ask.prompt for ask in asks}) > load.REQUESTS * 0.9
    assert median(ask.max_tokens for ask in asks) == pytest.approx(16, abs=4)
    assert asks == load.chat_asks(images, arrivals, 16, Random(0))
