"""The soak: short, whole, and able to fail."""

import json
import subprocess
import sys

import pytest

from benchmarks.qwen_checkpoint import TINY
from benchmarks.soak import MODELS, Answer, Traffic, _difference


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
def test_a_short_soak_finds_nothing_wrong(model):
    argv = ["--model", model, "--requests", "150", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *argv],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["model"] == model
    assert document["completed"] + document["aborted"] == 150
    assert document["different"]["wrong"] == []
    assert len(document["different"]["tie"]) <= 1
    assert document["leaks"] == {}
    # Else it was no soak.
    assert document["aborted"] > 0
    assert document["preemptions"] > 5
    assert document["hit_rate"] > 0.02


def test_a_seed_can_be_had_again():
    one, again, other = (Traffic(seed) for seed in (3, 3, 4))
    asks = [one.next() for _ in range(50)]
    assert [again.next() for _ in range(50)] == asks
    assert [other.next() for _ in range(50)] != asks


def test_images_of_many_sizes_come_in_a_model_that_takes_them():
    model = MODELS["qwen2.5-vl"]
    traffic = Traffic(0, model.marker)
    asks = [traffic.next() for _ in range(200)]
    assert all(ask.prompt.count(model.marker) == len(ask.images) for ask in asks)
    images = [model.image(seed) for ask in asks for seed in ask.images]
    grids = {TINY.grid(*image.size) for image in images}
    assert len(grids) == len(model.sizes) - 1, "the two smallest are scaled up to the same"
    tokens = {rows * columns for rows, columns in grids}
    assert min(tokens) == TINY.min_visual_tokens
    assert TINY.max_visual_tokens - 40 < max(tokens) <= model.most_visual_tokens
    assert min(rows for rows, _ in grids) == min(columns for _, columns in grids) == 1


def test_conversations_go_on():
    traffic = Traffic(0)
    first = traffic.next()
    traffic.finished(first, " it is a cat")
    later = [traffic.next() for _ in range(30)]
    follow_ups = [ask for ask in later if ask.prompt.startswith(first.prompt + " it is a cat")]
    assert follow_ups
    for ask in follow_ups:
        assert (ask.images, ask.ratio) == (first.images, first.ratio)


@pytest.mark.parametrize(
    ("tokens", "difference"), [([1, 2, 3], None), ([1, 9, 9], "tie"), ([1, 2, 9], "wrong")]
)
def test_answers_that_part_where_tokens_are_equally_likely_are_told_apart(tokens, difference):
    alone = Answer([1, 2, 3], [0.5, 1e-6, 0.5])
    assert _difference(Answer(tokens, [0.0] * 3), alone) == difference
