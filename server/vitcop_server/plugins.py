"""Which of vLLM's plugins load: ours in every group, and the user's as before."""

import sys
from collections.abc import MutableMapping
from importlib.metadata import entry_points

PLUGIN_NAME = "vitcop"

_ENDPOINT_GROUP = "vllm.endpoint_plugins"
_OUR_GROUPS = ("vllm.general_plugins", _ENDPOINT_GROUP)
_GROUPS_LOADED_WHOLE = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def allow_plugin(environ: MutableMapping[str, str]) -> None:
    """Name our plugin in ``VLLM_PLUGINS``; call it before vLLM is imported.

    vLLM loads endpoint plugins only when the variable names them, but the same variable filters
    every other group, which load whole while it is unset. So an unset variable becomes the list
    of all that would have loaded, plus ours. (An installed endpoint plugin that shares the name
    of another plugin is thereby allowed too; set the variable to choose.)
    """
    chosen = environ.get("VLLM_PLUGINS")
    if chosen is None:
        names = [
            entry_point.name
            for group in _GROUPS_LOADED_WHOLE
            for entry_point in entry_points(group=group)
        ]
    else:
        names = [name for name in chosen.split(",") if name]
    environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN_NAME]))


def require_plugin() -> None:
    """Stop unless our plugin can be loaded; vLLM itself would only log that it cannot.

    Raises:
        SystemExit: With a sentence that says which part is missing.
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
            sys.exit(f"The plugin {PLUGIN_NAME!r} of group {group!r} does not load: {error!r}")
