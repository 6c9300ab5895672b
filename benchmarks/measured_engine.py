"""A vLLM engine and its timing.

The clock starts after the preprocessing of images. Scheduler and worker run in the process of the
clock, on a CPU and on a GPU, for stock vLLM and for ours.
"""

import random
import string
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock, patch

from benchmarks.concurrency import limit_kv_memory, observe
from benchmarks.requests import ImageRequest, random_image, video_data
from benchmarks.stopwatch import Stopwatch
from vitcop_vllm.pruning.settings import RATIO_KEY

Result = dict[str, Any]
"""``seconds`` and ``decode_step_seconds`` of requests served together, and for each request
``first_token_seconds``, ``prompt_tokens``, ``reused_tokens``, ``tokens`` and ``answers``."""


def _about_runner(worker: Any) -> Result:
    runner = type(worker.model_runner)
    return {
        "model_runner": f"{runner.__module__}.{runner.__qualname__}",
        "model_runner_version": "V2" if worker.use_v2_model_runner else "V1",
    }


def _use_video_pruning(worker: Any) -> None:
    worker.model_runner.is_multimodal_pruning_enabled = True


class MeasuredEngine:
    """Serves requests and times them.

    Args:
        options: Arguments of ``vllm.LLM``.
        pruned: Whether the engine prunes, so that requests carry their ratio.
    """

    def __init__(self, options: dict[str, Any], pruned: bool) -> None:
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        self.pruned = pruned
        self.llm = LLM(**options)
        if options.get("video_pruning_rate"):
            # vLLM's runner for CPUs forgets to set it; each video would fail.
            self.llm.collective_rpc(_use_video_pruning)
        self.engine = self.llm.llm_engine
        self._rng = random.Random(0)
        self._letters = self.llm.get_tokenizer().encode(
            string.ascii_letters, add_special_tokens=False
        )
        wait = () if current_platform.is_cpu() else (torch.accelerator.synchronize,)
        self.encoder, self.stages = Stopwatch(*wait), Stopwatch(*wait)
        self._threads = torch.get_num_threads()

    def about(self) -> Result:
        """The engine's conditions."""
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

    def images(self, *, requests: Sequence[ImageRequest], profile: bool = False) -> Result:
        """Serve requests that arrive at once.

        Args:
            requests: The requests.
            profile: Also report ``encoder_seconds`` and ``stage_seconds``, of Stages I to III. The
                host then waits for the device.

        Raises:
            RuntimeError: If nothing timed the encoder, or the stages of pruned requests.
        """
        with self._profiled() if profile else nullcontext():
            result = self._serve(
                [self._prompt(request) for request in requests],
                [self._params(request.max_tokens, request.letters) for request in requests],
            )
        if profile:
            if not self.encoder.uses:
                raise RuntimeError("the encoder was not timed: embed_multimodal was not called")
            if self.pruned and any(request.ratio for request in requests) and not self.stages.uses:
                raise RuntimeError("no stage was timed: SELECTION_SECONDS was not used")
            result["encoder_seconds"] = self.encoder.seconds
            result["stage_seconds"] = self.stages.seconds
        return result

    def text(self, *, batch: int, tokens: int, max_tokens: int) -> Result:
        """Serve a batch of new text-only prompts of ``tokens`` tokens each."""
        prompts: list[dict[str, Any]] = [
            {"prompt_token_ids": [1, *self._rng.choices(range(40, 100), k=tokens - 1)]}
            for _ in range(batch)
        ]
        return self._serve(prompts, [self._params(max_tokens)] * batch)

    def capacity(self, *, requests: Sequence[ImageRequest], budget: int) -> Result:
        """Serve requests in KV memory of ``budget`` slots times layers.

        Returns:
            Also ``max_running``, the most requests that ran at once, and ``preemptions``.

        Raises:
            ValueError: If the engine has less memory or a lower ``max_num_seqs``.
        """
        scheduler = self.engine.engine_core.engine_core.scheduler
        if len(requests) > scheduler.max_num_running_reqs:
            raise ValueError(f"max_num_seqs must be at least {len(requests)}")
        with limit_kv_memory(scheduler, budget), observe(scheduler) as concurrency:
            result = self.images(requests=requests)
        return result | {
            "max_running": concurrency.max_running,
            "preemptions": concurrency.preemptions,
        }

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        # vLLM's method finds the model in both of its runners, and unwraps it from CUDA graphs.
        (model,) = self.llm.collective_rpc("get_model")
        embed = model.embed_multimodal

        def timed_embed(*args: Any, **kwargs: Any) -> Any:
            with self.encoder.time():
                return embed(*args, **kwargs)

        self.encoder.reset()
        self.stages.reset()
        with ExitStack() as stack:
            stack.enter_context(patch.object(model, "embed_multimodal", timed_embed))
            if self.pruned:
                from vitcop_vllm.engine.metrics import SELECTION_SECONDS

                # The server's metric does not wait for the device.
                stage_timer = Mock(return_value=self.stages)
                stack.enter_context(patch.object(SELECTION_SECONDS, "labels", stage_timer))
            yield

    def _prompt(self, request: ImageRequest) -> dict[str, Any]:
        size = request.image_size
        images = [random_image(seed, size, size) for seed in request.images]
        data = {"video": [video_data(images)]} if request.is_video else {"image": images}
        prompt: dict[str, Any] = {"prompt": request.prompt, "multi_modal_data": data}
        kwargs: dict[str, float] = {RATIO_KEY: request.ratio} if self.pruned else {}
        return prompt | ({"mm_processor_kwargs": kwargs} if kwargs else {})

    def _params(self, max_tokens: int, letters: bool = False) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            allowed_token_ids=self._letters if letters else None,
        )

    def _serve(self, prompts: Sequence[dict[str, Any]], params: Sequence[Any]) -> Result:
        inputs = self.engine.renderer.render_cmpl(prompts)
        first_token: dict[int, float] = {}
        finished: dict[int, Any] = {}
        decode_steps: list[float] = []
        start = last = time.perf_counter()
        for number, (prompt, param) in enumerate(zip(inputs, params, strict=True)):
            self.engine.add_request(str(number), prompt, param)
        while len(finished) < len(inputs):
            # Once every request has a token, steps only decode. With asynchronous scheduling a
            # call may return nothing or the previous step's output, so a step's time is the time
            # between two outputs.
            decoding = len(first_token) == len(inputs)
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                first_token.setdefault(int(output.request_id), now - start)
                if output.finished:
                    finished[int(output.request_id)] = output
            if outputs:
                if decoding:
                    decode_steps.append(now - last)
                last = now
        answers = [finished[number] for number in range(len(inputs))]
        return {
            "seconds": last - start,
            "decode_step_seconds": decode_steps,
            "first_token_seconds": [first_token[number] for number in range(len(inputs))],
            "prompt_tokens": [len(answer.prompt_token_ids) for answer in answers],
            "reused_tokens": [answer.num_cached_tokens or 0 for answer in answers],
            "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
            "answers": [answer.outputs[0].text for answer in answers],
        }
