"""Nested containers of plain values: copied, and as they were before a checkpointer changed them."""

import copy
from collections.abc import Callable, Mapping, MutableSequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax._core.foreign import from_tensor

__all__ = ["as_array", "copied", "not_deleted", "own_memory", "plain"]


def not_deleted(value: Any) -> Any:
    """The value; or ``ValueError`` if it is an array that was deleted."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted():
        raise ValueError(f"an array of shape {value.shape} has been deleted")
    return value


def own_memory(value: Any) -> Any:
    """The value; an array of NumPy, which may be written to, as a copy."""
    return value.copy() if isinstance(value, np.ndarray) else value


def as_array(value: Any, dtype: Any = None) -> jax.Array:
    """An array of JAX with memory of its own: JAX may read that of NumPy after it has returned."""
    return jnp.asarray(own_memory(value), dtype)


def copied(value: Any, leaf: Callable[[Any], Any] = own_memory) -> Any:
    """A copy of nested containers, with ``leaf`` of what they hold; it shares nothing that can be edited in place."""
    if isinstance(value, Mapping):
        twin = copy.copy(value) if isinstance(value, dict) else dict(value)
        for key in twin:
            twin[key] = copied(twin[key], leaf)
        return twin
    if isinstance(value, tuple):
        items = [copied(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, MutableSequence):
        twin = copy.copy(value)
        for index, item in enumerate(value):
            twin[index] = copied(item, leaf)
        return twin
    return copy.copy(value) if isinstance(value, Set) else leaf(value)


def plain(value: Any, default: Any = None) -> Any:
    """Undo what checkpointers and other frameworks do to plain Python values in groups; shares nothing that changes."""
    value = copied(value, _plain_leaf)
    return tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value


def _plain_leaf(value: Any) -> Any:
    value = own_memory(not_deleted(from_tensor(value)))
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value
