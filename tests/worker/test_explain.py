"""What is told of a picture's patches is what the dense oracle chooses."""

from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.dense_oracle import DenseLlava
from tests.engine.requests import Ask, generate, picture
from tests.engine.test_against_oracle import BOUNDARIES, counts_at
from vitcop_vllm.pruning.identity import MOST_EXPLAINED
from vitcop_vllm.pruning.selection import select_stage_two
from vitcop_vllm.worker.explain import ChoiceRecorder, PatchChoice

ASKS = [
    Ask("Which?", (3, 4), 8 / 9, max_tokens=2),
    Ask("What is this?", (1,), 2 / 3, max_tokens=2),
    Ask("What is this?", (1,), 0.2, max_tokens=2),
    Ask("What is this?", (1,), 0.0, max_tokens=2),
]


class Witness(DenseLlava):
    """The oracle, writing down what it chooses: for each picture, patches kept by stage."""

    def choices(self, ask: Ask, prompt: list[int]) -> list[list[list[int]]]:
        self.patches: list[list[int]] = []
        self.alive: list[dict[int, list[int]]] = []
        images = [picture(seed) for seed in ask.pictures]
        assert ask.ratio is not None
        counts = [counts_at(ask.ratio)] * len(images)
        self.first = [
            i for i, t in enumerate(prompt) if t == self.config.image_token_index
        ]  # rows of pictures, one after the other
        self.logits(prompt, images, counts, len(prompt))
        n1 = counts[0].stages[0]
        told = []
        for number, patches in enumerate(self.patches):
            start = self.first[number * n1]
            later = [
                [patches[position - start] for position in alive[number]] for alive in self.alive
            ]
            told.append([patches, *later])
        return told

    def choose_patches(self, *args: object) -> list[int]:
        self.patches.append(super().choose_patches(*args))  # type: ignore[arg-type]
        return self.patches[-1]

    def merge(self, *args):
        return self._written_down(super().merge(*args))

    def drop(self, *args):
        return self._written_down(super().drop(*args))

    def _written_down(self, outcome):
        alive: dict[int, list[int]] = {}
        for row in outcome[1]:
            if row.picture is not None:
                alive.setdefault(row.picture, []).append(row.position)
        self.alive.append(alive)
        return outcome


def recorder_of(llm) -> ChoiceRecorder:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    # Model runner V2 is vLLM's own, and has an adapter beside it.
    return getattr(runner, "model_state", runner).choices


def explained(llm, ask: Ask, request: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Prompt and choices of a request that asks to be explained, at the same answer."""
    prompt = ask.prompt()
    prompt["mm_processor_kwargs"]["explain_as"] = request
    (output,) = llm.generate([prompt], [ask.params()], use_tqdm=False)
    (plain,) = generate(llm, [ask])
    assert list(output.outputs[0].token_ids) == plain.tokens
    assert list(output.prompt_token_ids) == plain.prompt
    kept = recorder_of(llm)._choices
    names = [name for name in kept if name.startswith(f"explain:{request}:")]
    (told,) = llm.collective_rpc("take_choices", args=(names,))
    assert not kept, "what was asked for is forgotten"
    return plain.prompt, [told[name] for name in names]


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: f"{len(ask.pictures)}@{ask.ratio:.2f}")
def test_choices_are_the_oracle_s(llm, checkpoint, ask):
    prompt, told = explained(llm, ask, "one")
    expected = Witness(checkpoint, BOUNDARIES).choices(ask, prompt)
    if ask.ratio == 0:
        assert told == []
        return
    for mine, stages in zip(told, expected, strict=True):
        patches = mine["patches"]
        shallow = [patches[i] for i in mine.get("shallow", range(len(patches)))]
        deep = [shallow[i] for i in mine["deep"]]
        assert [patches, shallow, deep] == stages
        assert len(mine["saliency"]) == 256
        assert set(patches) == set(
            sorted(range(256), key=lambda p: -mine["saliency"][p])[: len(patches)]
        )


def test_the_same_picture_twice_is_told_twice(llm):
    ask = Ask("Which?", (1, 1), 8 / 9, max_tokens=1)
    _, (first, second) = explained(llm, ask, "two")
    assert first["patches"] == second["patches"]


def test_every_token_that_stays_or_is_merged_is_told_once(llm):
    _, (told,) = explained(llm, ASKS[1], "three")
    merged = [member for group in told["merged"] for member in group]
    whole = set(told["shallow"]) - {group[0] for group in told["merged"]}
    assert sorted([*merged, *whole]) == list(range(len(told["patches"])))


def test_nothing_is_kept_of_pictures_that_nobody_asked_about(llm):
    generate(llm, ASKS)
    assert not recorder_of(llm)._choices


def test_old_explanations_make_room():
    recorder = ChoiceRecorder()
    choice = PatchChoice(torch.arange(3), None, None)
    for number in range(MOST_EXPLAINED + 2):
        recorder.record_patches(f"picture {number}", choice)
    assert not recorder.take(["picture 0", "picture 1"])
    assert recorder.take(["picture 2"]) == {"picture 2": {"patches": [0, 1, 2]}}


def test_groups_begin_with_the_row_that_stands_for_them():
    norms = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0, 9.0]])
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]])
    recorder = ChoiceRecorder()
    recorder.record_tokens(
        ["a", None], 1, select_stage_two(norms.expand(2, -1), labels.expand(2, -1), 2, 4)
    )
    told = recorder.take(["a"])["a"]
    assert len(told["shallow"]) == 4
    assert all(group[0] in told["shallow"] for group in told["merged"])
    assert sorted({i for group in told["merged"] for i in group} | set(told["shallow"])) == [
        *range(6)
    ]


def test_what_is_seen_of_a_picture_is_what_the_processor_shows(llm):
    """A ramp of colours goes in, and its corners come out."""
    info = llm.llm_engine.renderer.mm_processor.info
    processor = info.get_hf_processor().image_processor
    side = processor.crop_size["height"]
    for width, height in [(224, 224), (500, 250), (301, 640), (100, 90), (1000, 224)]:
        left, top, right, bottom = info.layout(width, height).box
        across = torch.linspace(0, 255, width).round().byte().expand(height, -1)
        down = torch.linspace(0, 255, height).round().byte()[:, None].expand(-1, width)
        ramp = torch.stack((across, down, down), dim=-1).numpy()
        shown = processor(Image.fromarray(ramp), do_normalize=False, return_tensors="pt")
        pixels = shown["pixel_values"][0]
        assert pixels.shape[1:] == (side, side)
        tolerance = 2.5 / min(width, height, side) + 2 / 255
        assert pixels[0, 0, 0] == pytest.approx(left / width, abs=tolerance)
        assert pixels[0, 0, -1] == pytest.approx(right / width, abs=tolerance)
        assert pixels[1, 0, 0] == pytest.approx(top / height, abs=tolerance)
        assert pixels[1, -1, 0] == pytest.approx(bottom / height, abs=tolerance)


def test_embeddings_that_a_client_computed_have_no_choices(llm):
    """But are encoded in the same step as pictures that are to be explained."""
    (model,) = llm.collective_rpc("get_model")
    width = model.config.text_config.hidden_size
    model.patch_choices = []
    try:
        embeddings = model.embed_multimodal(image_embeds=torch.zeros(2, 256, width))
        assert model.patch_choices == [None] * len(embeddings) == [None, None]
    finally:
        model.patch_choices = None
