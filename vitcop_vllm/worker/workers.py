"""vLLM's workers, with model runners that know of stages.

Model runner V2 asks the model for its adapter and is vLLM's own.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from vitcop_vllm.worker.explain import ChoiceRecorder
from vitcop_vllm.worker.v1 import StagedCPUModelRunner, StagedModelRunner


class _ExplainingWorker:
    """What the API server may ask of a worker."""

    model_runner: Any
    use_v2_model_runner: bool

    def take_choices(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See :class:`ChoiceRecorder`; called by name, through vLLM's ``collective_rpc``."""
        runner = self.model_runner
        adapter = runner.model_state if self.use_v2_model_runner else runner
        choices: ChoiceRecorder = adapter.choices
        return choices.take(names)


class StagedGPUWorker(_ExplainingWorker, GPUWorker):
    """vLLM's GPU worker with the staged model runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            return super()._make_model_runner()
        return StagedModelRunner(self.vllm_config, self.device)


class StagedCPUWorker(_ExplainingWorker, CPUWorker):
    """vLLM's CPU worker with the staged model runner."""

    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            # vLLM makes its runner inside init_device, without a seam. Ours adds methods and
            # nothing to construct, so the finished runner may become one.
            self.model_runner.__class__ = StagedCPUModelRunner
