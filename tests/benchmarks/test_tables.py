"""Tables of rows, for the terminal and in Markdown."""

import json

from benchmarks.tables import cells, markdown, print_document

ROWS = [
    {"ratio": "2/3", "speed_up": 2.345, "speed_up_spread": [2.1, 2.61], "same": True},
    {"ratio": "8/9", "stock_ms": 1234.5, "stages": [172, 77, 15], "share": 0.0007},
]


def test_cells():
    headings, first, second = cells(ROWS)
    assert headings == ["ratio", "speed up", "same", "stock ms", "stages", "share"]
    assert first == ["2/3", "2.35 (2.1 to 2.61)", "yes", "", "", ""]
    assert second == ["8/9", "", "", "1234", "172, 77, 15", "0.07 %"]


def test_markdown():
    assert markdown(ROWS[:1]).splitlines() == [
        "| ratio | speed up | same |",
        "| --- | --- | --- |",
        "| 2/3 | 2.35 (2.1 to 2.61) | yes |",
    ]


def test_the_last_line_is_the_document(capsys):
    document = {
        "conditions": {"engines": {"stock": {"block_size": 128}}, "shape": "demo"},
        "prefill": ROWS,
        "goals": {"prefill_vs_ideal": {"figure": 0.9, "goal": ">= 1.0", "met": False}},
    }
    print_document(document)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == document
    for text in (
        "engines",
        "block size",
        "prefill",
        "2.35 (2.1 to 2.61)",
        "prefill_vs_ideal",
        "no",
    ):
        assert text in out
