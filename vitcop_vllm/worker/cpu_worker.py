"""vLLM's CPU worker with our V1 model runners. For CPUs only: see ``gpu_worker``."""

from vllm.config import CompilationMode
from vllm.v1.worker.cpu_worker import CPUWorker

from vitcop_vllm.adoption import adopt
from vitcop_vllm.engine.compiler import compile_nothing, has_cpp_compiler
from vitcop_vllm.worker.cpu_runner import StagedCPUModelRunner, StageOneCPUModelRunner
from vitcop_vllm.worker.staged_worker import ExplainingWorker, StagedWorker


class StageOneCPUWorker(ExplainingWorker, CPUWorker):
    """vLLM's CPU worker for models that Stage I alone prunes."""

    runner_class: type[StageOneCPUModelRunner] = StageOneCPUModelRunner

    def init_device(self) -> None:
        is_eager = self.vllm_config.compilation_config.mode == CompilationMode.NONE
        if is_eager and not has_cpp_compiler():
            compile_nothing()
        super().init_device()
        if not self.use_v2_model_runner:
            # vLLM makes its runner inside init_device and offers no method to override. Our
            # runners add methods and nothing to construct, so the finished one may become ours.
            adopt(self.model_runner, self.runner_class)


class StagedCPUWorker(StagedWorker, StageOneCPUWorker):
    """vLLM's CPU worker with the staged model runner."""

    runner_class = StagedCPUModelRunner
