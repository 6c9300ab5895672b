"""Plots have a curve or panel for each measured figure, and no other."""

import json
from typing import Any

from PIL import Image

from benchmarks.plots import plot_accuracy as plot
from benchmarks.plots import plot_speed
from benchmarks.results import DOCS


def document(*selectors: str, families: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    def row(number: int, name: str, **labels: str) -> dict[str, Any]:
        figures = {
            "2/3": 80.0 - 15 * number,
            "2/3_spread": [50, 95],
            "8/9": 40.0,
            "8/9_spread": [9, 80],
        }
        unpruned = {} if number else {"0": 95.0, "0_spread": [80, 99]}
        return {"selector": name, **labels, **unpruned, **figures}

    rows = list(enumerate(selectors))
    return {
        "conditions": {"model": "m"},
        "answers": [row(number, name) for number, name in rows],
        "families": [row(number, name, family=f) for number, name in rows for f in families],
    }


def colours(path) -> set[bytes]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        pixels = image.convert("RGB").tobytes()
    return {pixels[i : i + 3] for i in range(0, len(pixels), 3)}


VITCOP, CLS = bytes.fromhex("D55E00"), bytes.fromhex("0072B2")


def test_each_selector_has_its_curve(tmp_path):
    plot(document("vitcop", "cls"), tmp_path / "both.png")
    assert {VITCOP, CLS} <= colours(tmp_path / "both.png")
    plot(document("cls"), tmp_path / "one.png")
    seen = colours(tmp_path / "one.png")
    assert CLS in seen
    assert VITCOP not in seen


def test_families_have_their_own_panels(tmp_path):
    plot(document("vitcop", families=("a",)), tmp_path / "1.png")
    plot(document("vitcop", families=("a", "b", "c", "d", "e")), tmp_path / "5.png")
    with Image.open(tmp_path / "1.png") as one, Image.open(tmp_path / "5.png") as five:
        assert five.height > one.height


def test_answers_alone_are_enough(tmp_path):
    recorded = json.loads((DOCS / "results" / "answers.json").read_text())
    plot(recorded, tmp_path / "recorded.png")
    assert {VITCOP, CLS} <= colours(tmp_path / "recorded.png")


CONDITIONS = {"shape": "demo", "device": "cpu", "processor": "p", "device_name": "cpu"}


def prefill(batch: int, selector: str = "vitcop"):
    return [
        {"selector": selector, "ratio": ratio, "batch": batch, "ideal": s + 0.2}
        | {"speed_up": s, "speed_up_spread": [s - 0.1, s + 0.3]}
        for ratio, s in (("2/3", 2.0), ("8/9", 4.0))
    ]


CLIENTS = [
    {"ratio": ratio, "clients": 32, "throughput": s, "throughput_spread": [s - 0.2, s]}
    | {"ideal": 4.0}
    for ratio, s in (("0", 1.0), ("8/9", 3.0), ("mixed", 2.0))
]
ARRIVALS = [
    row | {"ratio": "8/9", "rate": rate} for row, rate in zip(CLIENTS, (0.5, 8.0), strict=False)
]


def drawn(path, **scenarios) -> set[bytes]:
    assert plot_speed({"conditions": CONDITIONS, **scenarios}, path)
    return colours(path)


def test_each_batch_of_our_prefill_has_its_curve(tmp_path):
    path = tmp_path / "speed.png"
    one, two = prefill(1), prefill(16)
    assert {VITCOP, CLS} & drawn(path, prefill=one) == {VITCOP}
    assert {VITCOP, CLS} <= drawn(path, prefill=one + two)
    assert {VITCOP, CLS} & drawn(path, prefill=one + prefill(16, "cls")) == {VITCOP}


def test_clients_and_arrivals_have_their_panels(tmp_path):
    sizes = []
    for number, load in enumerate((CLIENTS, ARRIVALS, CLIENTS + ARRIVALS)):
        path = tmp_path / f"{number}.png"
        assert VITCOP in drawn(path, load=load)
        sizes.append(path.read_bytes())
    assert len(set(sizes)) == 3


def test_without_figures_no_plot_is_written(tmp_path):
    path = tmp_path / "speed.png"
    path.write_bytes(b"before")
    assert not plot_speed({"conditions": CONDITIONS, "prefill": [], "turns": [{}]}, path)
    assert path.read_bytes() == b"before"
