"""Our V1 model runners on a CPU."""

from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vitcop_vllm.worker.encoder_runner import StageOneModelRunner
from vitcop_vllm.worker.v1 import StagedModelRunner


class StageOneCPUModelRunner(StageOneModelRunner, CPUModelRunner):
    """vLLM's CPU model runner, with a fix for chunked prefill of seeded requests.

    vLLM 0.32 discards the sample of an unfinished prefill and moves the generator's offset back.
    CPU generators have no offset, so the engine crashes. Here the generator's whole state is
    restored instead.
    """

    def _discarded_generators(self) -> dict[int, torch.Generator]:
        batch = self.input_batch
        discarded = self.discard_request_mask.np[: batch.num_reqs]
        return {row: g for row, g in batch.generators.items() if discarded[row]}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        before = [(g, g.get_state()) for g in self._discarded_generators().values()]
        sampled = super()._sample(*args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return sampled

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        restored = self._discarded_generators()
        for row in restored:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(restored)


class StagedCPUModelRunner(StagedModelRunner, StageOneCPUModelRunner):
    """vLLM's CPU model runner for pruned steps."""
