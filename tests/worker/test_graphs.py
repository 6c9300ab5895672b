"""Decode steps from simulated full CUDA graphs, in vLLM's real model runner V1."""

from tests.engine.requests import RequestSpec, generate
from tests.worker.graphs import capture_decode_graphs

REQUESTS = [
    RequestSpec("short", (1,), 8 / 9, max_tokens=6),
    RequestSpec("a somewhat longer question about it " * 3, (1,), 2 / 3, max_tokens=20),
    RequestSpec("first or second?", (2, 3), 7 / 9, max_tokens=30),
    RequestSpec("unpruned", (4,), 0.0, max_tokens=16),
    RequestSpec("no image, " * 20, max_tokens=40),
]


def test_graphs_do_not_change_answers(llm, monkeypatch):
    alone = [generate(llm, [spec])[0].tokens for spec in REQUESTS]
    replayed = capture_decode_graphs(llm, monkeypatch)
    assert [answer.tokens for answer in generate(llm, REQUESTS)] == alone
    # Some batches were padded to the size of their graph.
    assert set(replayed) == {2, 4, 8}
    assert len(replayed) >= max(spec.max_tokens for spec in REQUESTS) // 2
