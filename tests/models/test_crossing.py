"""Selection at a boundary between segments. No engine runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.device_guard import CUDA, no_host_sync
from tests.pruning import oracle
from tests.pruning.every_selector import SELECTORS
from tests.worker.steps import ScheduledRequest, build_step
from vitcop_vllm.models import crossing
from vitcop_vllm.models.crossing import Crossing, LayerBefore
from vitcop_vllm.pruning.identity import explained_identifier
from vitcop_vllm.pruning.kernel_set import TORCH
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.pruning.settings import SignalName
from vitcop_vllm.pruning.signals import SIGNALS
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.step import PrunedSpan, StagedForward

V, KEPT, DEEP = 20, 13, 5
CENTRES = 6
HIDDEN = 20
CPU = torch.device("cpu")
IMAGES = (2, 3 + V)  # first positions in the prompt
PROMPT = 2 * V + 6  # tokens
FIRST_ROW = 7  # first row of the prompt in the step
ROWS = FIRST_ROW + PROMPT + 3 + 4


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.setattr(crossing, "get_tensor_model_parallel_world_size", lambda: 1)


def step_of(counts: VisualTokenCounts, device: torch.device = CPU, **options: Any) -> StagedForward:
    """A text request, a prompt with two images and three answer tokens, and a text request."""
    plan = RequestPlan(tuple(VisualSpan(offset, counts) for offset in IMAGES))
    requests = [
        ScheduledRequest(None, 0, FIRST_ROW, FIRST_ROW),
        ScheduledRequest(plan, 0, PROMPT + 3, PROMPT),
        ScheduledRequest(None, 0, 4, 4),
    ]
    step = build_step(requests, device, find_prompts=True, **options)
    assert step is not None
    assert step.forward is not None
    return step.forward


def layer_before(rows: int = ROWS, device: torch.device = CPU) -> LayerBefore:
    torch.manual_seed(0)
    return LayerBefore(
        0.5,
        torch.randn(rows, 4, 8, device=device),
        torch.randn(rows, 2, 8, device=device),
        torch.randn(rows, 2, 8, device=device),
        lambda spans: torch.arange(rows, device=device)[spans, None, None].float(),
        torch.randn(rows, HIDDEN, device=device),
        torch.randn(rows, HIDDEN, device=device),
    )


def crossing_of(selector: str, device: torch.device = CPU, signal: SignalName = "keys") -> Crossing:
    """A crossing whose norm has random weights."""
    norm = nn.Module()
    norm.weight = torch.rand(HIDDEN, device=device)
    return Crossing(SELECTORS[selector], TORCH, SIGNALS[signal], norm)


def labels_of(device: torch.device = CPU) -> torch.Tensor:
    """Of all rows. Those of text have no cluster."""
    labels = torch.full((ROWS,), CENTRES, device=device)
    for offset in IMAGES:
        begin = FIRST_ROW + offset
        labels[begin : begin + V] = torch.arange(V, device=device) % CENTRES
    return labels


DROPPED_AT_ONCE = VisualTokenCounts(V, 0, (V, KEPT, KEPT))


def test_fastv_keeps_the_oracle_s_rows():
    (group,), layer = step_of(DROPPED_AT_ONCE).groups, layer_before()
    rows, _, stream = crossing_of("fastv").select_rows(group, 1, layer, None)
    assert stream is None
    prompt = slice(FIRST_ROW, FIRST_ROW + PROMPT)
    keys = layer.key[prompt].numpy()
    query = layer.query[prompt][-1].numpy()
    for member, offset in enumerate(IMAGES):
        visual = list(range(offset, offset + V))
        kept = oracle.last_token_attention(query, keys, 0.5, visual, KEPT)
        assert rows[member].tolist() == [FIRST_ROW + offset + i for i in kept]


def test_dart_keeps_the_oracle_s_rows():
    (group,), layer, dart = step_of(DROPPED_AT_ONCE).groups, layer_before(), crossing_of("dart")
    rows, _, stream = dart.select_rows(group, 1, layer, None)
    assert stream is None
    for member, offset in enumerate(IMAGES):
        visual = slice(FIRST_ROW + offset, FIRST_ROW + offset + V)
        # A cosine ignores length, so this test leaves out the norm's division.
        states = ((layer.hidden + layer.residual)[visual] * dart.norm.weight).numpy()
        kept = oracle.least_duplicated(layer.key[visual].numpy(), states, KEPT)
        assert rows[member].tolist() == [FIRST_ROW + offset + i for i in kept]


@pytest.mark.parametrize("selector", ["fastv", "dart"])
def test_a_boundary_that_drops_nothing_selects_nothing(selector):
    (group,) = step_of(DROPPED_AT_ONCE).groups
    rows, chosen, stream = crossing_of(selector).select_rows(group, 2, layer_before(), None)
    assert chosen is None
    assert stream is None
    assert torch.equal(rows, group.rows(1))


def test_dropping_without_a_selector_function_is_an_error():
    (group,) = step_of(VisualTokenCounts(V, 0, (V, 5, 3))).groups
    with pytest.raises(AssertionError, match="drops no token at boundary 2"):
        crossing_of("fastv").select_rows(group, 2, layer_before(), None)


def test_a_merged_row_adds_its_group_s_mean_and_other_rows_do_not_change():
    step, layer = step_of(VisualTokenCounts(V, CENTRES, (V, KEPT, DEEP))), layer_before()
    positions = torch.arange(ROWS)
    after, hidden, residual = crossing_of("vitcop")(1, step, positions, layer, labels_of())
    norms = layer.key.mean(dim=1).norm(dim=-1)
    stream = layer.hidden + layer.residual
    expected = list(range(FIRST_ROW + IMAGES[0]))
    merged = {}
    for offset, end in zip(IMAGES, (IMAGES[1], PROMPT), strict=True):
        begin = FIRST_ROW + offset
        output = oracle.stage_two(
            norms[begin : begin + V].numpy(), [i % CENTRES for i in range(V)], CENTRES, KEPT
        )
        for source, members in output:
            if members is not None:
                tokens = stream[[begin + i for i in members]]
                merged[len(expected)] = stream[begin + source] + tokens.mean(dim=0)
            expected.append(begin + source)
        expected += range(begin + V, FIRST_ROW + end)
    expected += range(FIRST_ROW + PROMPT, ROWS)
    assert after.tolist() == expected
    wanted = stream[expected]
    for row, token in merged.items():
        wanted[row] = token
    torch.testing.assert_close(hidden + residual, wanted)


def test_raw_keys_are_those_of_the_group_s_rows():
    (group,) = step_of(VisualTokenCounts(V, 0, (V, KEPT, DEEP))).groups
    cross = crossing_of("key_norm", signal="raw_keys")
    rows, *_ = cross.select_rows(group, 1, layer_before(), None)
    # Here a row's raw key is the row's number, so the first rows have the smallest.
    assert torch.equal(rows, group.rows(0)[:, :KEPT])


@no_host_sync()
@pytest.mark.parametrize("renumber_deep", [False, True])
@pytest.mark.parametrize(
    ("selector", "counts"),
    [
        ("vitcop", VisualTokenCounts(V, CENTRES, (V, KEPT, DEEP))),
        ("vitcop", VisualTokenCounts(V, CENTRES, (V, CENTRES - 1, 1))),
        ("key_norm", VisualTokenCounts(V, 0, (V, KEPT, DEEP))),
        ("fastv", DROPPED_AT_ONCE),
        ("dart", DROPPED_AT_ONCE),
    ],
)
def test_no_selector_makes_the_host_wait_for_the_gpu(selector, counts, renumber_deep):
    step = step_of(counts, CUDA, renumber_deep=renumber_deep)
    cross = crossing_of(selector, CUDA)
    rows = torch.arange(ROWS, device=CUDA)
    for segment in (1, 2):
        layer = layer_before(rows.shape[0], CUDA)
        rows, hidden, residual = cross(segment, step, rows, layer, labels_of(CUDA))
        left = ROWS - len(IMAGES) * (V - counts.stages[segment])
        assert rows.shape == (left,)
        assert hidden.shape == residual.shape == (left, HIDDEN)
    assert hidden[step.outputs].shape == (ROWS, HIDDEN)
    assert (step.renumbered is not None) is renumber_deep


def test_a_sink_gets_what_is_selected_and_of_which_image():
    name = explained_identifier("request", 1, (64, 48), "abc")
    step = replace(step_of(DROPPED_AT_ONCE), images=(PrunedSpan("other", V), PrunedSpan(name, V)))
    (group,), layer, cross = step.groups, layer_before(), crossing_of("dart")
    sink = SelectionSink()
    rows = cross(1, step, torch.arange(ROWS), layer, None, sink)
    cross(2, step, rows[0], layer_before(rows[0].shape[0]), None, sink)
    _, chosen, _ = cross.select_rows(group, 1, layer, None)
    assert isinstance(chosen, torch.Tensor)
    assert sink.take(["other", name]) == {name: {"shallow": chosen[1].tolist()}}
