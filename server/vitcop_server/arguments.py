"""vLLM's command line with the flags of pruning and server."""

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from yaml import YAMLError

from vitcop_server.compat import make_arg_parser, validate_parsed_serve_args
from vitcop_server.settings import SERVER_KEY, ServerSettings
from vitcop_vllm.demo.checkpoint import DEMO_NAME
from vitcop_vllm.pruning.plan import why_uncacheable
from vitcop_vllm.pruning.settings import (
    CONFIG_KEY,
    Frozen,
    PruningSettings,
    format_validation_error,
)

_DESCRIPTION = """vLLM's OpenAI-compatible server, dropping visual tokens by a ratio that each
request chooses with the header X-Pruning-Ratio. Takes every flag of `vllm serve`, on the command
line or in the YAML file of --config; the command line wins."""

DRAIN_SECONDS = 30
"""After a signal, requests that run are given this long; --shutdown-timeout sets another."""

_S = TypeVar("_S", bound=Frozen)


class _MergeKeys(argparse.Action):
    """Later keys replace earlier ones, so that a flag may change one key of the YAML's."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not isinstance(values, dict):
            parser.error(f"{option_string} must be a mapping of settings, got {values!r}")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


class _Parser(FlexibleArgumentParser):
    """Suggests the nearest flag, or key of a YAML file, for an unknown one."""

    def error(self, message: str) -> None:
        _, is_unknown, arguments = message.partition("unrecognized arguments: ")
        unknown = [word.partition("=")[0] for word in arguments.split() if word.startswith("--")]
        known = list(self._option_string_actions)
        near = [hit for flag in unknown for hit in difflib.get_close_matches(flag, known, n=1)]
        if is_unknown and near:
            message += f" (did you mean {', '.join(near)}?)"
        super().error(message)


def make_parser() -> FlexibleArgumentParser:
    """vLLM's own parser with ``--pruning`` and our defaults.

    vLLM turns a YAML file's nested sections into JSON flags: ``--pruning`` is all it takes for
    a ``pruning:`` section, and for ``--pruning.default_ratio 0.5``. Likewise ``--server``.
    """
    parser = _Parser(
        prog="vitcop-serve",
        # Argparse would list hundreds of flags above every error.
        usage="vitcop-serve [--config FILE.yaml] [MODEL] [options]",
        description=_DESCRIPTION,
    )
    group = parser.add_argument_group(
        "ViTCoP",
        "Pruning of visual tokens, and the server around it: --pruning and --server, or sections "
        "of these names in the YAML file. "
        f"Also: the model name {DEMO_NAME!r} is a small model that comes with us.",
    )
    for key, settings, what, example in (
        (CONFIG_KEY, PruningSettings, "method", "default_ratio 0.5"),
        (SERVER_KEY, ServerSettings, "server", "explain true"),
    ):
        group.add_argument(
            f"--{key}",
            type=json.loads,
            action=_MergeKeys,
            default=None,
            metavar="JSON",
            help=f"Settings of the {what} and limits of requests, as JSON or one by one "
            f"(--{key}.{example}): {', '.join(settings.model_fields)}.",
        )
    make_arg_parser(parser)
    # "auto" would start an embedding model, where no endpoint plugin of ours is attached.
    # Without a timeout a signal cuts off every answer.
    parser.set_defaults(runner="generate", shutdown_timeout=DRAIN_SECONDS)
    return parser


def parse(
    parser: FlexibleArgumentParser, argv: Sequence[str], environ: dict[str, str]
) -> argparse.Namespace:
    """Arguments as vLLM's ``serve`` command takes them.

    Raises:
        SystemExit: With status 2 and a sentence, on anything that would serve without pruning.
    """
    try:
        args: argparse.Namespace = parser.parse_args(_separate_config(argv))
    except (OSError, ValueError, YAMLError) as error:  # Of the file that --config names.
        parser.error(str(error))
    validate_parsed_serve_args(args)
    # As in `vllm serve`, the positional model wins.
    args.model, args.model_tag = args.model_tag or args.model, None
    _refuse_other_servers(parser, args, environ)
    try:
        settings = _write_settings(args, CONFIG_KEY, PruningSettings)
        _write_settings(args, SERVER_KEY, ServerSettings)
    except ValueError as error:
        parser.error(str(error))
    # Only here does the operator's flag differ from vLLM's default, which is to cache.
    if args.enable_prefix_caching and (reason := why_uncacheable(settings)):
        parser.error(f"{reason}; or leave out --enable-prefix-caching")
    return args


def _separate_config(argv: Sequence[str]) -> list[str]:
    # vLLM reads the file of `--config FILE` but silently not that of `--config=FILE`.
    separated: list[str] = []
    for arg in argv:
        flag, equals, value = arg.partition("=")
        separated += [flag, value] if flag == "--config" and equals else [arg]
    return separated


def _refuse_other_servers(
    parser: FlexibleArgumentParser, args: argparse.Namespace, environ: dict[str, str]
) -> None:
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        parser.error(
            "VLLM_USE_RUST_FRONTEND replaces the Python server that reads pruning ratios: unset it"
        )
    if args.grpc:
        parser.error("--grpc replaces the HTTP server that reads pruning ratios: leave it out")
    if args.runner != "generate":
        parser.error(f"only generating models are pruned: leave out --runner {args.runner}")


def _write_settings(args: argparse.Namespace, key: str, settings_class: type[_S]) -> _S:
    """Validate a section of settings and put it where engine and server read it.

    Raises:
        ValueError: With a sentence that names each wrong one.
    """
    additional = dict(args.additional_config or {})
    given = {**additional.get(key, {}), **(getattr(args, key) or {})}
    try:
        settings = settings_class.model_validate(given)
    except ValidationError as error:
        raise ValueError(format_validation_error(error, key)) from None
    args.additional_config = {**additional, key: settings.model_dump(mode="json")}
    return settings
