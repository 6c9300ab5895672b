"""Options of the bench, and of its engines."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks import load, prefill
from benchmarks.checkpoint import AnySizeShape
from benchmarks.conditions import Device
from benchmarks.engines import EVS, OURS, PEER, STOCK, EngineName
from benchmarks.shapes import PUBLISHED, SHAPES, Shape, boundaries, family_of
from vitcop_vllm.pruning.settings import CONFIG_KEY

VIDEO_SCENARIOS = ("video_prefill", "video_decode", "video_turns", "video_capacity")
"""The scenarios after the prefix, with a video in each prompt."""

IMAGE_SCENARIOS = ("prefill", "images", "long_text", "decode", "turns", "capacity")

ENGINE_SCENARIOS = (*IMAGE_SCENARIOS, *VIDEO_SCENARIOS)
"""Scenarios in which the engines run side by side."""

ON_REQUEST = "elastic"
"""The scenario that runs only if it is named."""

SCENARIOS = (*ENGINE_SCENARIOS, "load", "cold_start", ON_REQUEST)

VIDEO = (16, 336)
"""Frames of a video, as the encoder computes them, and their height and width in pixels."""

SMALL_VIDEO = (16, 224)
"""The same of concurrent videos."""

VIDEO_BATCHES = (1, 4, 16)
"""Numbers of concurrent videos."""

VIDEO_NUM_SEQS = 96
"""Enough for scenario video_capacity."""

LONG_ROUNDS = 3
"""Limit on the rounds of scenarios whose rounds take minutes."""

MAX_NUM_SEQS = 64
"""Enough for every scenario with its default batches; larger batches raise it."""

TEXT_MARGIN = 128
"""Upper bound on the tokens of a question, the chat template and a short answer."""

FRAME_MARGIN = 24
"""Upper bound on the tokens of a frame's time in a prompt."""

GPU_MEMORY = 0.9
"""Share of a GPU's memory for all engines together."""


