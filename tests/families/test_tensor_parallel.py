"""Two tensor-parallel ranks select the same tokens and give the same answers as one rank."""

import pytest

from tests.engine.requests import RequestSpec, generate, generate_in_process

REQUESTS = [
    RequestSpec("What is this?", (1,), 8 / 9),
    RequestSpec("Which is larger, first or second?", (2, 3), 2 / 3),
    RequestSpec("unpruned", (4,), 0.0),
    RequestSpec("no image"),
]


def test_two_ranks_give_the_answers_of_one_rank(llm, checkpoint):
    two = generate_in_process(
        checkpoint,
        REQUESTS,
        tensor_parallel_size=2,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    one = generate(llm, REQUESTS)
    assert [answer.tokens for answer in two] == [answer.tokens for answer in one]
    for answer, expected in zip(two, one, strict=True):
        # Sums over ranks round differently. Another selection would change the values by more.
        assert answer.logprobs == [pytest.approx(step, abs=1e-3) for step in expected.logprobs]
