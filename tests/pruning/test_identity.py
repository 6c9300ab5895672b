"""A picture's identity says what is kept of it."""

from types import SimpleNamespace

import pytest

from vitcop_vllm.pruning.identity import counts_of_identifier, plan_request, tag_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts

COUNTS = VisualTokenCounts(576, 20, (172, 77, 15))


def feature(identifier: str, offset: int, length: int = 172):
    return SimpleNamespace(
        identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length)
    )


def test_counts_survive_the_trip():
    assert counts_of_identifier(tag_identifier("f00d", COUNTS)) == COUNTS


def test_a_lora_prefix_does_not_matter():
    assert counts_of_identifier("adapter:" + tag_identifier("f00d", COUNTS)) == COUNTS


def test_a_client_cannot_name_its_own_counts():
    forged = tag_identifier("f00d@576.1.1.1.1", COUNTS)
    assert counts_of_identifier(forged) == COUNTS


def test_equal_pictures_with_other_counts_have_other_names():
    other = VisualTokenCounts.unpruned(576)
    assert tag_identifier("f00d", COUNTS) != tag_identifier("f00d", other)


def test_a_request_without_pruned_pictures_has_no_plan():
    assert plan_request([]) is None
    whole = tag_identifier("f00d", VisualTokenCounts.unpruned(172))
    assert plan_request([feature(whole, 3)]) is None


def test_a_plan_lists_spans_where_the_placeholders_are():
    plan = plan_request([feature(tag_identifier("a", COUNTS), 3)])
    assert plan is not None
    assert [(span.offset, span.end) for span in plan.spans] == [(3, 175)]


def test_a_picture_processed_elsewhere_has_as_many_tokens_as_placeholders():
    assert plan_request([feature("f00d", 3)]) is None
    plan = plan_request([feature("f00d", 3), feature(tag_identifier("a", COUNTS), 200)])
    assert plan is not None
    assert plan.spans[0].counts == VisualTokenCounts.unpruned(172)


def test_counts_that_do_not_fit_the_prompt_are_not_believed():
    assert plan_request([feature(tag_identifier("a", COUNTS), 3, length=171)]) is None
    assert plan_request([feature("f00d@5.1.9.9.9", 3)]) is None


def test_an_identity_without_counts_is_an_error_to_who_must_know_them():
    with pytest.raises(RuntimeError, match="without visual token counts"):
        counts_of_identifier("f00d")
