"""What is told of an image's patches is what the dense oracle chooses."""

from typing import Any

import pytest

from tests.engine.dense_oracle import DenseModel
from tests.engine.requests import Ask, generate, model_type, sample_image
from tests.worker.test_explain import sink_of

ASKS = [
    Ask("Which?", (3, 101, 4), 8 / 9, max_tokens=2),
    Ask("What is this?", (1,), 2 / 3, max_tokens=2),
    Ask("What is this?", (1,), 0.2, max_tokens=2),
    Ask("What is this?", (1,), 0.0, max_tokens=2),
]


class Witness(DenseModel):
    """Before an oracle's class: writes down what that chooses."""

    def choices(self, family: Any, ask: Ask, prompt: list[int]) -> list[list[list[int]]]:
        """For each image, patches alive in each stage."""
        self.patches: list[list[int]] = []
        self.alive: list[dict[int, list[int]]] = []
        assert ask.ratio is not None
        counts = [family.counts(ask.ratio, seed) for seed in ask.images]
        self.logits(prompt, [sample_image(seed) for seed in ask.images], counts, len(prompt))
        placeholders = iter(i for i, token in enumerate(prompt) if token == self.image_token)
        told = []
        for number, patches in enumerate(self.patches):
            patch_at = {next(placeholders): patch for patch in patches}
            later = [[patch_at[position] for position in alive[number]] for alive in self.alive]
            told.append([patches, *later])
        return told

    def choose_patches(self, *args: Any) -> list[int]:
        self.patches.append(super().choose_patches(*args))  # type: ignore[misc]
        return self.patches[-1]

    def merge(self, *args):
        return self._written_down(super().merge(*args))

    def drop(self, *args):
        return self._written_down(super().drop(*args))

    def _written_down(self, outcome):
        alive: dict[int, list[int]] = {}
        for row in outcome[1]:
            if row.image is not None:
                alive.setdefault(row.image, []).append(row.position)
        self.alive.append(alive)
        return outcome


@pytest.fixture(scope="module")
def witness(family, checkpoint):
    return type("WitnessOf", (Witness, family.oracle_class()), {})(checkpoint, family.boundaries)


def explained(llm, ask: Ask, request: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Prompt and records of a request that asks to be explained, at the same answer."""
    prompt = ask.prompt(model_type(llm))
    prompt["mm_processor_kwargs"]["explain_as"] = request
    (output,) = llm.generate([prompt], [ask.params()], use_tqdm=False)
    (plain,) = generate(llm, [ask])
    assert list(output.outputs[0].token_ids) == plain.tokens
    assert list(output.prompt_token_ids) == plain.prompt
    kept = sink_of(llm)._records
    names = [name for name in kept if name.startswith(f"explain:{request}:")]
    (told,) = llm.collective_rpc("take_selections", args=(names,))
    assert not kept, "what was asked for is forgotten"
    return plain.prompt, [told[name] for name in names]


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: f"{len(ask.images)}@{ask.ratio:.2f}")
def test_choices_are_the_oracle_s(family, llm, witness, ask):
    prompt, told = explained(llm, ask, "one")
    expected = witness.choices(family, ask, prompt)
    if ask.ratio == 0:
        assert told == []
        return
    for mine, seed, stages in zip(told, ask.images, expected, strict=True):
        patches = mine["patches"]
        shallow = [patches[i] for i in mine.get("shallow", range(len(patches)))]
        deep = [shallow[i] for i in mine["deep"]]
        assert [patches, shallow, deep] == stages
        whole = range(family.kept(0.0, seed))
        assert len(mine["saliency"]) == len(whole)
        assert set(patches) == set(
            sorted(whole, key=lambda p: -mine["saliency"][p])[: len(patches)]
        )


def test_the_same_image_twice_is_told_twice(llm):
    ask = Ask("Which?", (1, 1), 8 / 9, max_tokens=1)
    _, (first, second) = explained(llm, ask, "two")
    assert first["patches"] == second["patches"]


def test_every_token_that_stays_or_is_merged_is_told_once(llm):
    _, (told,) = explained(llm, ASKS[1], "three")
    merged = [member for group in told["merged"] for member in group]
    whole = set(told["shallow"]) - {group[0] for group in told["merged"]}
    assert sorted([*merged, *whole]) == list(range(len(told["patches"])))


def test_nothing_is_kept_of_images_that_nobody_asked_about(llm):
    generate(llm, ASKS)
    assert not sink_of(llm)._records
