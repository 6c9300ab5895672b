"""Ratio 0 is stock vLLM, token for token."""

import pytest

from tests.engine.requests import (
    STOCK,
    Answer,
    Ask,
    generate,
    generate_in_process,
)
from vitcop_vllm.lab.serving import NO_PLUGIN

ASKS = [
    Ask("What is this?", (1,), 0.0),
    Ask("What is this?", (2,), 0.0, max_tokens=24),
    Ask("Compare the two pictures, please.", (3, 4), 0.0),
    Ask("And without a ratio?", (5,)),
    Ask("No picture at all."),
    Ask("Tell me a story", (6,), 0.0, sampling={"temperature": 1.0, "seed": 7}),
    Ask("Tell me a story", (6,), 0.0, sampling={"temperature": 0.8, "top_p": 0.9, "seed": 8}),
    Ask("Hello", sampling={"temperature": 1.2, "top_k": 20, "seed": 9}),
]


@pytest.fixture(scope="module")
def stock(checkpoint) -> list[Answer]:
    return generate_in_process(checkpoint, ASKS, env=NO_PLUGIN, **STOCK)


def test_ratio_zero_gives_the_tokens_of_stock_vllm(llm, stock):
    ours = generate(llm, ASKS)
    assert [answer.prompt for answer in ours] == [answer.prompt for answer in stock]
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in stock]


def test_ratio_zero_gives_the_log_probabilities_of_stock_vllm(llm, stock):
    for ours, theirs in zip(generate(llm, ASKS), stock, strict=True):
        assert ours.logprobs == [pytest.approx(step, abs=1e-4) for step in theirs.logprobs]


def test_tokens_differ_between_requests(stock):
    """Else the comparisons above would compare nothing."""
    assert len({tuple(answer.tokens) for answer in stock}) == len(stock)


def test_plugin_is_absent_from_the_stock_engine(checkpoint):
    """A ratio means nothing to stock vLLM: it must see every placeholder."""
    (answer,) = generate_in_process(checkpoint, [Ask("Q", (1,), 8 / 9)], env=NO_PLUGIN, **STOCK)
    assert len(answer.prompt) > 256
