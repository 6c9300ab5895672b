"""With settings other than the defaults, pruned LLaVA equals the dense oracle."""

from dataclasses import replace

import pytest
import torch

from tests.engine.dense_oracle import DenseLlava, assert_equals_oracle
from tests.engine.requests import (
    IMAGE_TOKEN,
    RequestSpec,
    generate,
    generate_in_process,
    sample_image,
)
from tests.families.family import LLAVA
from tests.families.test_against_oracle import RATIOS, REQUESTS
from vitcop_vllm.demo.checkpoint import TINY
from vitcop_vllm.pruning.settings import PruningSettings


@pytest.fixture(scope="module")
def pruned_specs() -> list[RequestSpec]:
    return [replace(spec, ratio=ratio) for ratio in RATIOS for spec in REQUESTS]


def test_reference_positions_equal_the_dense_oracle(checkpoint, pruned_specs):
    settings = {"positions": "reference", "default_ratio": 7 / 9}
    # The last request sends no ratio and gets the default.
    specs = [*pruned_specs, replace(REQUESTS[0], ratio=None)]
    answers = generate_in_process(checkpoint, specs, additional_config={"pruning": settings})
    oracle = DenseLlava(checkpoint, LLAVA.boundaries, renumber_deep=True)
    for spec, answer in zip(specs, answers, strict=True):
        assert_equals_oracle(oracle, replace(spec, ratio=spec.ratio or 7 / 9), answer)


def test_other_boundaries_equal_the_dense_oracle(checkpoint, pruned_specs):
    settings = PruningSettings(shallow_boundary=2, deep_boundary=5)
    answers = generate_in_process(
        checkpoint,
        pruned_specs,
        additional_config={"pruning": settings.model_dump(mode="json")},
    )
    oracle = DenseLlava(checkpoint, settings.boundaries(TINY.layers))
    for spec, answer in zip(pruned_specs, answers, strict=True):
        assert_equals_oracle(oracle, spec, answer, settings)


def test_reference_positions_differ_from_original_ones(checkpoint):
    """If both modes gave equal logits, the tests above could not tell them apart."""
    counts = LLAVA.counts(8 / 9, image=1)
    tokens = [1] + [IMAGE_TOKEN] * counts.stages[0] + [50, 51, 52]
    original, reference = (
        DenseLlava(checkpoint, LLAVA.boundaries, renumber_deep=mode).logits(
            tokens, [sample_image(1)], [counts], len(tokens)
        )
        for mode in (False, True)
    )
    assert not torch.allclose(original, reference, atol=1e-2)


def test_the_encoder_s_last_mlp_computes_kept_patches_only(llm):
    """Two images are pruned and one is not."""
    (model,) = llm.collective_rpc("get_model")
    rows: list[torch.Size] = []
    mlp = model.vision_tower.vision_model.encoder.layers[-1].mlp
    hook = mlp.fc1.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1]))
    try:
        generate(
            llm,
            [
                RequestSpec("What is this?", (71, 72), 8 / 9, 1),
                RequestSpec("And this?", (73,), 0.0, 1),
            ],
        )
    finally:
        hook.remove()
    kept = LLAVA.kept(8 / 9, 71, 72) + LLAVA.kept(0.0, 73)
    # If the unpruned image is encoded by itself, vLLM's own code also computes its [CLS].
    assert sum(shape.numel() for shape in rows) in (kept, kept + 1)
