"""vLLM's CPU worker with the staged V1 model runner. For CPUs only: see ``gpu_worker``."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vitcop_vllm.adoption import adopt
from vitcop_vllm.worker.cpu_runner import StagedCPUModelRunner
from vitcop_vllm.worker.staged_worker import StagedWorker


class StagedCPUWorker(StagedWorker, CPUWorker):
    """vLLM's CPU worker with the staged model runner."""

    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            # vLLM makes its runner inside init_device and offers no method to override. Our
            # runner adds methods and nothing to construct, so the finished one may become ours.
            adopt(self.model_runner, StagedCPUModelRunner)
