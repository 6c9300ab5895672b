"""Pruned requests equal a dense forward in plain PyTorch with the same stages."""

from dataclasses import replace

import pytest
import torch

from tests.engine.dense_oracle import DenseLlava
from tests.engine.requests import IMAGE_TOKEN, Answer, Ask, generate, generate_in_process, picture
from vitcop_vllm.demo.checkpoint import TINY
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

RATIOS = (2 / 3, 7 / 9, 8 / 9)
BOUNDARIES = PruningSettings().boundaries(TINY.layers)

ASKS = [
    Ask("What is this?", (1,)),
    Ask("Describe the picture in one word.", (2,), max_tokens=12),
    Ask("Which is larger, first or second?", (3, 4)),
]


def counts_at(ratio: float, settings: PruningSettings | None = None) -> VisualTokenCounts:
    return plan_counts(settings or PruningSettings(), ratio, TINY.layers, TINY.visual_tokens)


def assert_equals_oracle(
    oracle: DenseLlava, ask: Ask, answer: Answer, settings: PruningSettings | None = None
) -> None:
    """Tokens, unless sampled, and log-probabilities, each given the tokens before it."""
    assert ask.ratio is not None
    logits = oracle.logits(
        answer.prompt + answer.tokens[:-1],
        [picture(seed) for seed in ask.pictures],
        [counts_at(ask.ratio, settings)] * len(ask.pictures),
        len(answer.prompt),
    )
    expected = logits.log_softmax(-1)
    for step, (token, entries) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert ask.sampling or token == int(expected[step].argmax())
        for other, logprob in entries.items():
            assert logprob == pytest.approx(float(expected[step, other]), abs=1e-3)


@pytest.fixture(scope="module")
def pruned_asks() -> list[Ask]:
    # 0.2 prunes so mildly that Stage II merges nothing and Stage III drops the rest.
    return [replace(ask, ratio=ratio) for ratio in (*RATIOS, 0.2) for ask in ASKS]


def test_pruned_tokens_equal_the_dense_oracle(llm, checkpoint, pruned_asks):
    oracle = DenseLlava(checkpoint, BOUNDARIES)
    for ask, answer in zip(pruned_asks, generate(llm, pruned_asks), strict=True):
        assert_equals_oracle(oracle, ask, answer)


def test_reference_positions_equal_the_dense_oracle(checkpoint, pruned_asks):
    settings = {"positions": "reference", "default_ratio": 7 / 9}
    # The last one names no ratio and gets the default.
    asks = [*pruned_asks, replace(ASKS[0], ratio=None)]
    answers = generate_in_process(checkpoint, asks, additional_config={"pruning": settings})
    oracle = DenseLlava(checkpoint, BOUNDARIES, renumber_deep=True)
    for ask, answer in zip(asks, answers, strict=True):
        assert_equals_oracle(oracle, replace(ask, ratio=ask.ratio or 7 / 9), answer)


def test_other_boundaries_equal_the_dense_oracle(checkpoint, pruned_asks):
    settings = PruningSettings(shallow_boundary=2, deep_boundary=5)
    answers = generate_in_process(
        checkpoint,
        pruned_asks,
        additional_config={"pruning": settings.model_dump(mode="json")},
    )
    oracle = DenseLlava(checkpoint, settings.boundaries(TINY.layers))
    for ask, answer in zip(pruned_asks, answers, strict=True):
        assert_equals_oracle(oracle, ask, answer, settings)


def test_reference_positions_differ_from_original_ones(checkpoint):
    """Else the two modes would not test each other."""
    ask = replace(ASKS[0], ratio=8 / 9)
    tokens = [1] + [IMAGE_TOKEN] * counts_at(8 / 9).stages[0] + [50, 51, 52]
    one, other = (
        DenseLlava(checkpoint, BOUNDARIES, renumber_deep=mode).logits(
            tokens, [picture(1)], [counts_at(8 / 9)], len(tokens)
        )
        for mode in (False, True)
    )
    assert ask.pictures == (1,)
    assert not torch.allclose(one, other, atol=1e-2)


def test_prompt_holds_one_placeholder_per_token_that_stage_one_keeps(llm, pruned_asks):
    for ask, answer in zip(pruned_asks, generate(llm, pruned_asks), strict=True):
        assert ask.ratio is not None
        kept = counts_at(ask.ratio).stages[0] * len(ask.pictures)
        assert answer.prompt.count(IMAGE_TOKEN) == kept


def test_the_encoder_ends_with_what_stage_one_keeps(llm):
    """Two pictures pruned and one whole: nothing is computed for patches that go."""
    (model,) = llm.collective_rpc("get_model")
    rows: list[torch.Size] = []
    mlp = model.vision_tower.vision_model.encoder.layers[-1].mlp
    hook = mlp.fc1.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1]))
    try:
        generate(llm, [Ask("What is this?", (71, 72), 8 / 9, 1), Ask("And this?", (73,), 0.0, 1)])
    finally:
        hook.remove()
    stays = 2 * counts_at(8 / 9).stages[0] + counts_at(0.0).encoder
    # vLLM's own way, which a whole picture takes when none beside it is pruned, computes [CLS].
    assert sum(shape.numel() for shape in rows) in (stays, stays + 1)


def test_a_prompt_may_end_with_its_picture(llm, checkpoint):
    """The answer then begins from the last survivor."""
    from vllm import SamplingParams

    (output,) = llm.generate(
        {
            "prompt": "USER: look: <image>",
            "multi_modal_data": {"image": [picture(9)]},
            "mm_processor_kwargs": {"pruning_ratio": 8 / 9},
        },
        SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True),
        use_tqdm=False,
    )
    answer = Answer(
        list(output.prompt_token_ids),
        list(output.outputs[0].token_ids),
        [{t: e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs],
    )
    assert answer.prompt[-1] == IMAGE_TOKEN
    assert_equals_oracle(DenseLlava(checkpoint, BOUNDARIES), Ask("", (9,), 8 / 9), answer)
