"""``python -m benchmarks.soak``: is the engine still right when everything happens at once?

A real engine with a tiny model and far too small a KV cache gets a random mix of ratios,
images, conversations that go on, system prompts, cache salts, priorities and aborts. Every
completed answer must be the one that the same request gets alone, without prefix caching. At
the end nothing may be left: blocks, encoder cache, tables of requests, processes.

The seed decides everything, so that a failure can be had again. Status 1 means there was one.
The last line of standard output is a JSON document.
"""

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import qwen_checkpoint
from benchmarks.asks import random_image
from vitcop_vllm.demo.checkpoint import TINY, save_random_llava
from vitcop_vllm.pruning.settings import RATIO_KEY

RATIOS = (0.0, 0.3, 0.5, 2 / 3, 7 / 9, 8 / 9, 17 / 18)
MOST_TEXT = 768
"""Tokens of a prompt with its answer, beside four unpruned images."""

TIE = 1e-3
"""Log-probabilities closer than this are equal: another batch may round them apart."""

_WORDS = ("what", "where", "is", "the", "this", "many", "small", "red", "thing", "of", "picture")
_SYSTEMS = ("", "Answer briefly. ", "You look closely, and then you answer in one word. " * 3)


@dataclass(frozen=True)
class Model:
    """A model to soak.

    Attributes:
        save: Writes its checkpoint into a folder.
        marker: What stands for an image in a prompt.
        sizes: Width and height of images; the seed of an image says which it has.
        most_visual_tokens: Of an image.
        blocks: KV blocks of 32 tokens, in all: just enough for the longest request.
        concurrency: Requests at a time: so many that those blocks are too few.
    """

    save: Callable[[Path], None]
    marker: str
    sizes: tuple[tuple[int, int], ...]
    most_visual_tokens: int
    blocks: int
    concurrency: int

    def image(self, seed: int) -> Any:
        return _image(seed, *self.sizes[seed % len(self.sizes)])


MODELS = {
    "llava": Model(
        lambda path: save_random_llava(path, TINY),
        "<image>",
        ((336, 336),),
        TINY.visual_tokens,
        blocks=480,
        concurrency=24,
    ),
    "qwen2.5-vl": Model(
        lambda path: qwen_checkpoint.save_random_qwen(path, qwen_checkpoint.TINY),
        qwen_checkpoint.IMAGE_MARKER,
        # Photographs of both formats, as they are or scaled down to the model's limit, images
        # scaled up to its other limit, and thin ones: one or two visual tokens across.
        (
            *((448, 448), (500, 400), (336, 392), (900, 700), (640, 1100), (1400, 500)),
            *((20, 20), (56, 56), (1200, 40), (40, 700), (28, 560), (900, 60)),
        ),
        qwen_checkpoint.TINY.max_visual_tokens,
        blocks=540,
        concurrency=48,
    ),
}


@dataclass(frozen=True)
class Ask:
    """A request. What decides its answer, and what only decides how it gets there.

    Attributes:
        prompt: With the model's marker for each image.
        images: Their seeds.
        ratio: Pruning ratio, in [0, 1).
        max_tokens: Length of the answer.
    """

    prompt: str
    images: tuple[int, ...]
    ratio: float
    max_tokens: int
    cache_salt: str | None = field(default=None, compare=False)
    priority: int = field(default=0, compare=False)


_image = cache(random_image)

_GREETING = Ask("USER: hello ASSISTANT:", (), 0.0, 2)


@dataclass(frozen=True)
class Answer:
    """Tokens, and by how much each was likelier than the second likeliest."""

    tokens: list[int]
    leads: list[float]


class Traffic:
    """An endless mix of requests, from a seed."""

    def __init__(self, seed: int, marker: str = "<image>", num_images: int = 12) -> None:
        self.rng = random.Random(seed)
        self.marker = marker
        self.num_images = num_images
        self._finished: list[tuple[Ask, str]] = []

    def finished(self, ask: Ask, answer: str) -> None:
        """A conversation that may go on."""
        self._finished.append((ask, answer))
        del self._finished[:-40]

    def _text(self) -> str:
        most = self.rng.choice((3, 12, 40))
        return " ".join(self.rng.choice(_WORDS) for _ in range(self.rng.randint(1, most)))

    def _length(self, prompt: str) -> int:
        """Characters of a prompt, with as many for each image as ``<image>`` has."""
        markers = prompt.count(self.marker)
        return len(prompt) - markers * (len(self.marker) - len("<image>"))

    def next(self) -> Ask:
        rng = self.rng
        longest = rng.choice((1, 4, 12, 40))
        how: dict[str, Any] = {
            "max_tokens": rng.randint(1, longest),
            "cache_salt": rng.choice((None,) * 12 + ("a", "b")),
            "priority": rng.randint(0, 3),
        }
        if self._finished and rng.random() < 0.4:
            ask, said = rng.choice(self._finished)
            prompt = f"{ask.prompt}{said} USER: {self._text()} ASSISTANT:"
            if self._length(prompt) < 600:
                return replace(ask, prompt=prompt, **how)
        images = tuple(
            rng.randrange(self.num_images) for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4)))
        )
        marks = self.marker * len(images)
        prompt = f"{rng.choice(_SYSTEMS)}USER: {marks}{self._text()} ASSISTANT:"
        return Ask(prompt, images, rng.choice(RATIOS), **how)


