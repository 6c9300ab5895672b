"""Ratio 0 gives the answers of stock vLLM, token for token."""

from dataclasses import replace

import pytest

from tests.engine.dense_oracle import assert_equals_oracle
from tests.engine.requests import generate
from tests.families.stock import TOGETHER, WITH_RATIO


def test_ratio_zero_gives_the_tokens_of_stock_vllm(llm, stock):
    answers = generate(llm, TOGETHER)
    assert [answer.prompt for answer in answers] == [answer.prompt for answer in stock]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in stock]


def test_ratio_zero_gives_the_log_probabilities_of_stock_vllm(llm, stock):
    for answer, expected in zip(generate(llm, TOGETHER), stock, strict=True):
        assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in expected.logprobs]


def test_tokens_differ_between_requests(stock):
    """If all answers were equal, the comparisons above would prove nothing."""
    assert len({tuple(answer.tokens) for answer in stock}) == len(stock)


def test_the_unpruned_dense_oracle_equals_stock_vllm(oracle, stock):
    for spec, answer in zip(TOGETHER, stock, strict=True):
        assert_equals_oracle(oracle, replace(spec, ratio=0.0), answer)


def test_plugin_is_absent_from_the_stock_engine(family, stock_with_ratio):
    """Stock vLLM ignores the ratio, so the prompt has a placeholder per visual token."""
    assert stock_with_ratio.prompt.count(family.image_token) == family.kept(0.0, *WITH_RATIO.images)
