"""What our workers add to vLLM's, on every device."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.worker.worker_base import CompilationTimes

from vitcop_vllm.worker.adapter import StepAdapter
from vitcop_vllm.worker.warm_up import run_staged_step


class StagedWorker:
    """Stands before a worker class of vLLM's."""

    model_runner: Any
    use_v2_model_runner: bool

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # Before vLLM's own: that ends by resetting seeds and watching for late compilations.
        run_staged_step(self)
        times: CompilationTimes = super().compile_or_warm_up_model()  # type: ignore[misc]
        return times

    def take_selections(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See :meth:`.SelectionSink.take`; called by name, through vLLM's ``collective_rpc``."""
        runner = self.model_runner
        adapter: StepAdapter = (
            runner.model_state if self.use_v2_model_runner else runner
        ).step_adapter
        return adapter.sink.take(names)
