"""A request's answer does not depend on other requests of the batch."""

import random

import pytest

from tests.engine.requests import RequestSpec, generate

REQUESTS = [
    RequestSpec("short", (1,), 8 / 9),
    RequestSpec("a somewhat longer question about it " * 3, (1,), 2 / 3, max_tokens=20),
    RequestSpec("first or second?", (2, 3), 7 / 9),
    RequestSpec("first or second?", (3, 2), 7 / 9, max_tokens=3),
    RequestSpec("unpruned", (4,), 0.0, max_tokens=16),
    RequestSpec("no image, " * 20),
    RequestSpec("hi", max_tokens=30),
    RequestSpec("same image, other ratio", (1,), 0.5),
    RequestSpec("four of them", (1, 2, 3, 4), 8 / 9, max_tokens=5),
    RequestSpec("thin ones", (101, 5, 102), 2 / 3, max_tokens=6),
    RequestSpec("tokens dropped at the deep boundary alone", (105,), 0.2),
    RequestSpec("an icon beside an image", (207, 3), 8 / 9, max_tokens=5),
]


@pytest.fixture(scope="module")
def alone(llm):
    return [generate(llm, [spec])[0].tokens for spec in REQUESTS]


def test_a_mixed_batch_gives_the_same_tokens_as_single_requests(llm, alone):
    assert [answer.tokens for answer in generate(llm, REQUESTS)] == alone


def test_order_and_repetition_do_not_matter(llm, alone):
    order = [*range(len(REQUESTS)), *range(len(REQUESTS))]
    random.Random(0).shuffle(order)
    answers = generate(llm, [REQUESTS[i] for i in order])
    assert [answer.tokens for answer in answers] == [alone[i] for i in order]


def test_ratios_change_the_answer(llm):
    """An engine that ignores ratios would pass the tests above."""
    answers = generate(llm, [RequestSpec("What?", (1,), ratio) for ratio in (0.0, 0.5, 8 / 9)])
    assert len({str(answer.logprobs) for answer in answers}) == 3
    assert len({len(answer.prompt) for answer in answers}) == 3
