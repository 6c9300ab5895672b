"""vLLM's command line with two more flags: ``--pruning`` and ``--server``."""

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from yaml import YAMLError

from vitcop_server.compat import make_arg_parser, validate_parsed_serve_args
from vitcop_server.elastic import check_elastic
from vitcop_server.plugins import STOCK
from vitcop_server.settings import SERVER_KEY, ServerSettings
from vitcop_vllm.demo.checkpoint import DEMO_NAME
from vitcop_vllm.pruning.plan import why_uncacheable
from vitcop_vllm.pruning.settings import (
    CONFIG_KEY,
    Frozen,
    PruningSettings,
    format_validation_error,
)

_DESCRIPTION = """vLLM's OpenAI-compatible server with pruning of visual tokens. Each request
chooses its ratio with the header X-Pruning-Ratio. All flags of `vllm serve` work, on the command
line or in the YAML file of --config; the command line wins."""

DRAIN_SECONDS = 30
"""Seconds that running requests have to finish after a signal; see ``--shutdown-timeout``."""

_S = TypeVar("_S", bound=Frozen)


class _MergeKeys(argparse.Action):
    """Merges the values of a repeated flag, so that it can override one key of the YAML."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not isinstance(values, dict):
            parser.error(f"{option_string} must be a mapping of settings, not {values!r}")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


class _Parser(FlexibleArgumentParser):
    """Suggests the nearest known flag, or key of a YAML file, for an unknown one."""

    def error(self, message: str) -> None:
        _, is_unknown, arguments = message.partition("unrecognized arguments: ")
        unknown = [word.partition("=")[0] for word in arguments.split() if word.startswith("--")]
        known = list(self._option_string_actions)
        near = [hit for flag in unknown for hit in difflib.get_close_matches(flag, known, n=1)]
        if is_unknown and near:
            message += f" (did you mean {', '.join(near)}?)"
        super().error(message)


def make_parser() -> FlexibleArgumentParser:
    """vLLM's own parser with ``--pruning``, ``--server`` and our defaults.

    vLLM turns nested sections of a YAML file into JSON flags. So ``--pruning`` also covers a
    ``pruning:`` section and ``--pruning.default_ratio 0.5``; the same holds for ``--server``.
    """
    parser = _Parser(
        prog="vitcop-serve",
        # Otherwise argparse lists hundreds of flags above every error.
        usage="vitcop-serve [--config FILE.yaml] [MODEL] [options]",
        description=_DESCRIPTION,
    )
    group = parser.add_argument_group(
        "ViTCoP",
        "Settings of pruning and of the server: the flags --pruning and --server, or sections of "
        "these names in the YAML file. "
        f"The model name {DEMO_NAME!r} selects the small model that is included.",
    )
    for key, settings, what, example in (
        (CONFIG_KEY, PruningSettings, "pruning method", "default_ratio 0.5"),
        (SERVER_KEY, ServerSettings, "server", "explain true"),
    ):
        group.add_argument(
            f"--{key}",
            type=json.loads,
            action=_MergeKeys,
            default=None,
            metavar="JSON",
            help=f"Settings of the {what}, as JSON or one by one (--{key}.{example}): "
            f"{', '.join(settings.model_fields)}.",
        )
    group.add_argument(
        STOCK,
        action="store_true",
        help="Serve with vLLM alone: without the plugin, and without the settings above.",
    )
    make_arg_parser(parser)
    # "auto" also starts embedding models, for which vLLM does not attach our endpoint plugin.
    # Without a timeout, a signal aborts all running requests.
    parser.set_defaults(runner="generate", shutdown_timeout=DRAIN_SECONDS)
    return parser


def parse(
    parser: FlexibleArgumentParser, argv: Sequence[str], environ: dict[str, str]
) -> argparse.Namespace:
    """Parse and validate the command line.

    Returns:
        Arguments for vLLM's ``serve`` command; ``additional_config`` has our settings, unless
        ``--stock`` is given.

    Raises:
        SystemExit: With status 2 and an error message, if an argument is wrong or the server
            could not prune.
    """
    try:
        args: argparse.Namespace = parser.parse_args(_separate_config(argv))
    except (OSError, ValueError, YAMLError) as error:  # From the file of --config.
        parser.error(str(error))
    validate_parsed_serve_args(args)
    # As in `vllm serve`, the positional model wins.
    args.model, args.model_tag = args.model_tag or args.model, None
    if args.stock:
        if STOCK not in argv:  # The launcher chooses the plugins before it reads the file.
            parser.error(f"stock works on the command line only ({STOCK}), not in a file")
        return args
    _refuse_other_servers(parser, args, environ)
    try:
        settings = _write_settings(args, CONFIG_KEY, PruningSettings)
        server = _write_settings(args, SERVER_KEY, ServerSettings)
        if server.elastic is not None and not args.headless:
            # With several engines, vLLM's default is as many API servers.
            api_servers = args.api_server_count or args.data_parallel_size
            check_elastic(server.elastic, settings, args, api_servers)
    except ValueError as error:
        parser.error(str(error))
    # Later, the operator's flag cannot be distinguished from vLLM's default, which is to cache.
    if args.enable_prefix_caching and (reason := why_uncacheable(settings)):
        parser.error(f"{reason}; or leave out --enable-prefix-caching")
    return args


def _separate_config(argv: Sequence[str]) -> list[str]:
    # vLLM reads `--config FILE`, but silently ignores `--config=FILE`.
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
    """Validate a section of settings and write it to ``additional_config``.

    Raises:
        ValueError: If a setting is wrong; the message names each wrong setting.
    """
    additional = dict(args.additional_config or {})
    given = {**additional.get(key, {}), **(getattr(args, key) or {})}
    try:
        settings = settings_class.model_validate(given)
    except ValidationError as error:
        raise ValueError(format_validation_error(error, key)) from None
    # Without defaults: start-up chooses some by the model.
    chosen = settings.model_dump(mode="json", exclude_unset=True)
    args.additional_config = {**additional, key: chosen}
    return settings
