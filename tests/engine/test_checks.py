"""Every row of the start-up checks can be read on its own."""

import pytest

from tests.engine.test_startup import config_of
from vitcop_vllm.engine.checks import (
    ENGINE_CHECKS,
    SETTINGS_CHECKS,
    STAGE_ONE_CHECKS,
    STAGED_CHECKS,
    Check,
    StartUp,
    find_obstacles,
)
from vitcop_vllm.engine.families import FAMILIES
from vitcop_vllm.pruning.settings import PruningSettings

# Families may share a row.
ROWS = [
    *dict.fromkeys(
        (
            *ENGINE_CHECKS,
            *STAGED_CHECKS,
            *STAGE_ONE_CHECKS,
            *SETTINGS_CHECKS,
            *(check for family in FAMILIES.values() for check in family.checks),
        )
    )
]


@pytest.fixture(scope="module")
def start_up(checkpoint) -> StartUp:
    family = FAMILIES["LlavaForConditionalGeneration"]
    settings = PruningSettings()
    return StartUp(
        config_of(checkpoint),
        settings,
        family.has_cls,
        family.decoders,
    )


@pytest.mark.parametrize("check", ROWS, ids=lambda check: check.reason[:40])
def test_a_check_names_the_reason_and_the_remedy(check: Check, start_up: StartUp):
    assert check.reason
    assert check.remedy
    sentence = check.sentence(start_up)  # fails where StartUp lacks what the sentence names
    assert "{" not in sentence
    assert "; " in sentence


def test_no_two_rows_say_the_same(start_up):
    sentences = {check.sentence(start_up) for check in ROWS}
    assert len(sentences) == len(ROWS)


def test_all_obstacles_are_named_in_the_order_of_the_rows(start_up):
    never, first, second = (
        Check("reason 0", "remedy 0", lambda start: False),
        Check("reason 1", "remedy 1", lambda start: True),
        Check("reason 2", "remedy 2", lambda start: start.settings.selector == "vitcop"),
    )
    expected = ["reason 1; remedy 1", "reason 2; remedy 2"]
    assert find_obstacles((first, never, second), start_up) == expected
