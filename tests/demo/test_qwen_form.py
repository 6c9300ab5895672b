"""Training in Qwen2.5-VL's form computes what transformers' processor and model compute."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo.batch import BatchShape
from demo.dataset import Encoder, make_batch
from demo.phases import QWEN_PHASES
from demo.questions import Turn, exam
from demo.qwen_form import DEMO_QWEN, QwenForm, copy_decoder
from demo.world import SIDE
from tests.demo.test_train import FORMS
from vitcop_vllm.demo.checkpoint import DEMO, DEMO_MODEL

QUESTION = Turn("Is there a red star?", "no")
TEXT = "<s>USER: Is there a red star? ASSISTANT: no</s>"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[QwenForm, Any, Any, Any]:
    """A tiny form, its model and tokenizer, and the processor that it wrote."""
    from transformers import AutoProcessor

    form: Any = FORMS["qwen"]
    path = tmp_path_factory.mktemp("qwen")
    model, tokenizer = form.build(path, (), 0)
    return form, model, tokenizer, AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def batch(built) -> Any:
    """Pairs of images that are not square, with half of their visual tokens."""
    form, _, tokenizer, _ = built
    shape = BatchShape(168, 4, 120, (0.5,), pair_share=1.0)
    return make_batch(shape, Encoder(tokenizer, form), (3, 1))


def prepared(processor: Any, pixels: torch.Tensor, turn: Turn) -> Any:
    """The processor's inputs of a request with images that it does not resize."""
    content = [{"type": "image"}] * len(pixels) + [{"type": "text", "text": turn.question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    images = [Image.fromarray(image.numpy()) for image in pixels]
    return processor(
        text=prompt, images=images, return_tensors="pt", add_special_tokens=False, do_resize=False
    )


def test_prompts_patches_and_positions_equal_the_processor_s(built, batch):
    form, model, tokenizer, processor = built
    pixels = batch.pixels[:2]
    assert pixels.shape[1] != pixels.shape[2]
    inputs = prepared(processor, pixels, QUESTION)
    encoder = Encoder(tokenizer, form)
    frame = frame_of(pixels)
    prefix = encoder.prefix([frame.tokens] * 2)
    ids = prefix + encoder.ids(f"{QUESTION.question} ASSISTANT:")
    assert ids == inputs["input_ids"][0].tolist()

    every = np.tile(np.arange(frame.tokens), (2, 1))
    places = form.positions(prefix, encoder.image, every, frame)
    expected, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    assert places.tolist() == expected[:, 0, : places.shape[1]].tolist()

    seen = form.see(model.to(torch.bfloat16), pixels).tokens
    visual = model.model.visual
    visual.config._attn_implementation = "eager"
    convolved = type(visual.patch_embed).forward
    embed, visual.patch_embed.forward = (
        visual.patch_embed.forward,
        lambda p: convolved(visual.patch_embed, p),
    )
    stock = visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    visual.patch_embed.forward = embed
    torch.testing.assert_close(seen.flatten(0, 1), stock, atol=0.02, rtol=0.05)
    assert float(stock.detach().float().std()) > 0.02  # else the comparison would prove nothing


def frame_of(pixels: torch.Tensor) -> Any:
    from demo.form import Frame

    _, height, width, _ = pixels.shape
    return Frame((width, height), height // 28, width // 28, 2, 14)


def test_dropped_tokens_leave_gaps_in_the_positions(built, batch):
    form, _, tokenizer, _ = built
    sequences = batch.sequences
    frame = frame_of(batch.pixels)
    is_image = sequences.ids[0] == Encoder(tokenizer, form).image
    time, row, column = sequences.positions[:, 0, is_image]
    first, second = time.unique().tolist()
    for start, kept in zip((first, second), sequences.kept[:2], strict=True):
        here = time == start
        assert ((row - start) * frame.columns + column - start)[here].tolist() == kept.tolist()
    # Two tokens end the first image and begin the second one.
    assert second - first >= max(frame.rows, frame.columns) + 2
    begin = int((sequences.segments[0] == 0).sum())
    assert int(sequences.positions[:, 0, begin].min()) > second + max(frame.rows, frame.columns)


def test_targets_of_a_visual_token_are_those_of_its_four_patches(batch):
    assert batch.targets["letter"].shape[1:] == (frame_of(batch.pixels).tokens, 4)
    top, bottom = batch.targets["row"][..., 0], batch.targets["row"][..., 2]
    both = (top > 0) & (bottom > 0)
    assert bool((bottom[both] >= top[both]).all())
    assert bool((bottom[both] > top[both]).any())


def test_a_warm_start_answers_as_the_packaged_model(tmp_path):
    """M-RoPE equals RoPE on text, so with the same base only the vision tower is new."""
    from transformers import LlavaForConditionalGeneration

    shape = replace(DEMO_QWEN, rope_theta=DEMO.rope_theta)
    model: Any
    model, tokenizer = QwenForm(shape, warm_start=None).build(tmp_path, (), 0)
    # Written-out attention gets its mask from the training program.
    model.model.language_model.config._attn_implementation = "eager"
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    random = model(input_ids=ids).logits
    copy_decoder(DEMO_MODEL, model, tokenizer)
    llava: Any = LlavaForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    wanted = llava(input_ids=ids).logits
    ours = model(input_ids=ids).logits
    known = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    torch.testing.assert_close(ours[..., :known], wanted[..., :known], atol=1e-3, rtol=1e-3)
    assert float((random - wanted).detach().abs().mean()) > 0.1


def test_sizes_vary_in_training_and_in_the_exam():
    rng = np.random.default_rng(0)
    form = QwenForm()
    for phase in QWEN_PHASES:
        frames = [form.frame(phase.batch.side, rng) for _ in range(30)]
        assert len({frame.pixels for frame in frames}) > 15
        assert all(frame.tokens <= form.shape.max_visual_tokens for frame in frames)
    sizes = {image.size for example in exam(2, varied=True) for image in example.images}
    assert len(sizes) > 15
    assert all(abs(w * h / SIDE**2 - 1) < 0.02 for w, h in sizes)
