"""``make gpu-check``: all checks that need a GPU, in about 15 minutes.

Each check runs in its own process. The program prints whether each check passed; the last line
is one JSON document, with the figures of the benches. Exit status 1 if a check failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

TAIL_CHARACTERS = 4000
"""Characters of a check's output to print, from its end."""

ENGINE_TESTS = (
    "tests/families/test_against_oracle.py",
    "tests/families/test_against_stock.py",
    "tests/families/test_mixed_batch.py",
    "tests/families/test_prefix_caching.py",
    "tests/engine/test_against_oracle.py",
    "tests/engine/test_selectors.py",
)
"""Tests that use an engine through ``LLM`` only, so they run with either model runner."""


@dataclass(frozen=True)
class Check:
    """A command with exit status 0 on success.

    Attributes:
        name: The property that it checks.
        command: Arguments of the Python interpreter.
        environment: Variables added to this process's environment.
        timeout_s: Time limit in seconds.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    timeout_s: int = 300


def pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-n", "0", "-x", *arguments)


def traffic(*arguments: str) -> tuple[str, ...]:
    return ("-m", "tests.engine.gpu_traffic", *arguments)


RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
}
NO_SYNC = {"VLLM_GPU_SYNC_CHECK": "error"}

CHECKS = (
    Check("an NVIDIA GPU that vLLM runs on", traffic("--device-only"), timeout_s=180),
    Check(
        "imports leave torch's CUDA functions alone",
        pytest("tests/test_imports.py", "-k", "cuda_path"),
    ),
    Check("Triton kernels select as torch does", pytest("tests/pruning/test_kernels.py")),
    *(
        Check(
            f"runner {name}: tokens of the dense oracle and of stock vLLM, float32",
            pytest(*ENGINE_TESTS),
            runner,
            timeout_s=420,
        )
        for name, runner in RUNNERS.items()
    ),
    *(
        Check(
            f"runner {name}: no host synchronisation in mixed traffic, {how}",
            traffic(*options),
            {**runner, **NO_SYNC},
        )
        for name, runner in RUNNERS.items()
        for how, options in (
            ("default backend, compiled, CUDA graphs", ()),
            ("Triton kernels for the selection", ("--kernels", "triton")),
            ("eager", ("--eager",)),
        )
    ),
    *(
        Check(
            f"runner {name}: figures of a short bench",
            (
                *("-m", "benchmarks.bench", "--device", "gpu", "--shape", "small"),
                *("--scenarios", "prefill", "decode", "--rounds", "3", "--batches", "1,16"),
            ),
            runner,
            timeout_s=420,
        )
        for name, runner in RUNNERS.items()
    ),
)


def run(check: Check, *, verbose: bool) -> dict[str, object]:
    """Run a check and print its outcome.

    Returns:
        ``name``, ``passed``, ``seconds``, and for a bench ``figures``: the JSON document on its
        last line.
    """
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *check.command],
            cwd=ROOT,
            env={**os.environ, **check.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=check.timeout_s,
            check=False,
        )
        output, passed = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, passed = f"{error.output or ''}\nstopped after {check.timeout_s} s", False
    seconds = round(time.monotonic() - began)
    print(f"{'passed' if passed else 'FAILED'}  {seconds:4d} s  {check.name}", flush=True)
    if verbose or not passed:
        print(output[-TAIL_CHARACTERS:], flush=True)
    result: dict[str, object] = {"name": check.name, "passed": passed, "seconds": seconds}
    last = output.strip().rpartition("\n")[2]
    if last.startswith("{"):
        result["figures"] = json.loads(last)
    return result


def main(argv: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--only", default="", help="run checks whose name contains this text")
    parser.add_argument("--verbose", action="store_true", help="print every check's output")
    options = parser.parse_args(argv)
    results = []
    for check in checks:
        if options.only not in check.name:
            continue
        results.append(run(check, verbose=options.verbose))
        if check is checks[0] and not results[0]["passed"]:
            break  # without a GPU no other check can pass
    failed = [result["name"] for result in results if not result["passed"]]
    print(json.dumps({"failed": failed, "checks": results}))
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
