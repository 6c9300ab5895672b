"""``python -m benchmarks.bench``: what pruning saves, beside what it should save.

Stock vLLM and ours run the same images with the same random weights in the same process
layout, in alternating rounds; figures are medians over rounds. The *ideal* counts tokens: the
encoder costs both what it was measured to cost stock, the decoder costs each layer its tokens,
a decode step what it costs stock with as many tokens before it.
*vs-rows* compares with what stock vLLM itself takes for text prompts of as many rows per
layer: a kernel that is slow for few rows is slow for both. KV memory has an ideal too: no
blocks, and no whole requests. *vs-cls* is ours over an engine that prunes in the encoder alone
(--peers), at the same layer average; *vs-pixels*, for models that take images of any size, is
ours over stock vLLM on images that max_pixels scales down to about as many visual tokens. That
saves the encoder's work, too, which pruning does not, and the model sees less of an image. Prefix
caching is on, as is vLLM's default; only a second turn asks about an image that was seen before.

The last line of standard output is a JSON document.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import load, prefill, scenarios
from benchmarks.bench_options import (
    COLD_START,
    TooLittleMemoryError,
    check_room,
    engine_names,
    engine_options,
    parse_arguments,
    settle_defaults,
    write_checkpoint,
)
from benchmarks.cold_start import measure_cold_start
from benchmarks.conditions import WrongDeviceError, machine, settle_device
from benchmarks.engines import STOCK, EngineDiedError, EngineProcess, running_engines
from benchmarks.goals import goals_met
from benchmarks.rounds import LONG_ROUNDS, Rounds, Row
from benchmarks.shapes import SHAPES
from benchmarks.speed_plot import plot_speed
from benchmarks.tables import table_lines


@dataclass(frozen=True)
class Scenario:
    """Something engines do in turn.

    Attributes:
        measure: Its rows.
        series: How many times it goes through its rounds.
        long: Whether a round takes minutes; then there are :data:`LONG_ROUNDS` at most.
    """

    measure: Callable[[Rounds, argparse.Namespace], list[Row]]
    series: Callable[[argparse.Namespace], int]
    long: bool = False

    def rounds(self, arguments: argparse.Namespace) -> int:
        """Rounds in all."""
        number = min(arguments.rounds, LONG_ROUNDS) if self.long else arguments.rounds
        return number * self.series(arguments)


Case = tuple[Any, ...]


def _by_case(
    measure: Callable[..., list[Row]],
    cases: Callable[[argparse.Namespace], Sequence[Case]],
    *,
    long: bool = False,
) -> Scenario:
    """A scenario that goes through its rounds once for each case."""
    return Scenario(
        lambda rounds, arguments: [
            row for case in cases(arguments) for row in measure(rounds, *case)
        ],
        lambda arguments: len(cases(arguments)),
        long,
    )


SCENARIOS = {
    "prefill": _by_case(
        prefill.measure_prefill,
        lambda arguments: prefill.cases(SHAPES[arguments.shape], arguments.batches),
    ),
    "images": _by_case(
        prefill.measure_images,
        lambda _: [(r, images) for images in prefill.IMAGES for r in prefill.LONG_RATIOS],
    ),
    "long_text": _by_case(
        prefill.measure_long_text,
        lambda _: [(r, tokens) for tokens in prefill.TEXT_TOKENS for r in prefill.LONG_RATIOS],
    ),
    "decode": _by_case(
        scenarios.measure_decode,
        lambda arguments: [
            (r, running, arguments.tokens)
            for r in scenarios.DECODE_RATIOS
            for running in arguments.running
        ],
    ),
    "turns": _by_case(scenarios.measure_turns, lambda _: [(r,) for r in scenarios.TURN_RATIOS]),
    "capacity": _by_case(
        scenarios.measure_capacity, lambda _: [(r,) for r in scenarios.CAPACITY_RATIOS]
    ),
    "load": Scenario(
        lambda rounds, arguments: load.measure_load(rounds, arguments.rates, arguments.chat_tokens),
        lambda arguments: len(arguments.rates),
        long=True,
    ),
    "clients": _by_case(
        load.measure_clients,
        lambda arguments: [(clients, arguments.chat_tokens) for clients in arguments.clients],
        long=True,
    ),
}


def measure(
    arguments: argparse.Namespace,
    checkpoint: Path,
    options: dict[str, Any],
    measured: dict[str, Any],
) -> None:
    """Add rows by scenario, and what the engines tell of themselves, to ``measured``.

    Raises:
        TooLittleMemoryError: If requests that are to run at once cannot.
        EngineDiedError: If an engine's process died; what was measured before is there.
    """
    shape = SHAPES[arguments.shape]
    chosen = {name: SCENARIOS[name] for name in arguments.scenarios if name != COLD_START}
    total = sum(scenario.rounds(arguments) for scenario in chosen.values())
    if COLD_START in arguments.scenarios:
        total += min(arguments.rounds, LONG_ROUNDS)
    batches = {1}
    batches |= {*arguments.batches} if "prefill" in chosen else set()
    batches |= {*arguments.running} if "decode" in chosen else set()
    with tqdm(total=total, desc="rounds") as bar:
        if chosen:
            with running_engines(checkpoint, options, engine_names(arguments)) as engines:
                measured["engines"] = {
                    name: engine.run("about") for name, engine in engines.items()
                }
                stock = measured["engines"][STOCK]
                check_room(arguments, shape, stock["kv_blocks"], stock["block_size"])
                rounds = Rounds(
                    engines,
                    shape,
                    arguments.rounds,
                    bar,
                    watch_apart=arguments.device == "gpu",
                )
                for batch in sorted(batches):  # caches, allocators and lazy kernels
                    rounds.serve(rounds.asks(batch, 8 / 9, 4))
                    rounds.serve(rounds.asks(batch, 0.0, 4))
                for name, scenario in chosen.items():
                    bar.set_postfix_str(name)
                    measured[name] = scenario.measure(rounds, arguments)
        if COLD_START in arguments.scenarios:
            bar.set_postfix_str(COLD_START)
            start = partial(EngineProcess, checkpoint, options)
            measured[COLD_START] = measure_cold_start(start, arguments.rounds, bar)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv, __doc__)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.platforms import current_platform

    measured: dict[str, Any] = {}
    died = None
    try:
        settle_defaults(arguments, settle_device(arguments.device, current_platform.device_type))
        shape = SHAPES[arguments.shape]
        options = engine_options(arguments, shape)
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            checkpoint.mkdir()
            write_checkpoint(checkpoint, shape, options)
            try:
                measure(arguments, checkpoint, options, measured)
            except EngineDiedError as error:
                died = str(error)
    except (WrongDeviceError, TooLittleMemoryError) as error:
        print(error, file=sys.stderr)
        return 2
    document: dict[str, Any] = {
        "conditions": {
            **machine(),
            "device": arguments.device,
            "device_name": current_platform.get_device_name(),
            "shape": arguments.shape,
            "load_format": arguments.load_format,
            "compiled": arguments.compile,
            "rounds": arguments.rounds,
            "chat_tokens": arguments.chat_tokens,
            "options": options,
            "engines": measured.pop("engines", {}),
        },
        **measured,
        **({"died": died} if died else {}),
    }
    document["goals"] = goals_met(document)
    print(*table_lines(document), sep="\n")
    print(json.dumps(document), flush=True)
    if died:
        print(f"{died}. Above is what was measured before.", file=sys.stderr)
        return 1
    if arguments.plot is not None:
        plot_speed(document, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
