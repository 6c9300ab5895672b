"""Two engines side by side: stock vLLM and ours, each in a process of its own.

Only one of them works at a time; the other waits for its next command. What is timed is
the engine: pictures are preprocessed before the clock starts.
"""

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vitcop_vllm.pruning.settings import RATIO_KEY

Result = dict[str, Any]


@dataclass
class Stopwatch:
    """Seconds spent in functions it has been put around."""

    seconds: float = 0.0
    depth: int = field(default=0, repr=False)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            # Nested calls are counted once.
            self.depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - start

        return timed

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def random_picture(seed: int) -> Any:
    """A 336 x 336 picture of noise: fine for cost, meaningless for choice."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (336, 336, 3), dtype=np.uint8))


class _Engine:
    """What a worker process does."""

    def __init__(self, options: dict[str, Any], pruned: bool) -> None:
        from vllm import LLM

        self.pruned = pruned
        llm = LLM(**options)
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        runner = self.core.model_executor.driver_worker.worker.model_runner
        self.encoder = Stopwatch()
        self.stages = Stopwatch()
        model = runner.model
        model.embed_multimodal = self.encoder.around(model.embed_multimodal)
        if pruned:
            self._time_stages()

    def _time_stages(self) -> None:
        from vitcop_vllm.models import llava, staged_decoder

        for module, names in {
            llava: ("select_patches", "patch_positions", "cluster_labels", "_take"),
            staged_decoder: ("_select_rows",),
        }.items():
            for name in names:
                setattr(module, name, self.stages.around(getattr(module, name)))

    def pictures(self, *, seeds: list[int], ratio: float, max_tokens: int, text: str) -> Result:
        """Serve a batch of single-picture requests that all arrive at once."""
        prompts = []
        for seed in seeds:
            prompt: dict[str, Any] = {
                "prompt": f"USER: <image>\n{text} ASSISTANT:",
                "multi_modal_data": {"image": random_picture(seed)},
            }
            if self.pruned:
                prompt["mm_processor_kwargs"] = {RATIO_KEY: ratio}
            prompts.append(prompt)
        return self._serve(prompts, max_tokens)

    def text(self, *, batch: int, tokens: int) -> Result:
        """Prefill a batch of text-only prompts of ``tokens`` tokens each."""
        prompt = {"prompt_token_ids": [1] + [40 + i % 60 for i in range(tokens - 1)]}
        return self._serve([prompt] * batch, 1)

    def _serve(self, prompts: list[dict[str, Any]], max_tokens: int) -> Result:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        inputs = self.engine.renderer.render_cmpl(prompts)
        self.encoder.take()
        self.stages.take()
        start = time.perf_counter()
        for number, one in enumerate(inputs):
            self.engine.add_request(str(number), one, params)
        answers: dict[int, list[int]] = {}
        decode_steps = []
        prompt_tokens = 0
        while self.engine.has_unfinished_requests():
            requests = self.core.scheduler.requests.values()
            decoding = all(r.num_computed_tokens >= r.num_prompt_tokens for r in requests)
            step = time.perf_counter()
            for output in self.engine.step():
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
                if output.finished:
                    prompt_tokens += len(output.prompt_token_ids or ())
            if decoding:
                decode_steps.append(time.perf_counter() - step)
        return {
            "seconds": time.perf_counter() - start,
            "encoder_seconds": self.encoder.take(),
            "stage_seconds": self.stages.take(),
            "decode_step_seconds": decode_steps,
            "prompt_tokens": prompt_tokens,
            "tokens": [answers[number] for number in range(len(prompts))],
        }


def _work(connection: Connection, options: dict[str, Any], pruned: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not pruned:
        os.environ["VLLM_PLUGINS"] = ""
    engine = _Engine(options, pruned)
    connection.send("ready")
    while (command := connection.recv()) is not None:
        connection.send(getattr(engine, command.pop("what"))(**command))


class EngineProcess:
    """Handle to a worker process; calls wait for its answer."""

    def __init__(self, options: dict[str, Any], *, pruned: bool) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, options, pruned))
        self._process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("an engine process died; its last words are above") from None

    def run(self, what: str, **command: Any) -> Result:
        """Have the engine serve ``pictures`` or ``text``; see :class:`_Engine`."""
        self._connection.send({"what": what, **command})
        answer: Result = self._answer()
        return answer

    def stop(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self._process.join(timeout=60)


@contextmanager
def two_engines(
    checkpoint: Path, options: dict[str, Any]
) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """Stock vLLM and ours with the same weights and options."""
    engines: list[EngineProcess] = []
    try:
        for pruned in (False, True):
            # Every picture is new, so a prefix cache could only cost stock vLLM time.
            own = {} if pruned else {"enable_prefix_caching": False}
            engines.append(
                EngineProcess({"model": str(checkpoint), **options, **own}, pruned=pruned)
            )
        stock, ours = engines
        yield stock, ours
    finally:
        for engine in engines:
            engine.stop()
