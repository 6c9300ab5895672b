"""Two engines side by side: stock vLLM and ours, each in a process of its own.

Only one of them works at a time; the other waits for its next command. What is timed is
the engine: pictures are preprocessed before the clock starts.
"""

import multiprocessing as mp
import os
import random
import string
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vitcop_vllm.lab.concurrency import kv_memory, observed
from vitcop_vllm.lab.serving import NO_PLUGIN
from vitcop_vllm.pruning.settings import RATIO_KEY

Result = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request about one picture of noise.

    Attributes:
        prompt: With one ``<image>``.
        picture: Seed of its pixels.
        ratio: Pruning ratio, in [0, 1); stock vLLM is not told.
        max_tokens: Length of the answer.
        arrival: Seconds after the clock starts.
        letters: Whether the answer is made of letters. Random weights else answer bytes that
            are no text, and that a next turn would hold as other tokens.
    """

    prompt: str
    picture: int
    ratio: float
    max_tokens: int
    arrival: float = 0.0
    letters: bool = False


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


@dataclass
class _Run:
    """Seconds, and outputs by number, of requests served."""

    seconds: float = 0.0
    first_token: dict[int, float] = field(default_factory=dict)
    finished: dict[int, Any] = field(default_factory=dict)
    decode_steps: list[float] = field(default_factory=list)


class _Engine:
    """What a worker process does."""

    def __init__(self, options: dict[str, Any], pruned: bool) -> None:
        from vllm import LLM

        self.pruned = pruned
        llm = LLM(**options)
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        runner = self.core.model_executor.driver_worker.worker.model_runner
        self._rng = random.Random(0)
        self._letters = llm.get_tokenizer().encode(string.ascii_letters, add_special_tokens=False)
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

    def pictures(self, *, asks: Sequence[Ask], clients: int | None = None) -> Result:
        """Serve requests from their arrivals on; who finds ``clients`` others waits."""
        return self._serve(
            [self._prompt(ask) for ask in asks],
            [self._params(ask.max_tokens, ask.letters) for ask in asks],
            [ask.arrival for ask in asks],
            clients or len(asks),
        )

    def text(self, *, batch: int, tokens: int) -> Result:
        """Prefill a batch of new text-only prompts of ``tokens`` tokens each."""
        prompts: list[dict[str, Any]] = [
            {"prompt_token_ids": [1, *self._rng.choices(range(40, 100), k=tokens - 1)]}
            for _ in range(batch)
        ]
        return self._serve(prompts, [self._params(1)] * batch, [0.0] * batch, batch)

    def capacity(self, *, asks: Sequence[Ask], budget: int) -> Result:
        """Serve requests with free KV memory for ``budget`` slots times layers.

        Raises:
            ValueError: If the engine has less memory, or takes fewer requests at a time.
        """
        scheduler = self.core.scheduler
        if len(asks) > scheduler.max_num_running_reqs:
            raise ValueError(f"max_num_seqs must be {len(asks)} or more not to be the limit")
        with kv_memory(scheduler, budget), observed(scheduler) as concurrency:
            result = self.pictures(asks=asks)
        return result | {"most": concurrency.most, "preemptions": concurrency.preemptions}

    def _prompt(self, ask: Ask) -> dict[str, Any]:
        prompt: dict[str, Any] = {
            "prompt": ask.prompt,
            "multi_modal_data": {"image": random_picture(ask.picture)},
        }
        if self.pruned:
            prompt["mm_processor_kwargs"] = {RATIO_KEY: ask.ratio}
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
        self.encoder.take()
        self.stages.take()
        run = self._run(inputs, params, arrivals, clients)
        outputs = [run.finished[number] for number in range(len(inputs))]
        return {
            "seconds": run.seconds,
            "encoder_seconds": self.encoder.take(),
            "stage_seconds": self.stages.take(),
            "decode_step_seconds": run.decode_steps,
            "first_token_seconds": [run.first_token[number] for number in range(len(inputs))],
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
        start = now = time.perf_counter()
        while len(run.finished) < len(inputs):
            in_flight = len(inputs) - len(waiting) - len(run.finished)
            while waiting and in_flight < clients and arrivals[waiting[0]] <= now - start:
                number = waiting.popleft()
                self.engine.add_request(str(number), inputs[number], params[number])
                in_flight += 1
            if not in_flight:
                time.sleep(max(0.0, start + arrivals[waiting[0]] - now))
                now = time.perf_counter()
                continue
            requests = self.core.scheduler.requests.values()
            decoding = all(r.num_computed_tokens >= r.num_prompt_tokens for r in requests)
            step = time.perf_counter()
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                number = int(output.request_id)
                run.first_token.setdefault(number, now - start - arrivals[number])
                if output.finished:
                    run.finished[number] = output
            if decoding:
                run.decode_steps.append(now - step)
        run.seconds = now - start
        return run


def _work(connection: Connection, options: dict[str, Any], pruned: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not pruned:
        os.environ.update(NO_PLUGIN)
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
        """Have the engine serve ``pictures``, ``text`` or ``capacity``; see :class:`_Engine`.

        Returns:
            Seconds of the whole, of the encoder, of Stages I to III, of each decode step, and
            from each request's arrival to its first token; tokens of each prompt, and of these
            reused; each answer's ``tokens`` and text. For ``capacity`` also the ``most``
            requests that ran at once, and the preemptions.

        Raises:
            RuntimeError: If the engine's process died.
        """
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
            engines.append(EngineProcess({"model": str(checkpoint), **options}, pruned=pruned))
        stock, ours = engines
        yield stock, ours
    finally:
        for engine in engines:
            engine.stop()
