"""Objects that vLLM has built and handed over, as instances of our subclasses."""

import copy
from typing import Any


def adopted(original: object, subclass: type) -> Any:
    """A shallow copy of ``original`` that is a ``subclass``; itself it stays as it is.

    vLLM builds its handlers itself. Building them again would need a copy of some twenty
    constructor arguments that changes with every release.
    """
    adoptee: Any = copy.copy(original)
    adoptee.__class__ = subclass
    return adoptee


def adopt_in_place(original: Any, mixin: type) -> Any:
    """``original`` itself, with ``mixin`` before its class: for objects that vLLM refers to."""
    base = type(original)
    original.__class__ = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
    return original
