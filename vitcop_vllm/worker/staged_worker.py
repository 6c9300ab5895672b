"""What our workers add to vLLM's, on every device. The classes stand before a worker of vLLM's."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.worker.worker_base import CompilationTimes

from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.warm_up import run_staged_step


class ExplainingWorker:
    """Gives out what the Stages selected."""

    model_runner: Any

    @property
    def sink(self) -> SelectionSink:
        """Records selections for images that are to be explained."""
        sink: SelectionSink = self.model_runner.sink
        return sink

    def take_selections(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See :meth:`.SelectionSink.take`; called by name, through vLLM's ``collective_rpc``."""
        return self.sink.take(names)


class StagedWorker(ExplainingWorker):
    """Runs a decoder in segments."""

    use_v2_model_runner: bool

    @property
    def sink(self) -> SelectionSink:
        if not self.use_v2_model_runner:
            return super().sink
        sink: SelectionSink = self.model_runner.model_state.step_adapter.sink
        return sink

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # Before vLLM's own: that ends by resetting seeds and watching for late compilations.
        run_staged_step(self)
        times: CompilationTimes = super().compile_or_warm_up_model()  # type: ignore[misc]
        return times
