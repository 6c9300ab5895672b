"""The bench's document, with fake engines and with real ones."""

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import bench, cold_start, prefill, scenarios
from benchmarks.bench_options import ENGINE_SCENARIOS, SCENARIOS, VIDEO_SCENARIOS
from benchmarks.engines import EVS, OURS, PEER, STOCK, EngineDiedError, running_engines
from benchmarks.goals import GOALS
from benchmarks.qwen_checkpoint import SMALL, save_random_qwen
from benchmarks.rounds import SCALED_DOWN, Rounds
from benchmarks.serving import ServerError
from benchmarks.shapes import SHAPES
from tests.benchmarks.fake_engines import FakeEngine
from tests.checkpoints import tiny
from tests.engine.child import CONTEXT
from vitcop_server.bench import RequestsFailedError
from vitcop_vllm.demo.checkpoint import DEMO, TINY, save_config

IMAGE_SCENARIOS = [name for name in SCENARIOS if name not in VIDEO_SCENARIOS]
BY_DEFAULT = [name for name in IMAGE_SCENARIOS if name != "elastic"]


def test_another_device_is_refused_before_an_engine_starts(capsys):
    # The tests run on vLLM's CPU build.
    assert bench.main(["--device", "gpu"]) == 2
    assert "make install DEVICE=gpu" in capsys.readouterr().err


LOAD = [
    {"clients": 32, "ratio": "mixed", "rate": 8.0, "throughput": 4.5, "ttft_p99": 0.5}
    | {"throughput_spread": [4.4, 4.6], "ideal": 4.6}
]
LOAD = [{k: v for k, v in LOAD[0].items() if k != "rate"}, LOAD[0]]


@pytest.fixture
def fakes(monkeypatch):
    """Replaces the bench's engines and servers."""

    @contextmanager
    def running(model, options, names):
        assert (model / "config.json").exists()
        yield {name: FakeEngine(name, DEMO) for name in names}

    monkeypatch.setattr(bench, "running_engines", running)
    monkeypatch.setattr(bench, "EngineProcess", lambda model, options, name: FakeEngine(name, DEMO))

    @contextmanager
    def servers(config):
        assert config["kv_cache_memory_bytes"]
        yield "stock", "ours"

    def measure_load(ours, stock, *, rounds, answer_tokens, clients, rates):
        assert (ours, stock, answer_tokens) == ("ours", "stock", 16)
        assert rounds <= 3
        return [dict(LOAD[0], clients=number) for number in clients] + LOAD

    @contextmanager
    def server(config):
        assert config["server"]["elastic"]["waiting"] == [4, config["max_num_seqs"]]
        yield "ours"

    def measure_elastic(ours, *, rounds, answer_tokens, clients):
        assert (ours, answer_tokens, clients) == ("ours", 16, 32)
        return [{"clients": clients, "ratio": "elastic", "refused": 0}]

    monkeypatch.setattr(bench, "server_of", server)
    monkeypatch.setattr(bench, "measure_elastic", measure_elastic)
    monkeypatch.setattr(bench, "both_servers", servers)
    monkeypatch.setattr(bench, "measure_load", measure_load)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("peers", [False, True])
