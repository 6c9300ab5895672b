"""vLLM's V1 model runner, which records what Stage I selects."""

from functools import cached_property
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vitcop_vllm.worker.explain import SelectionSink


class StageOneModelRunner(GPUModelRunner):
    """The runner of models that Stage I alone prunes: their decoder runs as in vLLM."""

    @cached_property  # not in a constructor: the runner may be adopted
    def sink(self) -> SelectionSink:
        """Records selections for images that are to be explained."""
        return SelectionSink()

    def _execute_mm_encoder(self, scheduler_output: SchedulerOutput) -> list[torch.Tensor]:
        names, _, _ = self._batch_mm_inputs_from_scheduler(scheduler_output)
        with self.sink.attached_to(self.get_model(), names):
            return super()._execute_mm_encoder(scheduler_output)

    def _model_forward(self, *args: Any, positions: torch.Tensor, **kwargs: Any) -> Any:
        # Here and not only in the model's forward, which does not run where vLLM replays a graph.
        self.get_model().add_places(positions)
        return super()._model_forward(*args, positions=positions, **kwargs)
