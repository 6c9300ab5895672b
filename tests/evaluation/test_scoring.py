"""Rules for right answers."""

import pytest

from evaluation.scoring import contains, exact


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("red", ["red"], True),
        (" Red.\n", ["red"], True),
        ('"RED"!', ["red"], True),
        ("**red**", ["red"], True),
        ("STRASSE", ["straße"], True),
        ("grey", ["gray", "grey"], True),
        ("dark red", ["red"], False),
        ("redder", ["red"], False),
        ("", ["red"], False),
        # Signs are part of a number.
        ("-5", ["5"], False),
        ("5", [".5"], False),
        ("5.", ["5"], True),
    ],
)
def test_exact_ignores_case_and_punctuation(answer, accepted, right):
    assert exact(answer, accepted) is right


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("It is a Red car.", ["red"], True),
        ("It is a red.", ["blue", "Red."], True),
        ("It is rendered.", ["red"], False),
        ("about 15", ["5"], False),
        ("C++ it is", ["c++"], True),
        ("", ["red"], False),
    ],
)
def test_contains_matches_whole_words(answer, accepted, right):
    assert contains(answer, accepted) is right
