"""Measures of agreement."""

import math

import pytest

from vitcop_server.calibrate.agreement import Agreement, Score, stays_likely

HALF = math.log(0.5)
LONG = (-0.1,) * 50


@pytest.mark.parametrize(
    ("pruned", "ends", "agrees"),
    [
        (LONG, True, True),
        ((-0.1 + HALF + 1e-6,) * 50, True, True),
        ((*LONG[1:], -0.1 + HALF - 1e-6), True, False),  # a mean would not see it
        ((0.0,) * 50, True, True),  # more likely than unpruned
        (LONG, False, False),  # the pruned model would go on
    ],
)
def test_the_worst_token_and_the_end_decide(
    pruned: tuple[float, ...], ends: bool, agrees: bool
) -> None:
    assert stays_likely(Score(pruned, ends), Score(LONG, True), least=0.5) == agrees


def test_an_answer_that_was_cut_off_has_no_end_to_keep() -> None:
    assert stays_likely(Score(LONG, True), Score(LONG, False), least=0.5)
    assert stays_likely(Score(LONG, False), Score(LONG, False), least=0.5)


def test_an_image_counts_once_and_agrees_if_all_its_answers_do() -> None:
    results = [("a", True), ("a", False), ("b", True), ("b", True), ("a", True)]
    assert Agreement.of(results) == Agreement(1, 2)
