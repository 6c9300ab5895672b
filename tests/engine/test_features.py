"""Other features of vLLM than greedy decoding, with pruned images."""

import re
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from benchmarks.serving import NO_PLUGIN
from tests.engine.dense_oracle import DenseLlava
from tests.engine.requests import (
    IMAGE_TOKEN,
    STOCK,
    RequestSpec,
    generate,
    generate_in_process,
    sample_image,
)
from tests.engine.scheduling import engine_core, recorded_steps
from tests.families.family import LLAVA
from vitcop_vllm.demo.checkpoint import TINY

REQUEST = RequestSpec("What is it?", (1,), 8 / 9)
COUNTS = LLAVA.counts(8 / 9, image=1)


def generate_one(llm, *, spec: RequestSpec = REQUEST, **sampling):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **sampling})
    (output,) = llm.generate(spec.prompt(), params, use_tqdm=False)
    return output


def test_several_answers_to_one_prompt(llm):
    (alone,) = generate(llm, [REQUEST])
    likeliest = generate_one(llm, n=3, temperature=1, top_k=1, seed=3).outputs
    assert [list(answer.token_ids) for answer in likeliest] == [alone.tokens] * 3
    different = generate_one(llm, n=3, temperature=1, seed=3).outputs
    assert len({tuple(answer.token_ids) for answer in different}) == 3


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [({"choice": ["yes", "no"]}, "yes|no"), ({"regex": "[a-c]{4}"}, "[a-c]{4}")],
)
def test_structured_outputs(llm, structure, pattern):
    output = generate_one(
        llm, structured_outputs=StructuredOutputsParams(**structure), ignore_eos=False
    )
    assert re.fullmatch(pattern, output.outputs[0].text)


def test_stop_strings(llm):
    text = generate_one(llm, max_tokens=30).outputs[0].text
    stop = text[len(text) // 2 :][:2]
    assert len(stop) == 2
    (answer,) = generate_one(llm, max_tokens=30, stop=[stop]).outputs
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]


def test_log_probabilities_of_a_prompt_s_text_equal_the_dense_oracle(llm, checkpoint):
    """Entries of placeholders are not compared: they predict visual tokens and mean nothing."""
    output = generate_one(llm, prompt_logprobs=2)
    prompt = list(output.prompt_token_ids)
    assert len(output.prompt_logprobs) == len(prompt)
    after = len(prompt) - prompt[::-1].index(IMAGE_TOKEN)
    oracle = DenseLlava(checkpoint, LLAVA.boundaries)
    logits = oracle.logits(prompt, [sample_image(1)], [COUNTS], after)
    expected = logits.log_softmax(-1)
    for i, token in enumerate(prompt[after:]):
        entries = output.prompt_logprobs[after + i]
        assert token in entries
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(float(expected[i, other]), abs=1e-3)


def test_a_prompt_of_the_maximum_length_is_answered_and_a_longer_one_refused(llm):
    room = llm.llm_engine.model_config.max_model_len
    empty = len(generate_one(llm, spec=RequestSpec("", (1,), 8 / 9)).prompt_token_ids)
    fits = RequestSpec("x" * (room - empty - 1), (1,), 8 / 9)
    (answer,) = generate_one(llm, spec=fits, max_tokens=8).outputs
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")
    with pytest.raises(VLLMValidationError, match="maximum model length"):
        generate_one(llm, spec=RequestSpec("x" * (room - empty + 1), (1,), 8 / 9))
    assert generate_one(llm).outputs[0].token_ids


def test_a_prompt_too_long_unpruned_fits_when_pruned(llm):
    """vLLM checks the prompt's length after Stage I."""
    text = "x" * 1100
    # Images of no other test: vLLM takes images of a refused request for cached ones.
    four = (51, 52, 53, 54)
    with pytest.raises(VLLMValidationError, match="maximum model length"):
        generate_one(llm, spec=RequestSpec(text, four, 0.0))
    assert generate_one(llm, spec=RequestSpec(text, four, 8 / 9)).outputs[0].token_ids


def test_a_step_encodes_no_more_patches_than_its_budget(llm, monkeypatch):
    """Each of 16 images keeps 76 tokens, but the encoder computes its 256 patches."""
    scheduler = engine_core(llm).scheduler
    steps = recorded_steps(scheduler, monkeypatch)
    llm.llm_engine.reset_encoder_cache()
    # Four requests of four new images.
    specs = [RequestSpec("Q", tuple(range(i, i + 4)), 8 / 9) for i in range(500, 516, 4)]
    generate(llm, specs)
    encoded = [sum(map(len, step.scheduled_encoder_inputs.values())) for step in steps]
    max_images = scheduler.max_num_encoder_input_tokens // TINY.visual_tokens
    assert sum(encoded) == 16
    assert max(encoded) == max_images < 400 // COUNTS.stages[0]


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's FP8 kernels for CPUs need AVX-512 or AMX",
)
def test_an_fp8_kv_cache(checkpoint):
    specs = [
        RequestSpec(text, (1, 2), ratio)
        for ratio in (0.0, 8 / 9)
        for text in ("Which?", "Name one.")
    ]
    options: dict[str, Any] = {"kv_cache_dtype": "fp8"}
    reusing = generate_in_process(checkpoint, [], in_turn=specs, **options)
    computed = generate_in_process(checkpoint, specs, enable_prefix_caching=False, **options)
    stock = generate_in_process(checkpoint, specs[:2], env=NO_PLUGIN, **{**STOCK, **options})
    assert [answer.reused > 0 for answer in reusing] == [False, True, False, True]
    assert [answer.tokens for answer in reusing] == [answer.tokens for answer in computed]
    assert [answer.tokens for answer in reusing[:2]] == [answer.tokens for answer in stock]
    full = generate_in_process(checkpoint, specs)
    assert [answer.logprobs for answer in full] != [answer.logprobs for answer in computed]
