"""Options of the bench, and of its engines."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks import load, prefill
from benchmarks.conditions import Device
from benchmarks.engines import OURS, PEER, STOCK, EngineName
from benchmarks.qwen_checkpoint import QwenShape
from benchmarks.shapes import PUBLISHED, SHAPES, Shape, boundaries, save_checkpoint
from vitcop_vllm.pruning.settings import CONFIG_KEY

ENGINE_SCENARIOS = ("prefill", "images", "long_text", "decode", "turns", "capacity")
"""Engines run side by side in these."""

SCENARIOS = (*ENGINE_SCENARIOS, "load", "cold_start")

QWEN_SCENARIOS = ("prefill",)
"""The scenarios that know images of more than one size."""

LONG_ROUNDS = 3
"""Most rounds of a scenario in which a round takes minutes."""

MAX_NUM_SEQS = 64
"""More than any scenario lets run at once, unless a batch is larger."""

TEXT_MARGIN = 128
"""Tokens of a prompt beside its images and a long text, and of an answer; with room."""

GPU_MEMORY = 0.9
"""Of a GPU, as is vLLM's default: shared by the engines that are on it at a time."""


class TooLittleMemoryError(RuntimeError):
    """The engines' KV caches are too small for what is to run at once."""


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Arguments as given; :func:`settle_defaults` completes them."""
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    numbers: dict[str, Any] = {"type": _numbers(int), "metavar": "N,N"}
    add("--device", choices=("cpu", "gpu"), help="default: what vLLM runs on")
    add("--shape", choices=SHAPES, help="default: demo on a CPU, llava-1.5-7b on a GPU")
    names = f"of {', '.join(SCENARIOS)}; all by default, {', '.join(QWEN_SCENARIOS)} for Qwen"
    add("--scenarios", nargs="+", choices=SCENARIOS, metavar="S", help=names)
    add("--rounds", type=_number, default=7, help=f"of long scenarios {LONG_ROUNDS} at most")
    add("--batches", **numbers, help="prefill at once; default 1,4,16, and 1 for Qwen")
    add("--running", **numbers, default=(1, 32), help="requests that decode")
    add("--tokens", type=_number, default=32, help="answer length when decoding")
    add("--rates", type=_numbers(float), default=load.RATES, help="arrivals over stock's rate")
    add("--clients", **numbers, default=load.CLIENTS, help="who wait for their answers")
    add("--chat-tokens", type=_number, help="mean answer under load; 16 on a CPU, 128 on a GPU")
    add("--peers", action="store_true", help=f"also {PEER}, which prunes in the encoder alone")
    compile_help = "torch.compile and CUDA graphs; by default on a GPU"
    add("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    load_help = "seeded random weights, or vLLM's own (dummy), as for published shapes"
    add("--load-format", choices=("random", "dummy"), help=load_help)
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="float32 on a CPU")
    add("--kv-cache-gib", type=_number, help="of each engine; on a GPU what the weights leave")
    add("--plot", type=Path, metavar="FILE.png", help="draw speed over ratio")
    arguments = parser.parse_args(argv)
    is_qwen = isinstance(SHAPES.get(arguments.shape), QwenShape)
    known = QWEN_SCENARIOS if is_qwen else SCENARIOS
    if unknown := set(arguments.scenarios or ()) - set(known):
        parser.error(f"{arguments.shape} has {', '.join(known)} only, not {min(unknown)}")
    if is_qwen and arguments.peers:
        parser.error(f"selector {PEER} needs [CLS], which the encoder of {arguments.shape} lacks")
    arguments.scenarios = [name for name in known if name in (arguments.scenarios or known)]
    arguments.batches = arguments.batches or ((1,) if is_qwen else (1, 4, 16))
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        parser.error(f"there is no folder {arguments.plot.parent} to write to")
    return arguments


def _number(text: str, kind: type = int) -> Any:
    number = kind(text)
    if number <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _numbers(kind: type) -> Any:
    return lambda text: tuple(_number(part, kind) for part in text.split(","))


def settle_defaults(arguments: argparse.Namespace, device: Device) -> None:
    """Replace what was not given by what suits the device and the shape."""
    on_gpu = device == "gpu"
    shape = arguments.shape or ("llava-1.5-7b" if on_gpu else "demo")
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    is_light = shape in ("demo", "qwen2.5-vl-small")  # a token takes little KV memory
    defaults = {
        "shape": shape,
        "dtype": dtype,
        "compile": on_gpu,
        "chat_tokens": 128 if on_gpu else 16,
        "kv_cache_gib": None if on_gpu else 2 if is_light else 6 if dtype == "float32" else 3,
        "load_format": "dummy" if shape in PUBLISHED else "random",
    }
    arguments.device = device
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def engine_names(arguments: argparse.Namespace) -> tuple[EngineName, ...]:
    """Engines that run side by side."""
    return (STOCK, OURS, PEER) if arguments.peers else (STOCK, OURS)


def _at_once(arguments: argparse.Namespace, shape: Shape) -> dict[str, tuple[int, int]]:
    """Most requests at once in the chosen scenarios, and the tokens of each."""
    prompt = shape.visual_tokens + TEXT_MARGIN
    most = {
        "prefill": (max(arguments.batches), prompt),
        "decode": (max(arguments.running), prompt + arguments.tokens),
        "load": (max(arguments.clients), prompt + 2 * arguments.chat_tokens),
    }
    return {name: row for name, row in most.items() if name in arguments.scenarios}


def engine_options(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, the same for all engines.

    A step holds all prompts of a scenario that arrive at once: the bench times kernels, not
    queues.
    """
    at_once = _at_once(arguments, shape)
    images = max(prefill.IMAGES) if "images" in arguments.scenarios else 1
    text = max(prefill.TEXT_TOKENS) if "long_text" in arguments.scenarios else 0
    prompt = max(images * shape.visual_tokens, shape.visual_tokens + text) + TEXT_MARGIN
    longest = max(4096, prompt, *(tokens for _, tokens in at_once.values()))
    options: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": max([longest, *(n * tokens for n, tokens in at_once.values())]),
        "max_num_seqs": max([MAX_NUM_SEQS, *(number for number, _ in at_once.values())]),
        "enforce_eager": not arguments.compile,
        "limit_mm_per_prompt": {"image": images},
    }
    if pruning := boundaries(shape):
        options[CONFIG_KEY] = pruning  # for engines that prune
    if arguments.load_format == "dummy":
        options["load_format"] = "dummy"
    if arguments.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = arguments.kv_cache_gib << 30
    if arguments.device == "gpu":
        options["gpu_memory_utilization"] = GPU_MEMORY / len(engine_names(arguments))
    return options


def check_room(
    arguments: argparse.Namespace, shape: Shape, kv_blocks: int, block_size: int
) -> None:
    """Check that requests which are to run at once can, unpruned.

    Args:
        arguments: The bench's.
        shape: Of the model.
        kv_blocks: Of stock vLLM's engine, which takes the most.
        block_size: Tokens of each.

    Raises:
        TooLittleMemoryError: If some would wait for others.
    """
    for scenario, (number, tokens) in _at_once(arguments, shape).items():
        room = kv_blocks // ceil(tokens / block_size)
        if number > room:
            raise TooLittleMemoryError(
                f"stock vLLM has KV memory for {room} requests, and {number} are to run at once "
                f"in scenario {scenario}: raise --kv-cache-gib, lower --batches, --running or "
                "--clients, or leave that scenario to a run without --peers"
            )


def write_checkpoint(path: Path, shape: Shape, options: dict[str, Any]) -> None:
    """A model of ``shape`` for prompts as long as ``options`` allow."""
    shape = replace(shape, max_positions=max(shape.max_positions, options["max_model_len"]))
    weights = options.get("load_format") != "dummy"
    save_checkpoint(path, shape, options["dtype"], weights=weights)
