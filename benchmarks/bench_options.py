"""What the bench is told, and what it tells its engines."""

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
from benchmarks.rounds import LONG_ROUNDS
from benchmarks.shapes import PUBLISHED, SHAPES, Shape, boundaries, save_checkpoint
from vitcop_vllm.pruning.settings import CONFIG_KEY

COLD_START = "cold_start"
"""The scenario without running engines: they would be in its way."""

SCENARIOS = (
    *("prefill", "images", "long_text", "decode", "turns", "capacity", "load", "clients"),
    COLD_START,
)

QWEN_SCENARIOS = ("prefill",)
"""Those that know images of more than one size."""

MAX_NUM_SEQS = 64
"""More than any scenario lets run at once, unless a batch is larger."""

TEXT_MARGIN = 128
"""Tokens of a prompt beside its images and a long text, and of an answer; with room."""

_LIGHT = ("demo", "qwen2.5-vl-small")
"""Shapes of which a token takes little KV memory."""

GPU_MEMORY = 0.9
"""Of a GPU, as is vLLM's default: shared by the engines that are on it at a time."""


class TooLittleMemoryError(RuntimeError):
    """The engines' KV caches are too small for what they are asked to do."""


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Arguments as they were given; :func:`settle_defaults` completes them."""
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers: dict[str, Any] = {"type": _numbers, "metavar": "N,N"}
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: what vLLM runs on")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="default: demo on a CPU, where small takes hours, and llava-1.5-7b on a GPU",
    )
    parser.add_argument(
        "--scenarios",
        nargs="+",
        choices=SCENARIOS,
        metavar="S",
        help=f"of {', '.join(SCENARIOS)}; all by default, and for Qwen shapes those there are: "
        f"{', '.join(QWEN_SCENARIOS)}",
    )
    parser.add_argument(
        "--rounds",
        type=_number,
        default=7,
        help=f"medians are over these, {LONG_ROUNDS} at most where one is long",
    )
    parser.add_argument(
        "--batches",
        **numbers,
        help="requests that arrive at once, for prefill; 1,4,16 by default, and 1 for Qwen shapes",
    )
    parser.add_argument("--running", **numbers, default=(1, 32), help="requests that decode")
    parser.add_argument("--tokens", type=_number, default=32, help="answer length when decoding")
    parser.add_argument(
        "--rates",
        type=_rates,
        default=load.RATES,
        metavar="R,R",
        help="arrivals under open load, over the rate that stock vLLM serves; one is enough for "
        "a slow machine",
    )
    parser.add_argument(
        "--clients", **numbers, default=load.CLIENTS, help="who wait for their answers"
    )
    parser.add_argument(
        "--chat-tokens",
        type=_number,
        help="median answer length under load; 16 on a CPU, 128 on a GPU",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help=f"also measure selector {PEER}, which prunes in the encoder alone",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs, vLLM's default; by default on a GPU",
    )
    parser.add_argument(
        "--load-format",
        choices=("random", "dummy"),
        help="seeded random weights in a file, or vLLM's own when it starts; "
        f"dummy by default for {' and '.join(sorted(PUBLISHED))}",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and activations; default: float32 on a CPU, as the demo is served, and "
        "bfloat16 on a GPU",
    )
    parser.add_argument(
        "--kv-cache-gib",
        type=_number,
        help=f"of each engine; on a CPU 2 for {' and '.join(_LIGHT)}, 6 for others (3 in "
        "bfloat16), on a GPU what the weights leave",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw speed over ratio")
    arguments = parser.parse_args(argv)
    is_qwen = isinstance(SHAPES.get(arguments.shape), QwenShape)
    known = QWEN_SCENARIOS if is_qwen else SCENARIOS
    unknown = [name for name in arguments.scenarios or () if name not in known]
    if unknown:
        parser.error(
            f"scenario {unknown[0]} knows one size of image only: for {arguments.shape} there is "
            + ", ".join(known)
        )
    if is_qwen and arguments.peers:
        parser.error(f"selector {PEER} needs [CLS], which the encoder of {arguments.shape} lacks")
    arguments.scenarios = [name for name in known if name in (arguments.scenarios or known)]
    if arguments.batches is None:
        arguments.batches = (1,) if is_qwen else (1, 4, 16)
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        parser.error(f"there is no folder {arguments.plot.parent} to write to")
    return arguments


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(map(float, text.split(",")))
    if min(rates) <= 0.0:
        raise argparse.ArgumentTypeError("must be above 0")
    return rates


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_number, text.split(",")))


def settle_defaults(arguments: argparse.Namespace, device: Device) -> None:
    """Put in place of what was not given what suits the device and the shape."""
    on_gpu = device == "gpu"
    arguments.device = device
    if arguments.shape is None:
        arguments.shape = "llava-1.5-7b" if on_gpu else "demo"
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if on_gpu else "float32"
    if arguments.compile is None:
        arguments.compile = on_gpu
    if arguments.chat_tokens is None:
        arguments.chat_tokens = 128 if on_gpu else 16
    if arguments.kv_cache_gib is None and not on_gpu:
        whole = 6 if arguments.dtype == "float32" else 3
        arguments.kv_cache_gib = 2 if arguments.shape in _LIGHT else whole
    if arguments.load_format is None:
        arguments.load_format = "dummy" if arguments.shape in PUBLISHED else "random"


def engine_names(arguments: argparse.Namespace) -> tuple[EngineName, ...]:
    """Engines that run side by side."""
    return (STOCK, OURS, PEER) if arguments.peers else (STOCK, OURS)


def engine_options(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, the same for all engines.

    A step holds all prompts of a scenario that arrive at once: the bench times kernels, not
    queues.
    """
    prompt = shape.visual_tokens + TEXT_MARGIN
    longest, most = [4096], [4096]
    chosen = set(arguments.scenarios)
    images = 1
    if "prefill" in chosen:
        most += [batch * prompt for batch in arguments.batches]
    if "decode" in chosen:
        most += [running * prompt for running in arguments.running]
        longest.append(prompt + arguments.tokens)
    if "images" in chosen:
        images = max(prefill.IMAGES)
        longest.append(images * shape.visual_tokens + TEXT_MARGIN)
    if "long_text" in chosen:
        longest.append(prompt + max(prefill.TEXT_TOKENS))
    if chosen & {"load", "clients"}:
        longest.append(prompt + 4 * (load.QUESTION_TOKENS + arguments.chat_tokens))
    options: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_model_len": max(longest),
        "max_num_batched_tokens": max(most + longest),
        "max_num_seqs": max(
            MAX_NUM_SEQS, *arguments.batches, *arguments.running, *arguments.clients
        ),
        "enforce_eager": not arguments.compile,
        "limit_mm_per_prompt": {"image": images},
    }
    if pruning := boundaries(shape):
        options[CONFIG_KEY] = pruning  # told to engines that prune
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
    """See that requests which are to run at once can.

    Args:
        kv_blocks: Of stock vLLM's engine, which takes the most.
        block_size: Tokens of each.

    Raises:
        TooLittleMemoryError: If some would wait for others, unpruned.
    """
    prompt = shape.visual_tokens + TEXT_MARGIN
    chat = prompt + 2 * arguments.chat_tokens  # as many as most answers have
    at_once = {
        "prefill": (arguments.batches, prompt),
        "decode": (arguments.running, prompt + arguments.tokens),
        "load": (load.CLIENTS, chat),
        "clients": (arguments.clients, chat),
    }
    for scenario, (numbers, longest) in at_once.items():
        if scenario not in arguments.scenarios:
            continue
        room = kv_blocks // ceil(longest / block_size)
        if max(numbers) > room:
            raise TooLittleMemoryError(
                f"stock vLLM has KV memory for {room} requests, and {max(numbers)} are to run at "
                f"once in scenario {scenario}: raise --kv-cache-gib, lower --batches, --running "
                "or --clients, or leave that scenario to a run without --peers"
            )


def write_checkpoint(path: Path, shape: Shape, options: dict[str, Any]) -> None:
    """A model of ``shape`` that is made for prompts as long as ``options`` allow."""
    shape = replace(shape, max_positions=max(shape.max_positions, options["max_model_len"]))
    weights = options.get("load_format") != "dummy"
    save_checkpoint(path, shape, options["dtype"], weights=weights)