class TooLittleMemoryError(RuntimeError):
    """The KV caches are too small for a scenario's concurrent requests."""


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The given arguments; :func:`fill_defaults` completes them."""
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    numbers: dict[str, Any] = {"type": partial(_numbers, int), "metavar": "N,N"}
    add("--device", choices=("cpu", "gpu"), help="default: the installed vLLM's")
    add("--shape", choices=SHAPES, help="default: demo on a CPU, llava-1.5-7b on a GPU")
    names = f"of {', '.join(SCENARIOS)}; default: all of the shape's, without {ON_REQUEST}"
    add("--scenarios", nargs="+", choices=SCENARIOS, metavar="S", help=names)
    rounds = f"default 7; at most {LONG_ROUNDS} in long scenarios"
    add("--rounds", type=_number, default=7, help=rounds)
    add("--batches", **numbers, help="of prefill; default 1,4,16, or 1 for images of any size")
    add("--running", **numbers, default=(1, 32), help="batch sizes of decode")
    add("--tokens", type=_number, default=32, help="answer length in decode")
    add(
        "--rates",
        type=partial(_numbers, float),
        default=load.RATES,
        help="load over stock's throughput",
    )
    add("--clients", **numbers, default=load.CLIENTS, help="concurrent requests under load")
    add("--chat-tokens", type=_number, help="mean answer under load; 16 on CPU, 128 on GPU")
    add("--peers", action="store_true", help=f"also {PEER}, which prunes only in the encoder")
    compile_help = "use torch.compile and CUDA graphs; default: on a GPU"
    add("--compile", action=argparse.BooleanOptionalAction, help=compile_help)
    load_help = "seeded random weights, or vLLM's dummy weights; dummy for published shapes"
    add("--load-format", choices=("random", "dummy"), help=load_help)
    dtypes = ("bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, help="default: float32 on CPU, bfloat16 on GPU")
    add("--kv-cache-gib", type=_number, help="KV cache of each engine; on a GPU the free memory")
    add("--plot", type=Path, metavar="FILE.png", help="plot speed over ratio")
    arguments = parser.parse_args(argv)
    any_size = isinstance(SHAPES.get(arguments.shape), AnySizeShape)
    known = _scenarios(arguments.shape)
    if unknown := set(arguments.scenarios or ()) - set(known):
        parser.error(f"{arguments.shape} supports only {', '.join(known)}, not {min(unknown)}")
    if any_size and arguments.peers:
        parser.error(f"--peers is measured with LLaVA-1.5's shapes only, not {arguments.shape}")
    arguments.scenarios = [
        name for name in known if name in (arguments.scenarios or set(known) - {ON_REQUEST})
    ]
    arguments.batches = arguments.batches or ((1,) if any_size else (1, 4, 16))
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {arguments.plot.parent}")
    return arguments


def _scenarios(name: str | None) -> tuple[str, ...]:
    """Scenarios of a shape; ``None`` is the default shape."""
    shape = SHAPES.get(name or "demo")
    if not isinstance(shape, AnySizeShape):
        return (*IMAGE_SCENARIOS, "load", "cold_start", ON_REQUEST)
    return ("prefill", *(VIDEO_SCENARIOS if family_of(shape).video_marker else ()))


def _number(text: str, kind: type = int) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _numbers(kind: type, text: str) -> tuple[Any, ...]:
    return tuple(_number(part, kind) for part in text.split(","))


def fill_defaults(arguments: argparse.Namespace, device: Device) -> None:
    """Fill missing arguments with defaults for the device and the shape."""
    on_gpu = device == "gpu"
    shape = arguments.shape or ("llava-1.5-7b" if on_gpu else "demo")
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    has_small_kv = shape == "demo" or isinstance(SHAPES[shape], AnySizeShape)
    defaults = {
        "shape": shape,
        "dtype": dtype,
        "compile": on_gpu,
        "chat_tokens": 128 if on_gpu else 16,
        "kv_cache_gib": None if on_gpu else 2 if has_small_kv else 6 if dtype == "float32" else 3,
        "load_format": "dummy" if shape in PUBLISHED else "random",
    }
    arguments.device = device
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def engine_names(arguments: argparse.Namespace) -> tuple[EngineName, ...]:
    """The engines that run side by side."""
    if set(arguments.scenarios) & set(VIDEO_SCENARIOS):
        return STOCK, OURS, EVS
    return (STOCK, OURS, PEER) if arguments.peers else (STOCK, OURS)


def _concurrent_requests(arguments: argparse.Namespace, shape: Shape) -> dict[str, tuple[int, int]]:
    """Per chosen scenario: the largest number of concurrent requests, and the tokens of each."""
    prompt = shape.visual_tokens + TEXT_MARGIN
    requests = {
        "prefill": (max(arguments.batches), prompt),
        "images": (1, prompt + (max(prefill.IMAGES) - 1) * shape.visual_tokens),
        "long_text": (1, prompt + max(prefill.TEXT_TOKENS)),
        "decode": (max(arguments.running), prompt + arguments.tokens),
        "load": (max(arguments.clients), prompt + 2 * arguments.chat_tokens),
        "video_prefill": (1, _video_prompt(shape, VIDEO)),
        "video_turns": (1, _video_prompt(shape, VIDEO)),
        "video_decode": (
            *(max(VIDEO_BATCHES), _video_prompt(shape, SMALL_VIDEO) + arguments.tokens),
        ),
    }
    return {name: row for name, row in requests.items() if name in arguments.scenarios}


def _video_prompt(shape: Shape, video: tuple[int, int]) -> int:
    """Upper bound on the tokens of a prompt with a video of noise."""
    frames, size = video
    visual = replace(shape, image_size=size).visual_tokens
    return frames * (visual + FRAME_MARGIN) + TEXT_MARGIN


def engine_options(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, the same for all engines.

    A step has room for all concurrent prompts: the bench times kernels, not queues.
    """
    has_video = bool(set(arguments.scenarios) & set(VIDEO_SCENARIOS))
    num_seqs = VIDEO_NUM_SEQS if has_video else MAX_NUM_SEQS
    images = max(prefill.IMAGES) if "images" in arguments.scenarios else 1
    concurrent = _concurrent_requests(arguments, shape).values()
    prompt = shape.visual_tokens + TEXT_MARGIN
    longest = max(4096, prompt, *(tokens for _, tokens in concurrent))
    options: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": max([longest, *(n * tokens for n, tokens in concurrent)]),
        "max_num_seqs": max([num_seqs, *(number for number, _ in concurrent)]),
        "enforce_eager": not arguments.compile,
        "limit_mm_per_prompt": {"image": images, **({"video": 1} if has_video else {})},
    }
    if pruning := boundaries(shape):
        options[CONFIG_KEY] = pruning  # stock vLLM does not get it
    if arguments.load_format == "dummy":
        options["load_format"] = "dummy"
    if arguments.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = arguments.kv_cache_gib << 30
    if arguments.device == "gpu":
        options["gpu_memory_utilization"] = GPU_MEMORY / len(engine_names(arguments))
    return options


def check_kv_memory(
    arguments: argparse.Namespace, shape: Shape, kv_blocks: int, block_size: int
) -> None:
    """Check that stock vLLM's KV cache holds each scenario's concurrent requests, unpruned.

    Args:
        arguments: The bench's arguments.
        shape: The model's shape.
        kv_blocks: Number of blocks.
        block_size: Tokens per block.

    Raises:
        TooLittleMemoryError: If some requests would have to wait.
    """
    for scenario, (number, tokens) in _concurrent_requests(arguments, shape).items():
        room = kv_blocks // ceil(tokens / block_size)
        if number > room:
            raise TooLittleMemoryError(
                f"scenario {scenario} runs {number} requests at once, and stock vLLM has KV memory "
                f"for {room}: raise --kv-cache-gib, lower --batches, --running or --clients, or "
                "run this scenario without --peers"
            )
