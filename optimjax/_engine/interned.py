"""One object for equal values."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["interned"]

T = TypeVar("T")

_objects: "weakref.WeakValueDictionary[Hashable, Any]" = weakref.WeakValueDictionary()


def interned(make: Callable[..., T], *args: Hashable) -> T:
    """``make(*args)``, and the same object again for equal arguments, as long as anyone holds it.

    Such an object can be compared by identity, which is fast, and runs no Python code in which an interrupt could be
    seen.
    """
    key = make, args
    found = _objects.get(key)
    return _objects.setdefault(key, make(*args)) if found is None else found
