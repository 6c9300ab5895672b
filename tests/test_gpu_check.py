"""``make gpu-check`` on a machine without a GPU."""

import json

import pytest
import torch

from tests.gpu_check import CHECKS, ENGINE_TESTS, ROOT, Check, main


def test_without_a_gpu_the_run_stops_after_the_first_check(capfd):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert any("No NVIDIA GPU" in line for line in lines)
    result = json.loads(lines[-1])
    assert result["failed"] == [CHECKS[0].name]
    assert len(result["checks"]) == 1


def test_a_check_passes_fails_or_times_out(capfd):
    checks = [
        Check("fine", ("-c", 'print("{\\"speed\\": 4.5}")')),
        Check("wrong", ("-c", "raise SystemExit('why it failed')")),
        Check("slow", ("-c", "import time; time.sleep(60)"), timeout_s=1),
        Check("with its environment", ("-c", "import os; os.environ['A']"), {"A": "1"}),
    ]
    assert main([], checks) == 1
    out = capfd.readouterr().out
    assert "why it failed" in out
    assert "stopped after 1 s" in out
    document = json.loads(out.splitlines()[-1])
    assert document["failed"] == ["wrong", "slow"]
    assert document["checks"][0]["figures"] == {"speed": 4.5}
    assert main(["--only", "fine"], checks) == 0
    assert main(["--only", "no such check"], checks) == 1


def test_every_check_names_files_and_options_that_exist():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for check in CHECKS:
        for argument in check.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument).exists()
    assert all((ROOT / path).exists() for path in ENGINE_TESTS)


def test_bench_options_and_environment_variables_exist(monkeypatch):
    from vllm import envs

    from benchmarks.bench_options import parse_arguments

    (bench,) = {check.command for check in CHECKS if "benchmarks.bench" in check.command}
    assert parse_arguments(bench[2:], None).shape == "small"
    for check in CHECKS:
        assert check.environment.keys() <= envs.environment_variables.keys()
        for key, value in check.environment.items():
            monkeypatch.setenv(key, value)
            envs.environment_variables[key]()  # raises for an unknown value
