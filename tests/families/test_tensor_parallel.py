"""Two tensor-parallel ranks select the same tokens and give the same answers as one rank."""

from contextlib import nullcontext

import pytest

from tests.engine.comparing import comparing_frames
from tests.engine.requests import RequestSpec, generate, generate_in_process

REQUESTS = [
    RequestSpec("What is this?", (1,), 8 / 9),
    RequestSpec("Which is larger, first or second?", (2, 3), 2 / 3),
    RequestSpec("unpruned", (4,), 0.0),
    RequestSpec("no image"),
]

VIDEOS = [
    RequestSpec("What happens?", ratio=8 / 9, videos=(1,)),
    RequestSpec("In the image or in the video?", (1,), 0.5, videos=(4,)),
]
"""For families that take videos, with ``compare_frames``."""


def test_two_ranks_give_the_answers_of_one_rank(family, llm, checkpoint):
    compares = family.frames is not None
    specs = [*REQUESTS, *(VIDEOS if compares else ())]
    two = generate_in_process(
        checkpoint,
        specs,
        tensor_parallel_size=2,
        additional_config={"pruning": {"compare_frames": compares}},
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    with comparing_frames(llm) if compares else nullcontext():
        one = generate(llm, specs)
    assert [answer.tokens for answer in two] == [answer.tokens for answer in one]
    for answer, expected in zip(two, one, strict=True):
        # Sums over ranks round differently. Another selection would change the values by more.
        assert answer.logprobs == [pytest.approx(step, abs=1e-3) for step in expected.logprobs]
