"""docs/results.md is made from the measured documents."""

import json
import re

import pytest

from benchmarks.results import DOCS, render


def test_the_page_is_up_to_date():
    assert (DOCS / "results.md").read_text() == render(), "run python -m benchmarks.results"


def test_every_run_is_shown():
    shown = {run for run, _ in re.findall(r"\{\{ (\S+) (\S+) \}\}", template())}
    assert shown == {path.stem for path in (DOCS / "results").glob("*.json")}


def test_the_template_has_no_table_of_figures():
    for table in re.findall(r"(?:^\|.*\n)+", template(), re.MULTILINE):
        assert table.startswith("| scenario |")


def template() -> str:
    return (DOCS / "results" / "template.txt").read_text()


def test_a_bench_s_document_fills_the_template(tmp_path):
    document = {
        "conditions": {
            "command": "make bench",
            "processor": "p",
            "cpus": 2,
            "vllm": "0.32.0",
            "model": "m",
            "load_format": "random",
            "options": {"dtype": "float32"},
            "rounds": 7,
        },
        "prefill": [{"ratio": "8/9", "batch": 1, "vs_ideal": 0.9, "vs_ideal_spread": [0.8, 1.0]}],
        "goals": {"prefill_vs_ideal": {"figure": 0.9, "goal": ">= 1.0", "met": False}},
    }
    (tmp_path / "run.json").write_text(json.dumps(document))
    places = "\n".join(f"{{{{ run {name} }}}}" for name in ("conditions", "goals", "prefill"))
    (tmp_path / "template.txt").write_text(places)
    page = render(tmp_path)
    assert "- Command: `make bench`\n- Machine: 2 cores of p; vllm 0.32.0\n" in page
    assert "- Model: m; weights: random, float32\n- Rounds: 7\n" in page
    assert "**Met**: nothing.\n**Missed**: prefill vs ideal 0.9 (>= 1.0)." in page
    assert "| 8/9 | 1 | 0.9 (0.8 to 1) |" in page


@pytest.mark.parametrize(("text", "error"), [("{{ run x }}", KeyError), ("{{ no x }}", OSError)])
def test_unknown_runs_and_rows_are_errors(text, error, tmp_path):
    (tmp_path / "run.json").write_text('{"conditions": {}}')
    (tmp_path / "template.txt").write_text(text)
    with pytest.raises(error):
        render(tmp_path)
