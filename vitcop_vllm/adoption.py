"""Turning an object that vLLM has built into an instance of a class of ours.

Used where vLLM builds an object itself and offers no method to override. Building it again would
need a copy of vLLM's constructor call, which changes with every release.
"""

import copy
from typing import Any


def adopt(original: Any, subclass: type) -> Any:
    """Make ``original`` an instance of ``subclass``, for all who hold a reference to it.

    No constructor runs: the caller sets the attributes that ``subclass`` adds.

    Args:
        original: What vLLM built.
        subclass: A subclass of its class.

    Returns:
        ``original``.
    """
    original.__class__ = subclass
    return original


def adopt_copy(original: object, subclass: type) -> Any:
    """:func:`adopt` for a shallow copy; ``original`` stays as it is."""
    return adopt(copy.copy(original), subclass)


def adopt_with(original: Any, mixin: type) -> Any:
    """:func:`adopt` for a subclass of ``mixin`` and of the class that vLLM chose."""
    base = type(original)
    return adopt(original, type(f"{mixin.__name__}{base.__name__}", (mixin, base), {}))
