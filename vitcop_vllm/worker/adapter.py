"""What the adapters to vLLM's model runners V1 and V2 have in common."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import ModelConfig
from vllm.v1.worker.utils import AttentionGroup

from vitcop_vllm.engine.attention import DecodeView, PrefillView, begin_builds
from vitcop_vllm.engine.config import pruning_settings_of
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.planner import StepPlanner
from vitcop_vllm.worker.step import StagedStep


class StepAdapter:
    """Plans each step of a runner, and gives the plan to the segments and to the model.

    Attributes:
        planner: Plans of the requests that are alive.
        sink: Records selections for images that are to be explained.

    Args:
        model_config: Of the served model.
        device: Where a step's tensors are needed.
        sink: The attribute.
    """

    def __init__(
        self, model_config: ModelConfig, device: torch.device, sink: SelectionSink
    ) -> None:
        settings = pruning_settings_of(model_config.hf_config)
        self.planner = StepPlanner(
            device,
            renumber_deep=settings.positions == "reference",
            find_prompts=selector_of(settings.selector).reads_question,
        )
        self.sink = sink
        self._step: StagedStep | None = None

    def plan(
        self,
        names: Iterable[str],
        starts: npt.NDArray[np.integer],
        ends: npt.NDArray[np.integer],
    ) -> StagedStep | None:
        """Begin a step; see :meth:`.StepPlanner.plan_step`."""
        self._step = self.planner.plan_step(names, starts, ends)
        return self._step

    @property
    def segments(self) -> Mapping[int, PrefillView | DecodeView]:
        """What each segment sees of the step; absent segments see what vLLM planned."""
        return self._step.segments if self._step else {}

    def begin_builds(self, groups: Iterable[AttentionGroup]) -> None:
        """See :func:`~vitcop_vllm.engine.attention.begin_builds`."""
        begin_builds(groups, self.segments)

    def take_forward_arguments(self) -> dict[str, Any]:
        """Arguments that make the model's forward a staged one; ends the step.

        Empty where vLLM's own forward is right. So it is in a run on dummy rows, which vLLM may
        begin without a plan.
        """
        step, self._step = self._step, None
        if step is None or step.forward is None:
            return {}
        return {"step": step.forward, "sink": self.sink}
