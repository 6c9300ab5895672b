"""``vitcop-serve [--config FILE.yaml] [MODEL] [any flag of vllm serve]``.

Adds defaults and checks to vLLM's own ``serve`` command, and supports all its modes: several API
server processes (``--api-server-count``) also load the plugin from ``VLLM_PLUGINS``.
"""

import atexit
import os
import sys
import tempfile
from collections.abc import MutableMapping, Sequence

from vitcop_server.plugins import STOCK, allow_plugin, leave_out_plugin, require_plugin
from vitcop_vllm.demo.checkpoint import DEMO_NAME, resolve


def _share_metrics(environ: MutableMapping[str, str]) -> None:
    """Make engine and workers write metrics where the API server's ``/metrics`` reads them.

    The Prometheus client reads ``PROMETHEUS_MULTIPROC_DIR`` when it is imported. vLLM sets the
    variable later, and only for several API servers.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in environ:
        folder = tempfile.TemporaryDirectory(prefix="vitcop-metrics-")
        environ["PROMETHEUS_MULTIPROC_DIR"] = folder.name
        atexit.register(folder.cleanup)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal (returns) or until the engine dies (exits with status 1).

    With ``--stock``, vLLM's own server serves the same model with the same flags.

    Raises:
        SystemExit: With an error message, before the model loads, if the server could not prune.
    """
    argv = sys.argv[1:] if argv is None else argv
    stock = STOCK in argv
    if stock:
        leave_out_plugin(os.environ)
    else:
        allow_plugin(os.environ)
        _share_metrics(os.environ)
    # vLLM reads its environment when imported.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    from vitcop_server.arguments import make_parser, parse
    from vitcop_server.compat import cli_env_setup

    cli_env_setup()
    args = parse(make_parser(), argv, dict(os.environ))
    configure_logging_from_args(args)
    if not stock:
        require_plugin()
    if args.model == DEMO_NAME:
        args.model = resolve(args.model)
        args.served_model_name = args.served_model_name or [DEMO_NAME]
    ServeSubcommand.cmd(args)
