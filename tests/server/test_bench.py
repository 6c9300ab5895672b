"""``vitcop-bench``, against a real server."""

import json
from pathlib import Path
from typing import Any

import pytest

from vitcop_server import bench


def test_flags_of_vllm_s_benchmark_are_passed_on() -> None:
    arguments, flags = bench.parse_arguments(["--ratios", "0", "8/9", "--num-prompts", "5"])
    assert (arguments.ratios, arguments.rounds) == (["0", "8/9"], 3)
    assert flags == ["--num-prompts", "5"]
    other, _ = bench.parse_arguments([])
    assert other.seed != arguments.seed, "servers would have the images of an earlier call"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ratios", "0", "much"], "numbers or fractions, such as 0.889 or 8/9; got much"),
        (["--ratios", "1/0"], "got 1/0"),
        (["--rounds", "0"], "1 or more"),
        (["--seed", "-1"], "from 0 to 2147483647"),
    ],
)
def test_wrong_arguments_are_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.parse_arguments(argv)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("stock_url", [None, "http://stock"])
def test_ratios_take_turns_and_are_compared_within_a_round(
    stock_url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, str, int]] = []
    speed = {"0": 4.0, "8/9": 10.0, bench.STOCK: 5.0}

    def run(url: str, ratio: str, seed: int, flags: Any) -> dict[str, float]:
        slow = 1 + len(runs) // (3 if stock_url else 2)  # later rounds are slower for all
        runs.append((url, ratio, seed))
        return dict.fromkeys(bench.FIGURES, 1.0) | {"requests_per_second": speed[ratio] / slow}

    monkeypatch.setattr(bench, "run_benchmark", run)
    argv = ["--base-url", "http://ours", "--ratios", "0", "8/9", "--rounds", "2"]
    argv += ["--seed", "7"]
    arguments, _ = bench.parse_arguments(argv + (["--stock-url", stock_url] if stock_url else []))
    rows = {row["ratio"]: row for row in bench.measure(arguments, [])}
    base = speed[bench.STOCK if stock_url else "0"]
    assert {name: row["throughput"] for name, row in rows.items()} == {
        name: speed[name] / base for name in rows
    }
    assert rows["8/9"]["requests_per_second"] == 7.5
    assert runs[0][1] != runs[len(rows)][1], "another ratio begins the second round"
    assert [seed for *_, seed in runs] == [*range(7, 7 + len(runs))], "a cache would hold images"
    assert all((url == "http://stock") == (ratio == bench.STOCK) for url, ratio, _ in runs)


@pytest.mark.slow
def test_a_running_server_is_measured(
    server_url: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base-url", server_url, "--ratios", "0", "8/9", "--rounds", "1"]
    flags = ["--tokenizer", str(checkpoint), "--num-prompts", "4", "--random-output-len", "3"]
    assert bench.main([*argv, *flags]) == 0
    *table, document = capsys.readouterr().out.splitlines()
    rows = json.loads(document)["bench"]
    assert [row["ratio"] for row in rows] == ["0", "8/9"]
    assert all(row["requests_per_second"] > 0 and row["ttft_p50_ms"] > 0 for row in rows)
    assert rows[0]["throughput"] == 1.0
    assert len(table) == 3


@pytest.mark.slow
def test_failed_requests_end_the_run(
    server_url: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server refuses a ratio above its largest."""
    argv = ["--base-url", server_url, "--ratios", "0.99", "--rounds", "1", "--num-prompts", "2"]
    assert bench.main([*argv, "--tokenizer", str(checkpoint)]) == 1
    assert capsys.readouterr().err == "2 requests failed: Bad Request\n"
