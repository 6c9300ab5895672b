"""A vLLM engine inside a process of its own, and the clocks around it.

What is timed is the engine: images are preprocessed before the clock starts. Scheduler and
worker live in one process with the clocks, on a CPU and on a GPU, for stock vLLM and for ours.
"""

import random
import string
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from benchmarks.asks import Ask, random_image
from benchmarks.concurrency import kv_memory, observed
from benchmarks.stopwatch import Stopwatch, replaced
from vitcop_vllm.pruning.settings import RATIO_KEY

Result = dict[str, Any]


@dataclass
class _Run:
    """Seconds on one clock, and outputs by number, of requests served."""

    seconds: float = 0.0
    sent: dict[int, float] = field(default_factory=dict)
    first_token: dict[int, float] = field(default_factory=dict)
    finished: dict[int, Any] = field(default_factory=dict)
    decode_steps: list[float] = field(default_factory=list)


def _about_runner(worker: Any) -> Result:
    runner = type(worker.model_runner)
    return {
        "model_runner": f"{runner.__module__}.{runner.__qualname__}",
        "model_runner_version": "V2" if worker.use_v2_model_runner else "V1",
    }


class MeasuredEngine:
    """Serves requests and tells what they took; its public methods are commands by name.

    Args:
        options: Arguments of ``vllm.LLM``.
        pruned: Whether it is ours, which is told ratios.
    """

    def __init__(self, options: dict[str, Any], pruned: bool) -> None:
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        self.pruned = pruned
        self.llm = LLM(**options)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self._rng = random.Random(0)
        self._letters = self.llm.get_tokenizer().encode(
            string.ascii_letters, add_special_tokens=False
        )
        watch = Stopwatch if current_platform.is_cpu() else _DeviceStopwatch
        self.encoder, self.stages = watch(), watch()
        self._threads = torch.get_num_threads()

    def about(self) -> Result:
        """Conditions that only the engine knows."""
        config = self.engine.vllm_config
        (about_runner,) = self.llm.collective_rpc(_about_runner)
        return {
            **about_runner,
            "threads": self._threads,
            "block_size": config.cache_config.block_size,
            "kv_blocks": config.cache_config.num_gpu_blocks,
            "compilation_mode": int(config.compilation_config.mode or 0),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        }

    def images(
        self, *, asks: Sequence[Ask], clients: int | None = None, watched: bool = False
    ) -> Result:
        """Serve requests from their arrivals on; who finds ``clients`` others waits.

        Args:
            watched: Also tell seconds of the encoder and of Stages I to III, for which the
                host waits on the device.

        Raises:
            RuntimeError: If the encoder ran unseen, or stages of pruned requests did.
        """
        with self._watched() if watched else nullcontext():
            result = self._serve(
                [self._prompt(ask) for ask in asks],
                [self._params(ask.max_tokens, ask.letters) for ask in asks],
                [ask.arrival for ask in asks],
                clients or len(asks),
            )
        if watched:
            if not self.encoder.uses:
                raise RuntimeError("no encoder was timed: it no longer runs in embed_multimodal")
            if self.pruned and any(ask.ratio for ask in asks) and not self.stages.uses:
                raise RuntimeError("no stage was timed: they no longer use SELECTION_SECONDS")
            result["encoder_seconds"] = self.encoder.seconds
            result["stage_seconds"] = self.stages.seconds
        return result

    def text(self, *, batch: int, tokens: int, max_tokens: int) -> Result:
        """Serve a batch of new text-only prompts of ``tokens`` tokens each."""
        prompts: list[dict[str, Any]] = [
            {"prompt_token_ids": [1, *self._rng.choices(range(40, 100), k=tokens - 1)]}
            for _ in range(batch)
        ]
        return self._serve(prompts, [self._params(max_tokens)] * batch, [0.0] * batch, batch)

    def capacity(self, *, asks: Sequence[Ask], budget: int) -> Result:
        """Serve requests with free KV memory for ``budget`` slots times layers.

        Raises:
            ValueError: If the engine has less memory, or takes fewer requests at a time.
        """
        scheduler = self.core.scheduler
        if len(asks) > scheduler.max_num_running_reqs:
            raise ValueError(f"max_num_seqs must be {len(asks)} or more not to be the limit")
        with kv_memory(scheduler, budget), observed(scheduler) as concurrency:
            result = self.images(asks=asks)
        return result | {"most": concurrency.most, "preemptions": concurrency.preemptions}

    @contextmanager
    def _watched(self) -> Iterator[None]:
        # The model is asked for through vLLM's own method, which each of its runners has, and
        # which takes it out of what CUDA graphs are wrapped around it.
        (model,) = self.llm.collective_rpc("get_model")
        embed = model.embed_multimodal

        def timed_embed(*args: Any, **kwargs: Any) -> Any:
            with self.encoder:
                return embed(*args, **kwargs)

        self.encoder.reset()
        self.stages.reset()
        with ExitStack() as stack:
            stack.enter_context(replaced(model, "embed_multimodal", timed_embed))
            if self.pruned:
                from vitcop_vllm.engine.metrics import SELECTION_SECONDS

                # What the server's metric times, but with the device's work in it.
                watch = lambda *labels: self.stages  # noqa: E731
                stack.enter_context(replaced(SELECTION_SECONDS, "labels", watch))
            yield

    def _prompt(self, ask: Ask) -> dict[str, Any]:
        size = ask.image_size
        images = [random_image(seed, size, size) for seed in ask.images]
        prompt: dict[str, Any] = {
            "prompt": ask.prompt,
            "multi_modal_data": {"image": images},
        }
        processor_kwargs: dict[str, float] = {}
        if self.pruned:
            processor_kwargs[RATIO_KEY] = ask.ratio
        if ask.max_pixels is not None:
            processor_kwargs["max_pixels"] = ask.max_pixels
        if processor_kwargs:
            prompt["mm_processor_kwargs"] = processor_kwargs
        return prompt

    def _params(self, max_tokens: int, letters: bool = False) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            allowed_token_ids=self._letters if letters else None,
        )

    def _serve(
        self,
        prompts: Sequence[dict[str, Any]],
        params: Sequence[Any],
        arrivals: Sequence[float],
        clients: int,
    ) -> Result:
        inputs = self.engine.renderer.render_cmpl(prompts)
        run = self._run(inputs, params, arrivals, clients)
        numbers = range(len(inputs))
        outputs = [run.finished[number] for number in numbers]
        first = [run.first_token[number] for number in numbers]
        return {
            "seconds": run.seconds,
            "decode_step_seconds": run.decode_steps,
            "first_token_seconds": [first[n] - arrivals[n] for n in numbers],
            "first_token_seconds_once_sent": [first[n] - run.sent[n] for n in numbers],
            "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
            "reused_tokens": [output.num_cached_tokens or 0 for output in outputs],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "answers": [output.outputs[0].text for output in outputs],
        }

    def _run(
        self,
        inputs: Sequence[Any],
        params: Sequence[Any],
        arrivals: Sequence[float],
        clients: int,
    ) -> _Run:
        run = _Run()
        waiting = deque(sorted(range(len(inputs)), key=lambda number: arrivals[number]))
        start = now = told = time.perf_counter()
        while len(run.finished) < len(inputs):
            in_flight = len(inputs) - len(waiting) - len(run.finished)
            while waiting and in_flight < clients and arrivals[waiting[0]] <= now - start:
                number = waiting.popleft()
                run.sent[number] = time.perf_counter() - start
                self.engine.add_request(str(number), inputs[number], params[number])
                in_flight += 1
            if not in_flight:
                time.sleep(max(0.0, start + arrivals[waiting[0]] - now))
                now = told = time.perf_counter()
                continue
            # Once everyone who is in has a token, and until somebody comes in, steps decode.
            # With asynchronous scheduling a call may return before its step has ended, with
            # nothing or with the step before: the time between two outputs is a step's.
            decoding = len(run.first_token) == len(inputs) - len(waiting)
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                number = int(output.request_id)
                run.first_token.setdefault(number, now - start)
                if output.finished:
                    run.finished[number] = output
            if outputs:
                if decoding:
                    run.decode_steps.append(now - told)
                told = now
        run.seconds = now - start
        return run


class _DeviceStopwatch(Stopwatch):
    """A stopwatch that waits for vLLM's device."""

    def __init__(self) -> None:
        import torch

        super().__init__(torch.accelerator.synchronize)
