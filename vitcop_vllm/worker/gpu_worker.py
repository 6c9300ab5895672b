"""vLLM's GPU worker with our V1 model runners. Model runner V2 is vLLM's own class.

This module must not import vLLM's CPU worker or runner: their import replaces torch's CUDA streams,
events and memory queries in the whole process.
"""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vitcop_vllm.worker.encoder_runner import StageOneModelRunner
from vitcop_vllm.worker.staged_worker import ExplainingWorker, StagedWorker
from vitcop_vllm.worker.v1 import StagedModelRunner


class StageOneGPUWorker(ExplainingWorker, Worker):
    """vLLM's GPU worker for models that Stage I alone prunes."""

    runner_class: type[GPUModelRunner] = StageOneModelRunner

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            return super()._make_model_runner()
        return self.runner_class(self.vllm_config, self.device)


class StagedGPUWorker(StagedWorker, StageOneGPUWorker):
    """vLLM's GPU worker with the staged model runner V1."""

    runner_class = StagedModelRunner
