"""An image comes out, with what was measured and nothing else."""

from PIL import Image

from benchmarks.speed_plot import plot_speed

CONDITIONS = {"shape": "demo", "device": "cpu", "processor": "p", "device_name": "cpu"}
ORANGE, BLUE = bytes.fromhex("D55E00"), bytes.fromhex("0072B2")


def prefill(batch: int, selector: str = "vitcop"):
    return [
        {"selector": selector, "ratio": ratio, "batch": batch, "ideal": s + 0.2}
        | {"speed_up": s, "speed_up_spread": [s - 0.1, s + 0.3]}
        for ratio, s in (("2/3", 2.0), ("8/9", 4.0))
    ]


LOAD = [
    {"rate": rate, "clients": 32, "throughput": s, "throughput_spread": [s - 0.2, s], "ideal": 4.0}
    for rate, s in ((0.5, 1.0), (8.0, 3.0))
]
CLIENTS = [row | {"clients": 16, "ratio": r} for row, r in zip(LOAD, ("0", "mixed"), strict=True)]


def colours(path) -> set[bytes]:
    with Image.open(path) as image:
        assert (image.format, image.width) == ("PNG", 1200)
        pixels = image.convert("RGB").tobytes()
    return {pixels[i : i + 3] for i in range(0, len(pixels), 3)}


def drawn(path, **scenarios) -> set[bytes]:
    assert plot_speed({"conditions": CONDITIONS, **scenarios}, path)
    return colours(path)


def test_each_batch_has_its_curve(tmp_path):
    path = tmp_path / "speed.png"
    one, two = prefill(1), prefill(16)
    assert {ORANGE, BLUE} & drawn(path, prefill=one) == {ORANGE}
    assert {ORANGE, BLUE} <= drawn(path, prefill=one + two)
    assert {ORANGE, BLUE} & drawn(path, prefill=one + prefill(16, "cls")) == {ORANGE}


def test_load_and_clients_have_their_panels(tmp_path):
    sizes = []
    for number, scenarios in enumerate(
        ({"load": LOAD}, {"clients": CLIENTS}, {"load": LOAD, "clients": CLIENTS})
    ):
        path = tmp_path / f"{number}.png"
        assert ORANGE in drawn(path, **scenarios)
        sizes.append(path.read_bytes())
    assert len(set(sizes)) == 3


def test_nothing_to_draw_leaves_the_image_alone(tmp_path):
    path = tmp_path / "speed.png"
    path.write_bytes(b"before")
    assert not plot_speed({"conditions": CONDITIONS, "prefill": [], "turns": [{}]}, path)
    assert path.read_bytes() == b"before"