def test_the_last_line_is_the_document_of_all_scenarios(peers, capsys, tmp_path):
    argv = ["--shape", "demo", "--load-format", "dummy", "--rounds", "2", "--batches", "1,16"]
    plot = tmp_path / "speed.png"
    assert bench.main([*argv, "--plot", str(plot), *(["--peers"] if peers else [])]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert list(document) == ["conditions", *BY_DEFAULT, "goals"]
    conditions = document["conditions"]
    assert conditions["engines"].keys() == ({STOCK, OURS, PEER} if peers else {STOCK, OURS})
    for name in ("vllm", "torch", "processor", "device_name"):
        assert conditions[name]
    assert (conditions["shape"], conditions["load_format"]) == ("demo", "dummy")
    assert conditions["options"]["dtype"] == "float32"
    # Goals for a GPU, for random weights, and for Qwen.
    not_measured = {"gpu_prefill_speed_up_at_8/9", "same_tokens_at_0", "prefill_speed_at_0"}
    assert (
        document["goals"].keys()
        == {name for name, _, _, scenario, *_ in GOALS if scenario in BY_DEFAULT} - not_measured
    )
    assert document["goals"]["throughput_at_0"]["met"]
    rows = document["prefill"]
    assert len(rows) == 2 * len(prefill.RATIOS) * (1 + peers)
    for title in BY_DEFAULT:
        assert title in out
    assert ("vs peer" in out) is peers
    assert plot.stat().st_size > 10_000


@pytest.fixture
def fake_qwen(monkeypatch):
    @contextmanager
    def running(model, options, names):
        assert (model / "config.json").exists()
        assert options["pruning"] == {"shallow_boundary": 2, "deep_boundary": 20}
        yield {name: FakeEngine(name, SMALL) for name in names}

    monkeypatch.setattr(bench, "running_engines", running)
    monkeypatch.setitem(SHAPES, "qwen2.5-vl-small", replace(SMALL, hidden=64, heads=1))


@pytest.mark.usefixtures("fake_qwen")
def test_qwen_measures_prefill_at_two_image_sizes(capsys, tmp_path):
    plot = tmp_path / "speed.png"
    argv = ["--shape", "qwen2.5-vl-small", "--rounds", "2", "--plot", str(plot)]
    assert bench.main([*argv, "--scenarios", "prefill"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document.keys() == {"conditions", "prefill", "goals"}
    assert document["goals"].keys() == {
        *("prefill_vs_ideal", "prefill_speed_at_0", "stages_share_of_unpruned_prefill")
    }
    cases = [(row["image_size"], row["ratio"], row["selector"]) for row in document["prefill"]]
    assert cases == [
        (size, ratio, selector)
        for size in (448, 1344)
        for ratio in ("0", *prefill.RATIOS)
        for selector in ([OURS] if ratio == "0" else [OURS, SCALED_DOWN])
    ]
    assert plot.stat().st_size > 10_000


@pytest.mark.usefixtures("fake_qwen")
def test_videos_are_measured_beside_stock_vllm_s_own_pruning(capsys):
    argv = ["--shape", "qwen2.5-vl-small", "--rounds", "2"]
    assert bench.main([*argv, "--scenarios", *VIDEO_SCENARIOS]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["conditions"]["engines"].keys() == {STOCK, OURS, EVS}
    of_videos = {name for name, _, _, scenario, *_ in GOALS if scenario in VIDEO_SCENARIOS}
    assert document["goals"].keys() == of_videos
    rows = {
        (name, row["ratio"], row.get("running"), row.get("selector", OURS)): row
        for name in VIDEO_SCENARIOS
        for row in document[name]
    }
    prefills = [key[1:] for key in rows if key[0] == "video_prefill"]
    assert prefills == [
        *(("0", None, OURS), ("2/3", None, OURS), ("8/9", None, OURS), ("8/9", None, EVS))
    ]
    ours, evs = (rows["video_prefill", "8/9", None, name] for name in (OURS, EVS))
    assert ours["frames"] == 16
    assert ours["vs_ideal"] == pytest.approx(1.0)
    assert evs["average_tokens"] == pytest.approx(144 / 9)
    assert ours["vs_evs"] == pytest.approx(evs["ours_ms"] / ours["ours_ms"])
    for running in (1, 4, 16):
        ours, evs = (rows["video_decode", "8/9", running, name] for name in (OURS, EVS))
        assert ours["vs_ideal"] == pytest.approx(1.0, rel=1e-3)
        assert ours["vs_evs"] == pytest.approx(ours["throughput"] / evs["throughput"])
        assert "same_tokens" not in evs
    assert rows["video_turns", "8/9", None, OURS]["evs_ttft_ms"] > 0
    ours, evs = (rows["video_capacity", "8/9", None, name] for name in (OURS, EVS))
    assert ours["most"] > 4 * ours["stock_most"]
    assert ours["vs_evs"] == ours["most"] / evs["most"]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("scenario", IMAGE_SCENARIOS)
def test_each_scenario_runs_alone(scenario, capsys):
    argv = ["--shape", "demo", "--load-format", "dummy", "--rounds", "4"]
    assert bench.main([*argv, "--scenarios", scenario]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document.keys() == {"conditions", scenario, "goals"}
    assert document[scenario]
    assert bool(document["conditions"]["engines"]) is (scenario in ENGINE_SCENARIOS)


@pytest.mark.usefixtures("fakes")
def test_too_little_memory_is_refused_before_a_measurement(capsys):
    argv = ["--shape", "demo", "--load-format", "dummy", "--running", "43"]
    assert bench.main([*argv, "--scenarios", "decode"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "43 requests at once" in err


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("error", [EngineDiedError, ServerError, RequestsFailedError])
def test_rows_from_before_a_failure_are_printed(error, capsys, monkeypatch, tmp_path):
    def die(self, **command):
        raise error("engine stock is gone")

    monkeypatch.setattr(FakeEngine, "capacity", die)
    argv = ["--shape", "demo", "--load-format", "dummy", "--rounds", "2"]
    plot = tmp_path / "speed.png"
    assert bench.main([*argv, "--plot", str(plot)]) == 1
    out, err = capsys.readouterr()
    assert "engine stock is gone" in err
    document = json.loads(out.splitlines()[-1])
    assert document["died"] == "engine stock is gone"
    assert document["prefill"]
    assert document["turns"]
    assert document.keys().isdisjoint({"capacity", "load", "cold_start"})
    assert not plot.exists()


@pytest.mark.usefixtures("fakes")
def test_rows_of_a_scenario_that_fails_later_are_printed(capsys, monkeypatch):
    def measure_load(*servers, **options):
        yield LOAD[0]
        raise RequestsFailedError("16 requests failed")

    monkeypatch.setattr(bench, "measure_load", measure_load)
    argv = ["--shape", "demo", "--load-format", "dummy", "--scenarios", "load"]
    assert bench.main(argv) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["died"] == "16 requests failed"
    assert document["load"] == LOAD[:1]


def test_cold_starts_take_turns():
    order = []

    def start(name: Any) -> Any:
        order.append(name)
        return FakeEngine(name, DEMO)

    [row] = cold_start.measure_cold_start(start, 2)
    # The first pair warms up.
    assert order == [STOCK, OURS, OURS, STOCK, STOCK, OURS]
    for until in ("ready", "first_token"):
        low, high = row[f"{until}_seconds_over_stock_spread"]
        assert low <= row[f"{until}_seconds_over_stock"] <= high
    assert row["ours_first_token_seconds"] >= row["ours_ready_seconds"] > 0


@pytest.mark.slow
def test_real_engines_with_dummy_weights(tmp_path):
    save_config(tmp_path, TINY)
    started = {
        "dtype": "float32",
        "load_format": "dummy",
        "enforce_eager": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 256 << 20,
    }
    with running_engines(tmp_path, started, (STOCK, OURS)) as engines:
        rounds = Rounds(engines, TINY, 1, profile_apart=True)
        [unpruned] = scenarios.measure_decode(rounds, "0", 2, 6)
        [row] = prefill.measure_prefill(rounds, "8/9", images=2)
        about = {name: engine.run("about") for name, engine in engines.items()}
        (process,) = engines[OURS]._executor._processes.values()
        process.kill()
        with pytest.raises(EngineDiedError, match=f"{OURS} ended.*--kv-cache-gib"):
            engines[OURS].run("about")
    assert unpruned["same_tokens"], "the dummy weights differ"
    assert row["stock_encoder_ms"] > 0
    assert row["stages_share"] > 0
    assert row["visual_tokens"][0] < TINY.visual_tokens
    assert about[STOCK]["model_runner"].startswith("vllm.")
    assert about[OURS]["model_runner"].startswith("vitcop_vllm.")
    assert about[OURS]["model_runner_version"] == about[STOCK]["model_runner_version"] == "V1"


@pytest.fixture
def forked_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that need not import vLLM."""
    monkeypatch.setattr("benchmarks.engines.multiprocessing.get_context", lambda _: CONTEXT)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_real_engines_with_scaled_down_images(tmp_path):
    save_random_qwen(tmp_path, tiny.QWEN)
    started = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 256 << 20,
        "pruning": {"deep_boundary": 5},
    }
    with running_engines(tmp_path, started, (STOCK, OURS)) as engines:
        rounds = Rounds(engines, replace(tiny.QWEN, boundaries=(1, 5)), 1)
        ours, scaled = prefill.measure_prefill(rounds, "8/9", 1, image_size=448)
        [unpruned] = prefill.measure_prefill(rounds, "0", 1, image_size=336)
    assert ours["average_tokens"] == pytest.approx(256 / 9, abs=1.0)
    assert scaled["average_tokens"] == 5 * 5
    assert ours["stages_share"] > 0
    assert min(ours["encoder_ms"], scaled["encoder_ms"], ours["stock_encoder_ms"]) > 0
    assert unpruned["average_tokens"] == 144
    assert unpruned["stages_share"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_real_engines_with_videos(tmp_path):
    save_random_qwen(tmp_path, tiny.QWEN)
    started = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 128 << 20,
        "limit_mm_per_prompt": {"video": 1},
        "pruning": {"deep_boundary": 5},
    }
    with running_engines(tmp_path, started, (STOCK, OURS, EVS)) as engines:
        shape = replace(tiny.QWEN, boundaries=(1, 5))
        rounds = Rounds(engines, shape, 1).showing(12, 112, is_video=True)
        ours, evs = prefill.measure_prefill(rounds, "8/9")
        [unpruned] = scenarios.measure_decode(rounds, "0", 2, 4)
    assert unpruned["same_tokens"]
    assert ours["average_tokens"] == pytest.approx(16 / 9, abs=0.5)
    # Its count is of the whole video, rounded down.
    assert evs["average_tokens"] == int(12 * 16 / 9) / 12
    assert ours["stages_share"] > 0
    assert min(ours["encoder_ms"], evs["encoder_ms"], ours["stock_encoder_ms"]) > 0
