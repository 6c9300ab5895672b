"""Makes vLLM load our plugin in every group, beside the user's plugins."""

import sys
from collections.abc import MutableMapping
from importlib.metadata import entry_points

PLUGIN_NAME = "vitcop"

STOCK = "--stock"
"""Flag of ``vitcop-serve`` that leaves our plugin out."""

_ENDPOINT_GROUP = "vllm.endpoint_plugins"
_OUR_GROUPS = ("vllm.general_plugins", _ENDPOINT_GROUP)
_UNFILTERED_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def allow_plugin(environ: MutableMapping[str, str]) -> None:
    """Add our plugin to ``VLLM_PLUGINS``; call this before vLLM is imported.

    vLLM loads endpoint plugins only if the variable names them. The same variable filters every
    other group; while it is unset, those groups load all their plugins. So an unset variable
    becomes the list of all plugins that would have loaded, plus ours. (This also allows an
    installed endpoint plugin that has the name of another plugin; set the variable to choose.)
    """
    environ["VLLM_PLUGINS"] = ",".join([*_other_plugins(environ), PLUGIN_NAME])


def leave_out_plugin(environ: MutableMapping[str, str]) -> None:
    """Make ``VLLM_PLUGINS`` a list of all plugins that would have loaded, except ours."""
    environ["VLLM_PLUGINS"] = ",".join(_other_plugins(environ))


def _other_plugins(environ: MutableMapping[str, str]) -> list[str]:
    chosen = environ.get("VLLM_PLUGINS")
    if chosen is None:
        names = [
            entry_point.name
            for group in _UNFILTERED_GROUPS
            for entry_point in entry_points(group=group)
        ]
    else:
        names = chosen.split(",")
    return [name for name in dict.fromkeys(names) if name not in ("", PLUGIN_NAME)]


def require_plugin() -> None:
    """Exit if our plugin cannot be loaded; vLLM would only log an error.

    Raises:
        SystemExit: If it cannot be loaded; the message names the part that is missing.
    """
    for group in _OUR_GROUPS:
        found = list(entry_points(group=group, name=PLUGIN_NAME))
        if not found:
            sys.exit(
                f"The plugin {PLUGIN_NAME!r} is not installed in vLLM's group {group!r}: "
                "run `pip install .` in the project's folder."
            )
        try:
            found[0].load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"  # repr() lacks the file of an OSError
            sys.exit(f"The plugin {PLUGIN_NAME!r} of group {group!r} does not load: {reason}")
