"""Recorded selections of an image's patches equal the dense oracle's."""

from typing import Any

import pytest

from tests.engine.dense_oracle import DenseModel
from tests.engine.requests import RequestSpec, generate, model_type, sample_image
from tests.worker.test_explain import sink_of

REQUESTS = [
    RequestSpec("Which?", (3, 101, 4), 8 / 9, max_tokens=2),
    RequestSpec("What is this?", (1,), 2 / 3, max_tokens=2),
    RequestSpec("What is this?", (1,), 0.2, max_tokens=2),
    RequestSpec("What is this?", (1,), 0.0, max_tokens=2),
]


class RecordingOracle(DenseModel):
    """Mix-in for an oracle's class; records the oracle's selections."""

    def choices(self, family: Any, spec: RequestSpec, prompt: list[int]) -> list[list[list[int]]]:
        """For each image and segment, the kept patches."""
        self.patches: list[list[int]] = []
        self.alive: list[dict[int, list[int]]] = []
        assert spec.ratio is not None
        counts = [family.counts(spec.ratio, seed) for seed in spec.images]
        self.logits(prompt, [sample_image(seed) for seed in spec.images], counts, len(prompt))
        placeholders = iter(i for i, token in enumerate(prompt) if token == self.image_token)
        choices = []
        for number, patches in enumerate(self.patches):
            patch_at = {next(placeholders): patch for patch in patches}
            later = [[patch_at[position] for position in alive[number]] for alive in self.alive]
            choices.append([patches, *later])
        return choices

    def choose_patches(self, *args: Any) -> list[int]:
        self.patches.append(super().choose_patches(*args))  # type: ignore[misc]
        return self.patches[-1]

    def merge(self, *args):
        return self._record(super().merge(*args))

    def drop(self, *args):
        return self._record(super().drop(*args))

    def _record(self, outcome):
        alive: dict[int, list[int]] = {}
        for row in outcome[1]:
            if row.image is not None:
                alive.setdefault(row.image, []).append(row.position)
        self.alive.append(alive)
        return outcome


@pytest.fixture(scope="module")
def recording_oracle(family, checkpoint):
    return type("RecordingOracleOf", (RecordingOracle, family.oracle_class()), {})(
        checkpoint, family.boundaries
    )


def explained(llm, spec: RequestSpec, request: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Prompt and records of an explained request.

    Checks that the explanation does not change the answer.
    """
    prompt = spec.prompt(model_type(llm))
    prompt["mm_processor_kwargs"]["explain_as"] = request
    (output,) = llm.generate([prompt], [spec.sampling_params()], use_tqdm=False)
    (plain,) = generate(llm, [spec])
    assert list(output.outputs[0].token_ids) == plain.tokens
    assert list(output.prompt_token_ids) == plain.prompt
    kept = sink_of(llm)._records
    names = [name for name in kept if name.startswith(f"explain:{request}:")]
    (taken,) = llm.collective_rpc("take_selections", args=(names,))
    assert not kept, "the sink forgets records that were taken"
    return plain.prompt, [taken[name] for name in names]


@pytest.mark.parametrize("spec", REQUESTS, ids=lambda spec: f"{len(spec.images)}@{spec.ratio:.2f}")
def test_recorded_choices_equal_the_oracle_s(family, llm, recording_oracle, spec):
    prompt, recorded = explained(llm, spec, "one")
    expected = recording_oracle.choices(family, spec, prompt)
    if spec.ratio == 0:
        assert recorded == []
        return
    for choice, seed, stages in zip(recorded, spec.images, expected, strict=True):
        patches = choice["patches"]
        shallow = [patches[i] for i in choice.get("shallow", range(len(patches)))]
        deep = [shallow[i] for i in choice["deep"]]
        assert [patches, shallow, deep] == stages
        saliency = choice["saliency"]
        assert len(saliency) == family.kept(0.0, seed)
        ranking = sorted(range(len(saliency)), key=lambda p: -saliency[p])
        assert set(patches) == set(ranking[: len(patches)])


def test_an_image_sent_twice_is_recorded_twice(llm):
    spec = RequestSpec("Which?", (1, 1), 8 / 9, max_tokens=1)
    _, (first, second) = explained(llm, spec, "two")
    assert first["patches"] == second["patches"]


def test_every_kept_or_merged_token_is_recorded_once(llm):
    _, (choice,) = explained(llm, REQUESTS[1], "three")
    merged = [member for group in choice["merged"] for member in group]
    whole = set(choice["shallow"]) - {group[0] for group in choice["merged"]}
    assert sorted([*merged, *whole]) == list(range(len(choice["patches"])))


def test_requests_without_an_explanation_record_nothing(llm):
    generate(llm, REQUESTS)
    assert not sink_of(llm)._records
