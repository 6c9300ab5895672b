"""``python -m benchmarks.bench``: measured speed-up of pruning, beside its ideal.

Stock vLLM and ours run in separate processes, with the same images and the same random weights, and
take turns; figures are medians over rounds. Each scenario's module defines its figures and its
*ideal*: prefill, images and long_text in prefill.py, decode, turns and capacity in scenarios.py,
load in load.py, cold_start in cold_start.py. Scenarios video_* have a video in each prompt, and
stock vLLM with its own pruning of videos beside. Prefix caching is on, as is vLLM's default; only
second turns repeat an image or a video. Scenario elastic, in elastic.py, has our server alone, and
runs only if it is named.

The last line of standard output is a JSON document, as docs/results/ holds them.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import prefill, scenarios
from benchmarks.bench_options import (
    ENGINE_SCENARIOS,
    LONG_ROUNDS,
    SMALL_VIDEO,
    VIDEO,
    VIDEO_BATCHES,
    VIDEO_SCENARIOS,
    TooLittleMemoryError,
    check_kv_memory,
    engine_names,
    engine_options,
    fill_defaults,
    parse_arguments,
)
from benchmarks.cold_start import measure_cold_start
from benchmarks.conditions import WrongDeviceError, command, machine, resolve_device
from benchmarks.elastic import elastic_options, measure_elastic
from benchmarks.engines import STOCK, EngineDiedError, EngineProcess, running_engines
from benchmarks.goals import check_goals
from benchmarks.load import measure_load
from benchmarks.plots import plot_speed
from benchmarks.rounds import Rounds, Row
from benchmarks.serving import ServerError
from benchmarks.shapes import SHAPES, describe, write_checkpoint
from benchmarks.tables import print_document
from benchmarks.traffic import both_servers, server_of
from vitcop_server.bench import RequestsFailedError

Case = Mapping[str, Any]


def engine_cases(
    name: str, arguments: argparse.Namespace
) -> tuple[Callable[..., list[Row]], Sequence[Case]]:
    """The function that measures a scenario, and its arguments for each case."""
    batches = VIDEO_BATCHES if name in VIDEO_SCENARIOS else arguments.running
    decode = [
        {"ratio": ratio, "running": running, "tokens": arguments.tokens}
        for ratio, running in product(scenarios.DECODE_RATIOS, batches)
    ]
    cases: dict[str, tuple[Callable[..., list[Row]], Sequence[Case]]] = {
        "prefill": (
            prefill.measure_prefill,
            prefill.prefill_cases(SHAPES[arguments.shape], arguments.batches),
        ),
        "images": (prefill.measure_prefill, prefill.IMAGE_CASES),
        "long_text": (prefill.measure_prefill, prefill.LONG_TEXT_CASES),
        "video_prefill": (prefill.measure_prefill, prefill.VIDEO_CASES),
        "decode": (scenarios.measure_decode, decode),
        "turns": (scenarios.measure_turns, [{"ratio": r} for r in scenarios.TURN_RATIOS]),
        "capacity": (scenarios.measure_capacity, [{"ratio": r} for r in scenarios.CAPACITY_RATIOS]),
    }
    return cases.get(name) or cases[name.removeprefix("video_")]


def measure(
    arguments: argparse.Namespace,
    checkpoint: Path,
    options: dict[str, Any],
    measured: dict[str, Any],
) -> None:
    """Add each scenario's rows, and the engines' descriptions, to ``measured``.

    Raises:
        TooLittleMemoryError: If a scenario's concurrent requests do not fit into KV memory.
        EngineDiedError: If an engine's process died; ``measured`` holds the earlier rows, also
            after the next two.
        ServerError: If a server did not start.
        RequestsFailedError: If a request over HTTP failed.
    """

    def add(name: str, rows: Iterable[Row]) -> None:
        for row in rows:  # kept if a later case fails
            measured.setdefault(name, []).append(row)

    shape = SHAPES[arguments.shape]
    in_engines = [name for name in arguments.scenarios if name in ENGINE_SCENARIOS]
    if in_engines:
        with running_engines(checkpoint, options, engine_names(arguments)) as engines:
            about = {name: engine.run("about") for name, engine in engines.items()}
            measured["engines"] = about
            check_kv_memory(arguments, shape, about[STOCK]["kv_blocks"], about[STOCK]["block_size"])
            on_gpu = arguments.device == "gpu"
            rounds = Rounds(engines, shape, arguments.rounds, profile_apart=on_gpu)
            for name in in_engines:
                run, cases = engine_cases(name, arguments)
                shown = rounds
                if name in VIDEO_SCENARIOS:
                    concurrent = name in ("video_decode", "video_capacity")
                    shown = rounds.showing(*(SMALL_VIDEO if concurrent else VIDEO), is_video=True)
                for case in tqdm(cases, name):
                    add(name, run(shown, **case))
    long_rounds = min(arguments.rounds, LONG_ROUNDS)
    if "load" in arguments.scenarios:
        with both_servers({"model": str(checkpoint), **options}) as (stock, ours):
            load = measure_load(
                ours,
                stock,
                rounds=long_rounds,
                answer_tokens=arguments.chat_tokens,
                clients=arguments.clients,
                rates=arguments.rates,
            )
            add("load", load)
    if "elastic" in arguments.scenarios:
        clients = max(arguments.clients)
        config = {"model": str(checkpoint), **options, **elastic_options(clients)}
        with server_of(config) as ours:
            elastic = measure_elastic(
                ours, rounds=long_rounds, answer_tokens=arguments.chat_tokens, clients=clients
            )
            add("elastic", elastic)
    if "cold_start" in arguments.scenarios:
        start = partial(EngineProcess, checkpoint, options)
        add("cold_start", measure_cold_start(start, long_rounds))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv, __doc__)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.platforms import current_platform

    measured: dict[str, Any] = {}
    died = None
    try:
        fill_defaults(arguments, resolve_device(arguments.device, current_platform.device_type))
        shape = SHAPES[arguments.shape]
        options = engine_options(arguments, shape)
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch)
            write_checkpoint(checkpoint, shape, options)
            try:
                measure(arguments, checkpoint, options, measured)
            except (EngineDiedError, RequestsFailedError, ServerError) as error:
                died = str(error)
    except (WrongDeviceError, TooLittleMemoryError) as error:
        print(error, file=sys.stderr)
        return 2
    names = "device", "shape", "load_format", "compile", "rounds", "chat_tokens"
    conditions = {
        "command": command("make bench", argv),
        **machine(),
        "model": describe(shape),
        "device_name": current_platform.get_device_name(),
        **{name: getattr(arguments, name) for name in names},
        "options": options,
        "engines": measured.pop("engines", {}),
    }
    document = {"conditions": conditions, **measured, **({"died": died} if died else {})}
    document["goals"] = check_goals(document)
    print_document(document)
    if died:
        print(f"{died}. The figures above were measured before.", file=sys.stderr)
        return 1
    if arguments.plot is not None:
        plot_speed(document, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
