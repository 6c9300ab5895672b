"""Objects that vLLM has built and handed over, as instances of our subclasses."""

import copy
from typing import Any


def adopted(original: object, subclass: type) -> Any:
    """A shallow copy of ``original`` that is a ``subclass``; itself it stays as it is.

    vLLM builds its handlers itself. Building them again would need a copy of some twenty
    constructor arguments that changes with every release.
    """
    return adopt_in_place(copy.copy(original), subclass)


def adopt_in_place(original: Any, subclass: type) -> Any:
    """Turn ``original`` itself into a ``subclass``, for all who hold a reference to it."""
    original.__class__ = subclass
    return original


def mix_in_place(original: Any, mixin: type) -> Any:
    """Put ``mixin`` before the class of ``original``, whichever class vLLM chose."""
    base = type(original)
    return adopt_in_place(original, type(f"{mixin.__name__}{base.__name__}", (mixin, base), {}))
