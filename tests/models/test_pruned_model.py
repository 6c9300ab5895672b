"""From a step's embeddings to the staged decoder, without an engine."""

from contextlib import nullcontext
from itertools import accumulate, chain
from typing import Any

import pytest
import torch

from tests.worker.steps import ScheduledRequest, build_step
from vitcop_vllm.models import pruned_model
from vitcop_vllm.models.columns import Columns
from vitcop_vllm.models.pruned_model import PrunedModel
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.worker.step import StagedForward

HIDDEN = 8

WHOLE = VisualTokenCounts.unpruned(4)
ENCODER_ONLY = VisualTokenCounts(6, 2, (3, 3, 3))
"""Pruned, but it loses nothing after Stage I."""
ALL_SEGMENTS = VisualTokenCounts(9, 2, (5, 3, 1))


class Stock:
    """What is left of vLLM's model."""

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        return torch.zeros(len(input_ids), HIDDEN)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return "stock"


def labels_alone(step, positions, embeds, labels, sink, deepstack):
    return labels


class Model(PrunedModel, Stock):
    """The parts that run a step; the decoder returns the labels that it gets."""

    def __init__(self, *, clusters: bool) -> None:
        self.columns = Columns(HIDDEN, labels=clusters, places=False)
        self._places = None
        self._segments_ran = True
        self.staged_decoder: Any = labels_alone


@pytest.fixture(autouse=True)
def _no_forward_context(monkeypatch):
    monkeypatch.setattr(pruned_model, "_without_graphs", nullcontext)


def embedding_of(counts: VisualTokenCounts, model: Model) -> torch.Tensor:
    n1 = counts.stages[0]
    embedding = torch.zeros(n1, HIDDEN)
    if not counts.is_pruned:
        return embedding
    return model.columns.append(embedding, torch.full((n1,), n1), torch.arange(n1), (Grid(1, 3),))


def forward_of(*requests: list[VisualTokenCounts]) -> tuple[torch.Tensor, StagedForward | None]:
    """Step of prompts of these images, a text token before each: (T,) whether each row is an
    image's, and the staged forward."""
    scheduled = []
    is_multimodal: list[bool] = []
    for images in requests:
        spans, length = [], 0
        for counts in images:
            spans.append(VisualSpan(length + 1, counts))
            length = spans[-1].end
            is_multimodal += [False] + [True] * counts.stages[0]
        is_multimodal.append(False)
        plan = RequestPlan(tuple(spans))
        scheduled.append(
            ScheduledRequest(plan if plan.is_pruned else None, 0, length + 1, length + 1)
        )
    step = build_step(scheduled)
    return torch.tensor(is_multimodal), step.forward if step else None


def run(
    model: Model,
    is_multimodal: torch.Tensor,
    step: StagedForward | None,
    images: list[torch.Tensor],
) -> Any:
    rows = torch.arange(len(is_multimodal))
    embeds = model.embed_input_ids(rows, images, is_multimodal=is_multimodal)
    return model.forward(None, rows, inputs_embeds=embeds, step=step)


MIXED = [WHOLE, ENCODER_ONLY], [ALL_SEGMENTS, WHOLE], [WHOLE], [ALL_SEGMENTS]


def test_every_pruned_image_of_a_step_has_its_labels_in_its_rows():
    model = Model(clusters=True)
    rows, step = forward_of(*MIXED)
    assert step is not None
    labels = run(model, rows, step, [embedding_of(c, model) for one in MIXED for c in one])
    # Each pruned image's labels are its number of kept tokens.
    expected = [
        [0, *[counts.stages[0] if counts.is_pruned else 0] * counts.stages[0]]
        for counts in chain(*MIXED)
    ]
    ends = [len(images) for images in MIXED]
    for after in reversed([*accumulate(ends)]):
        expected.insert(after, [0])
    assert labels.tolist() == [*chain(*expected)]
    (group,) = step.groups
    assert group.images == (1, 2)
    assert labels[group.rows(0)].tolist() == [[5] * 5] * 2


def test_a_token_of_a_video_that_is_in_no_frame_has_a_label_that_nobody_reads():
    model = Model(clusters=True)
    rows, step = forward_of([ALL_SEGMENTS])
    assert step is not None
    frame = embedding_of(ALL_SEGMENTS, model)
    rows[-1] = True
    labels = run(model, rows, step, [torch.cat((frame, frame[:1]))])
    (group,) = step.groups
    assert labels[group.rows(0)].tolist() == [[5] * 5]


@pytest.mark.parametrize("missing", [1, 2, 5])
def test_an_image_without_its_labels_is_an_error(missing):
    model = Model(clusters=True)
    rows, step = forward_of(*MIXED)
    images = [embedding_of(counts, model) for one in MIXED for counts in one]
    images[missing] = images[missing][:, :HIDDEN]
    with pytest.raises(AssertionError, match=r"3 pruned images of 13 tokens, .* labels of (8|10)"):
        run(model, rows, step, images)


def test_labels_are_not_counted_where_no_stage_drops_rows():
    """Then no step of ours comes with the images, and nobody reads their labels."""
    model = Model(clusters=True)
    rows, step = forward_of([ENCODER_ONLY])
    assert step is None
    assert run(model, rows, step, [embedding_of(ENCODER_ONLY, model)]) == "stock"


def test_a_selector_without_clusters_needs_no_labels():
    model = Model(clusters=False)
    rows, step = forward_of([ALL_SEGMENTS])
    assert step is not None
    assert run(model, rows, step, [embedding_of(ALL_SEGMENTS, model)]) is None
