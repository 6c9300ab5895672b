"""Fake engines whose time follows the plan exactly, so that every ideal is met."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

from benchmarks.engines import EVS, EVS_RATIO, STOCK, EngineName
from benchmarks.ideals import ImagePlan, ideal_capacity
from benchmarks.requests import ImageRequest
from benchmarks.scenarios import ANSWER_TOKENS
from benchmarks.shapes import Shape
from vitcop_vllm.pruning.settings import SelectorName

ENCODER = 0.5
"""Seconds per image."""

TOKEN = 1e-3
"""Seconds per token, in all decoder layers together."""

STEP = 0.01
"""Seconds of a decode step with an empty KV cache."""

CACHED = 1e-6
"""Seconds that a token in the KV cache adds to a decode step."""


class FakeEngine:
    """Records its commands."""

    def __init__(self, name: EngineName, shape: Shape) -> None:
        self.shape = shape
        self.name = name
        self.selector: SelectorName | None = None if name in (STOCK, EVS) else name
        self.commands: list[Mapping[str, Any]] = []

    def _evs_rate(self, request: ImageRequest) -> float:
        return float(Fraction(EVS_RATIO)) if self.name == EVS and request.is_video else 0.0

    def _unpruned(self, request: ImageRequest) -> float:
        return replace(self.shape, image_size=request.image_size).visual_tokens

    def _visual(self, request: ImageRequest) -> float:
        if self.selector is None:
            return (1 - self._evs_rate(request)) * self._unpruned(request)
        shape = replace(self.shape, image_size=request.image_size)
        return ImagePlan.of(shape, request.ratio, self.selector).average

    def run(self, what: str, **command: Any) -> dict[str, Any]:
        self.commands.append({"what": what, **command})
        run: dict[str, Any] = getattr(self, what)(**command)
        return run

    def about(self) -> dict[str, Any]:
        return {
            "model_runner": "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
            "model_runner_version": "V1",
            "threads": 2,
            "kv_blocks": 256,
            "block_size": 128,
            "compilation_mode": 0,
            "cudagraph_mode": "CUDAGraphMode.NONE",
            "async_scheduling": False,
        }

    def text(self, *, batch: int, tokens: int, max_tokens: int) -> dict[str, Any]:
        step = STEP + batch * tokens * CACHED
        seconds = batch * tokens * TOKEN + (max_tokens - 1) * step
        return {"seconds": seconds, "decode_step_seconds": [step] * (max_tokens - 1)}

    def images(self, *, requests, profile=False) -> dict[str, Any]:
        encoder = ENCODER * sum(len(request.images) for request in requests)
        lengths = [
            len(request.prompt) + len(request.images) * self._visual(request)
            for request in requests
        ]
        prefill = encoder + sum(lengths) * TOKEN
        answers = [request.max_tokens - 1 for request in requests]
        steps = [
            STEP
            + CACHED
            * sum(length for length, left in zip(lengths, answers, strict=True) if step < left)
            for step in range(max(answers))
        ]
        result = {
            "seconds": prefill + sum(steps),
            "first_token_seconds": [prefill] * len(requests),
            "decode_step_seconds": steps,
            "prompt_tokens": [
                len(request.prompt)
                + len(request.images) * (1 - self._evs_rate(request)) * self._unpruned(request)
                for request in requests
            ],
            "reused_tokens": [0] * len(requests),
            "tokens": [[request.max_tokens] for request in requests],
            "answers": ["a" * request.max_tokens for request in requests],
        }
        if profile:
            result |= {"encoder_seconds": encoder, "stage_seconds": 0.001 * prefill}
        return result

    def capacity(self, *, requests, budget: int) -> dict[str, Any]:
        request = requests[0]
        visual = len(request.images) * self._visual(request)
        longest = len(request.prompt) + visual + ANSWER_TOKENS - 1
        fit = ideal_capacity(budget, longest, self.shape.layers)
        return {"max_running": min(floor(fit), len(requests)), "preemptions": 0}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass
