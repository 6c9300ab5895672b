"""The command line: vLLM's arguments and a pruning section."""

from argparse import Namespace
from pathlib import Path

import pytest

from vitcop_server.arguments import make_parser, parse

ELASTIC = ("--server.elastic", '{"to": 0.889, "waiting": [4, 32]}')


def parse_argv(*argv: str, environ: dict[str, str] | None = None) -> Namespace:
    return parse(make_parser(), argv, environ or {})


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "server.yaml"
    path.write_text(
        "model: some/model\nport: 1234\nmax-model-len: 512\n"
        "pruning:\n  default_ratio: 0.5\n  shallow_boundary: 3\n"
    )
    return str(path)


@pytest.mark.parametrize("style", ["--config {}", "--config={}"])
def test_a_configuration_file_is_read(config: str, style: str) -> None:
    args = parse_argv(*style.format(config).split(" "))
    assert (args.model, args.port, args.max_model_len) == ("some/model", 1234, 512)
    # Without defaults: some depend on the model, which vLLM reads later.
    assert args.additional_config["pruning"] == {"default_ratio": 0.5, "shallow_boundary": 3}


def test_command_line_wins(config: str) -> None:
    args = parse_argv("--config", config, "--port", "99", "--pruning.default_ratio", "0.7")
    assert args.port == 99
    assert args.additional_config["pruning"]["default_ratio"] == 0.7
    assert args.additional_config["pruning"]["shallow_boundary"] == 3


def test_stock_vllm_gets_none_of_our_settings(config: str) -> None:
    args = parse_argv("--stock", "--config", config, "--server.explain", "true")
    assert (args.model, args.port, args.max_model_len) == ("some/model", 1234, 512)
    assert not args.additional_config


def test_stock_in_a_file_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config).write_text("model: some/model\nstock: true\n")
    with pytest.raises(SystemExit):
        parse_argv("--config", config)
    assert "stock works on the command line only" in capsys.readouterr().err


def test_positional_model_wins(config: str) -> None:
    assert parse_argv("other/model", "--config", config).model == "other/model"


def test_defaults() -> None:
    args = parse_argv("some/model")
    assert not args.trust_request_mm_kwargs
    assert args.additional_config["pruning"] == {}


def test_additional_config_is_kept() -> None:
    given = '{"mine": 1, "pruning": {"default_ratio": 0.1, "deep_boundary": 9}}'
    args = parse_argv("m", "--additional-config", given, "--pruning", '{"default_ratio": 0.2}')
    assert args.additional_config["mine"] == 1
    assert args.additional_config["pruning"]["default_ratio"] == 0.2
    assert args.additional_config["pruning"]["deep_boundary"] == 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pruning.defaut_ratio", "0.5"], "Did you mean 'default_ratio'"),
        (["--pruning.default_ratio", "2"], "default_ratio: Input should be less than 1"),
        (["--pruning.default_ratio", "0.96"], "above max_pruning_ratio"),
        (["--pruning", "0.5"], "--pruning must be a mapping"),
        (["--pruning.selector", "fast"], "selector: no selector is called 'fast'; choose cls"),
        (["--pruning.selector", "fastv", "--enable-prefix-caching"], "reads the question"),
        (["--pruning.positions", "reference", "--enable-prefix-caching"], "positions: original"),
        (["--runner", "pooling"], "--runner pooling"),
        (["--grpc"], "--grpc"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-mode-len", "9", "--prot=1"], "(did you mean --max-model-len, --port?)"),
        (["--server.explian", "true"], "Did you mean 'explain'"),
        (["--server.max_aspect_ratio", "0.5"], "server.max_aspect_ratio: Input should be"),
        (["--server.elastic.to", "0.889"], "server.elastic.waiting: Field required"),
        ([*ELASTIC, "--pruning.default_ratio", "0.9"], "server.elastic.to 0.889 must be above"),
        ([*ELASTIC, "--api-server-count", "2"], "set --api-server-count 1"),
        ([*ELASTIC, "--data-parallel-size", "2"], "would be 2,"),
        ([*ELASTIC, "--max-num-queued-reqs", "32"], "--max-num-queued-reqs 32 refuses requests"),
    ],
)
def test_bad_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_argv("m", *argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_default_that_follows_load_is_accepted() -> None:
    args = parse_argv("m", *ELASTIC, "--data-parallel-size", "2", "--api-server-count", "1")
    assert args.additional_config["server"] == {"elastic": {"to": 0.889, "waiting": [4, 32]}}


@pytest.mark.parametrize(
    "argv",
    [
        ["--pruning.selector", "fastv"],
        ["--pruning.selector", "fastv", "--no-enable-prefix-caching"],
        ["--pruning.selector", "dart", "--enable-prefix-caching"],
    ],
)
def test_prefix_caching_is_refused_only_if_requested(argv: list[str]) -> None:
    assert parse_argv("m", *argv).additional_config["pruning"]["selector"] == argv[1]


def test_rust_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_argv("m", environ={"VLLM_USE_RUST_FRONTEND": "1"})
    assert "VLLM_USE_RUST_FRONTEND" in capsys.readouterr().err


def test_help_shows_our_options_and_vllm_s() -> None:
    text = make_parser().format_help()
    assert "ViTCoP" in text
    assert "ModelConfig" in text
