"""What is told of an image's patches is what the dense oracle chooses."""

from typing import Any

import pytest

from tests.engine.dense_oracle import DenseModel
from tests.engine.requests import RequestSpec, generate, model_type, sample_image
from tests.worker.test_explain import recorder_of

REQUESTS = [
    RequestSpec("Which?", (3, 101, 4), 8 / 9, max_tokens=2),
    RequestSpec("What is this?", (1,), 2 / 3, max_tokens=2),
    RequestSpec("What is this?", (1,), 0.2, max_tokens=2),
    RequestSpec("What is this?", (1,), 0.0, max_tokens=2),
]


class Witness(DenseModel):
    """Before an oracle's class: writes down what that chooses."""

    def choices(self, family: Any, spec: RequestSpec, prompt: list[int]) -> list[list[list[int]]]:
        """For each image, patches alive in each stage."""
        self.patches: list[list[int]] = []
        self.alive: list[dict[int, list[int]]] = []
        assert spec.ratio is not None
        counts = [family.counts(spec.ratio, seed) for seed in spec.images]
        self.logits(prompt, [sample_image(seed) for seed in spec.images], counts, len(prompt))
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


def explained(llm, spec: RequestSpec, request: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Prompt and recorded selections of an explained request; its answer is that of a plain one."""
    prompt = spec.prompt(model_type(llm))
    prompt["mm_processor_kwargs"]["explain_as"] = request
    (output,) = llm.generate([prompt], [spec.sampling_params()], use_tqdm=False)
    (plain,) = generate(llm, [spec])
    assert list(output.outputs[0].token_ids) == plain.tokens
    assert list(output.prompt_token_ids) == plain.prompt
    kept = recorder_of(llm)._choices
    names = [name for name in kept if name.startswith(f"explain:{request}:")]
    (told,) = llm.collective_rpc("take_choices", args=(names,))
    assert not kept, "what was asked for is forgotten"
    return plain.prompt, [told[name] for name in names]


@pytest.mark.parametrize("spec", REQUESTS, ids=lambda spec: f"{len(spec.images)}@{spec.ratio:.2f}")
def test_choices_are_the_oracle_s(family, llm, witness, spec):
    prompt, told = explained(llm, spec, "one")
    expected = witness.choices(family, spec, prompt)
    if spec.ratio == 0:
        assert told == []
        return
    for mine, seed, stages in zip(told, spec.images, expected, strict=True):
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
    spec = RequestSpec("Which?", (1, 1), 8 / 9, max_tokens=1)
    _, (first, second) = explained(llm, spec, "two")
    assert first["patches"] == second["patches"]


def test_every_token_that_stays_or_is_merged_is_told_once(llm):
    _, (told,) = explained(llm, REQUESTS[1], "three")
    merged = [member for group in told["merged"] for member in group]
    whole = set(told["shallow"]) - {group[0] for group in told["merged"]}
    assert sorted([*merged, *whole]) == list(range(len(told["patches"])))


def test_nothing_is_kept_of_images_that_nobody_asked_about(llm):
    generate(llm, REQUESTS)
    assert not recorder_of(llm)._choices
