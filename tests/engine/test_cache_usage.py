"""Counts of prompt tokens that a request reads from the prefix cache and writes to it."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.requests import sample_image


@dataclass
class Conversation:
    """A chat whose turns may have images.

    Attributes:
        text: Text of all turns so far.
        images: Images of all turns so far.
    """

    ratio: float
    text: str = ""
    images: list[Any] = field(default_factory=list)

    def add_turn(self, question: str, *seeds: int) -> None:
        self.text += "USER: " + "<image>\n" * len(seeds) + question + " ASSISTANT:"
        self.images += [sample_image(seed) for seed in seeds]

    def prompt(self) -> dict[str, Any]:
        return {
            "prompt": self.text,
            "multi_modal_data": {"image": self.images},
            "mm_processor_kwargs": {"pruning_ratio": self.ratio},
        }


TURNS = [
    [("What does the sign say?", 1), ("How many objects are there?", 1)],
    [("What is it?", 2), ("And now?", 3), ("Which of the three is larger, and why is it so?", 4)],
    [("Which is larger?", 5, 6), ("Look again.",), ("And these two, next to the first?", 7, 5)],
    [("x" * 17,), ("Name it.", 8), ("y" * 90,), ("z", 9)],
]
"""Conversations. A turn is a question and the seeds of its images."""


@pytest.mark.parametrize("ratio", [0.0, 0.2, 2 / 3, 8 / 9, 17 / 18])
@pytest.mark.parametrize("turns", TURNS)
def test_a_repeated_request_reads_every_token_that_the_first_read_or_wrote(llm, turns, ratio):
    """Prompts are longer than a step; images end inside blocks of every segment."""
    assert llm.reset_prefix_cache()
    conversation = Conversation(ratio)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    written = 0
    for question, *seeds in turns:
        conversation.add_turn(question, *seeds)
        first, again = (
            llm.generate([conversation.prompt()], [params], use_tqdm=False)[0] for _ in range(2)
        )
        assert first.num_cached_tokens >= written
        written = first.num_cached_tokens + first.num_cache_creation_tokens
        # No prompt here ends at a block or image boundary, so some of its tokens are not cached.
        assert 0 < written < len(first.prompt_token_ids)
        assert (again.num_cached_tokens, again.num_cache_creation_tokens) == (written, 0)
        conversation.text += first.outputs[0].text