class Engine:
    """An engine in this process, asked with :class:`Ask`."""

    def __init__(self, model: Model, checkpoint: Path, **options: Any) -> None:
        from vllm import LLM

        self.model = model
        self.llm = LLM(
            str(checkpoint),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4 * model.most_visual_tokens + MOST_TEXT,
            limit_mm_per_prompt={"image": 4},
            kv_cache_memory_bytes=256 << 20,  # ``num_gpu_blocks_override`` says how much is used
            **options,
        )
        self.engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner

    def add(self, name: str, ask: Ask) -> None:
        from vllm import SamplingParams

        prompt: dict[str, Any] = {"prompt": ask.prompt}
        if ask.images:
            images = [self.model.image(seed) for seed in ask.images]
            prompt["multi_modal_data"] = {"image": images}
            prompt["mm_processor_kwargs"] = {RATIO_KEY: ask.ratio}
        if ask.cache_salt:
            prompt["cache_salt"] = ask.cache_salt
        params = SamplingParams(
            temperature=0, max_tokens=ask.max_tokens, logprobs=2, ignore_eos=True
        )
        (rendered,) = self.engine.renderer.render_cmpl([prompt])
        self.engine.add_request(name, rendered, params, priority=ask.priority)

    def step(self) -> Iterator[tuple[str, Answer, int, int]]:
        """Finished requests: name, answer, tokens of the prompt, and of these reused."""
        for output in self.engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                (answer,) = output.outputs
                steps = [
                    sorted((e.logprob for e in s.values()), reverse=True) for s in answer.logprobs
                ]
                told = Answer(list(answer.token_ids), [step[0] - step[1] for step in steps])
                prompt = len(output.prompt_token_ids)
                yield output.request_id, told, prompt, output.num_cached_tokens or 0

    def alone(self, ask: Ask) -> Answer:
        self.add("alone", ask)
        while True:
            for _, answer, _, _ in self.step():
                return answer

    def preemptions(self) -> int:
        """vLLM's own count, since the engine started."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        return int(metrics["vllm:num_preemptions"].value)

    def left_overs(self) -> dict[str, int]:
        """What an idle engine holds; all of it must be as before."""
        manager = self.scheduler.kv_cache_manager
        managers = manager.coordinator.single_type_managers
        encoder = self.scheduler.encoder_cache_manager
        return {
            "blocks in use": manager.block_pool.num_gpu_blocks
            - manager.block_pool.get_num_free_blocks(),
            "block tables": sum(len(m.req_to_blocks) + len(m.num_cached_block) for m in managers),
            "copies": sum(len(m._partial_hit_reqs) + len(m._pending_cow_copies) for m in managers),
            "requests of the scheduler": len(self.scheduler.requests),
            "plans": len(self.scheduler.plans),
            "encoder embeddings in use": encoder.cache_size - encoder.num_freeable_slots,
            "requests of the runner": len(self.runner.requests),
            "rows of the batch": self.runner.input_batch.num_reqs,
            "processes": _count_children(),
        }


def _count_children() -> int:
    import psutil  # type: ignore[import-untyped]

    return len(psutil.Process().children(recursive=True))


def _difference(answer: Answer, alone: Answer) -> str | None:
    """``None`` if equal, "tie" if they part where two tokens are equally likely, else "wrong"."""
    for token, other, lead in zip(answer.tokens, alone.tokens, alone.leads, strict=True):
        if token != other:
            return "tie" if lead < TIE else "wrong"
    return None


def hammer(
    engine: Engine, traffic: Traffic, num_requests: int, concurrency: int
) -> tuple[list[tuple[int, Ask, Answer]], Counter[str]]:
    """Send requests, ``concurrency`` at a time; some are aborted on the way.

    Returns:
        Number, request and answer of all that were completed; and what was counted.
    """
    counts: Counter[str] = Counter()
    live: dict[str, Ask] = {}
    done: list[tuple[int, Ask, Answer]] = []
    with tqdm(total=num_requests, desc="hammering") as bar:
        sent = 0
        while sent < num_requests or live:
            while sent < num_requests and len(live) < concurrency:
                ask = traffic.next()
                live[str(sent)] = ask
                engine.add(str(sent), ask)
                sent += 1
                if traffic.rng.random() < 0.2:
                    break  # the next comes in another step
            if live and traffic.rng.random() < 0.02:
                name = traffic.rng.choice(list(live))
                engine.engine.abort_request([name])
                del live[name]
                counts["aborted"] += 1
                bar.update()
            for name, answer, prompt_tokens, reused in engine.step():
                ask = live.pop(name)
                done.append((int(name), ask, answer))
                traffic.finished(ask, engine.tokenizer.decode(answer.tokens))
                counts["prompt_tokens"] += prompt_tokens
                counts["reused_tokens"] += reused
                counts["answer_tokens"] += len(answer.tokens)
                bar.update()
            counts["steps"] += 1
    counts["preemptions"] = engine.preemptions()
    # The runner forgets the last requests when it is next given a step.
    engine.alone(_GREETING)
    list(engine.step())
    return done, counts


def compare(engine: Engine, done: list[tuple[int, Ask, Answer]]) -> dict[str, list[int]]:
    """Numbers of the requests that got another answer than alone: "tie" and "wrong"."""
    # One run answers all who ask the same for at most as many tokens.
    longest: dict[Ask, int] = {}
    for _, ask, _ in done:
        key = replace(ask, max_tokens=0)
        longest[key] = max(longest.get(key, 0), ask.max_tokens)
    alone = {
        key: engine.alone(replace(key, max_tokens=most, cache_salt=None, priority=0))
        for key, most in tqdm(longest.items(), desc="alone")
    }
    different: dict[str, list[int]] = {"tie": [], "wrong": []}
    for number, ask, answer in done:
        whole = alone[replace(ask, max_tokens=0)]
        count = len(answer.tokens)
        if kind := _difference(answer, Answer(whole.tokens[:count], whole.leads[:count])):
            different[kind].append(number)
            if kind == "wrong":
                print(f"request {number} got {answer.tokens}, alone {whole.tokens}: {ask}")
    return different


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="llava", help="default: llava")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--concurrency",
        type=int,
        help="requests at a time, two thirds of them running; 24 for LLaVA, 48 for Qwen",
    )
    parser.add_argument(
        "--blocks", type=int, help="KV blocks of 32 tokens in all; 480 for LLaVA, 540 for Qwen"
    )
    arguments = parser.parse_args(argv)
    for name in ("blocks", "concurrency"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(MODELS[arguments.model], name))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    # Before vLLM is imported. One process: the engine can be looked into.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, model = Path(scratch), MODELS[arguments.model]
        model.save(checkpoint)
        engine = Engine(
            model,
            checkpoint,
            max_num_batched_tokens=400,
            max_num_seqs=max(1, arguments.concurrency * 2 // 3),
            num_gpu_blocks_override=arguments.blocks,
            scheduling_policy="priority",
            disable_log_stats=False,
        )
        engine.alone(_GREETING)
        list(engine.step())
        before = engine.left_overs()
        started = time.perf_counter()
        traffic = Traffic(arguments.seed, model.marker)
        done, counts = hammer(engine, traffic, arguments.requests, arguments.concurrency)
        seconds = time.perf_counter() - started
        gc.collect()
        after = engine.left_overs()
        different = compare(Engine(model, checkpoint, enable_prefix_caching=False), done)
    leaks = {what: after[what] - before[what] for what in before if after[what] != before[what]}
    document = {
        **{key: getattr(arguments, key) for key in ("model", "seed", "concurrency", "blocks")},
        "requests": arguments.requests,
        "completed": len(done),
        **counts,
        "hit_rate": counts["reused_tokens"] / max(counts["prompt_tokens"], 1),
        "seconds": seconds,
        "requests_per_second": arguments.requests / seconds,
        "different": different,
        "leaks": leaks,
    }
    print(
        f"{len(done)} of {arguments.requests} requests completed, {counts['aborted']} aborted, "
        f"in {seconds:.0f} s ({document['requests_per_second']:.1f} requests/s); "
        f"{counts['preemptions']} preemptions; {document['hit_rate']:.0%} of the prompts reused.\n"
        f"Another answer than alone: {len(different['wrong'])}; equally likely tokens: "
        f"{len(different['tie'])}. Left behind: {leaks or 'nothing'}."
    )
    print(json.dumps(document))
    return 1 if different["wrong"] or leaks else 0


if __name__ == "__main__":
    sys.exit(main())
