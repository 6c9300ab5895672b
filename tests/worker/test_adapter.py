"""What both model runners get from the adapter that they share."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.worker.steps import CPU
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings
from vitcop_vllm.worker import adapter
from vitcop_vllm.worker.adapter import StepAdapter
from vitcop_vllm.worker.explain import SelectionSink

COUNTS = VisualTokenCounts(16, 0, (8, 4, 2))
PROMPT = 12


@pytest.fixture
def step_adapter(monkeypatch) -> StepAdapter:
    monkeypatch.setattr(adapter, "pruning_settings_of", lambda config: PruningSettings())
    model_config: Any = SimpleNamespace(hf_config=None)
    made = StepAdapter(model_config, CPU, SelectionSink())
    made.planner.track("pruned", RequestPlan((VisualSpan(2, COUNTS),)), PROMPT, ["abc"])
    return made


def plan(step_adapter: StepAdapter, start: int, end: int) -> None:
    step_adapter.plan(["text", "pruned"], np.array([0, start]), np.array([3, end]))


def test_a_prefill_is_a_staged_forward_once(step_adapter):
    plan(step_adapter, 0, PROMPT)
    assert [step_adapter.segments[segment].num_rows for segment in (1, 2)] == [3 + 8, 3 + 6]
    arguments = step_adapter.take_forward_arguments()
    assert arguments["step"].images == (("abc", COUNTS.stages[0]),)
    assert arguments["sink"] is step_adapter.sink
    # A run on dummy rows, which vLLM may begin without a plan.
    assert not step_adapter.segments
    assert step_adapter.take_forward_arguments() == {}


def test_a_decode_step_has_stages_and_vllm_s_own_forward(step_adapter):
    plan(step_adapter, PROMPT, PROMPT + 1)
    assert sorted(step_adapter.segments) == [1, 2]
    assert step_adapter.take_forward_arguments() == {}


def test_a_step_of_unpruned_requests_has_neither(step_adapter):
    step_adapter.plan(["text"], np.array([0]), np.array([3]))
    assert not step_adapter.segments
    assert step_adapter.take_forward_arguments() == {}
