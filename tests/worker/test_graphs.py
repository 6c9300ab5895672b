"""Decode steps from full CUDA graphs, in vLLM's real model runner V1."""

from tests.engine.requests import Ask, generate
from tests.worker.graphs import capture_decode_graphs

ASKS = [
    Ask("short", (1,), 8 / 9, max_tokens=6),
    Ask("a somewhat longer question about it " * 3, (1,), 2 / 3, max_tokens=20),
    Ask("first or second?", (2, 3), 7 / 9, max_tokens=30),
    Ask("unpruned", (4,), 0.0, max_tokens=16),
    Ask("no image, " * 20, max_tokens=40),
]


def test_decode_steps_from_graphs_answer_as_without(llm, monkeypatch):
    alone = [generate(llm, [ask])[0].tokens for ask in ASKS]
    replayed = capture_decode_graphs(llm, monkeypatch)
    assert [answer.tokens for answer in generate(llm, ASKS)] == alone
    # Some graphs were larger than the batches that they ran for.
    assert set(replayed) == {2, 4, 8}
    assert len(replayed) >= max(ask.max_tokens for ask in ASKS) // 2
