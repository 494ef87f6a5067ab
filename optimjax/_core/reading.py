"""Reading what was loaded, or edited by hand: slots, counts and arrays, of JAX, NumPy, PyTorch or plain numbers."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax._core.containers import as_array, not_deleted, own_memory
from optimjax._core.foreign import from_tensor
from optimjax._storage.placement import place, sharding_of

__all__ = ["ShapeError", "as_count", "read_array", "read_slot", "reading", "slot_array"]


class ShapeError(ValueError):
    """Saved state has another shape than this parameter's."""


@contextmanager
def reading() -> Iterator[None]:
    """What fails because a container holds itself, or an array was deleted, is an error of the state dict."""
    try:
        yield
    except (AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"the state dict cannot be read: {type(error).__name__}: {error}") from error


def read_slot(value: Any, type_: Any, param: jax.Array, where: str, present: Any = None) -> Any:
    """What a slot is given, loaded or edited by hand: arrays of the right structure, shapes and kinds.

    They keep their dtypes, and lie where they lie if that is on several devices; else where the present slot or the
    parameter does.

    Args:
      value: an array of JAX, NumPy or PyTorch, a number, or where the slot is a tree, a tree of these.
      type_: shape and dtype, or a tree of them; ``None`` for a slot that the parameter has not.
      param: the parameter's value.
      where: how messages begin.
      present: the slot's present value, if it has one.

    Raises:
      ValueError: it is of another structure, shape or kind, or was deleted.
    """
    if type_ is None:  # PyTorch may have saved it under other flags
        return _placed(slot_array(value, param.dtype, where), value, param, present)
    types, structure = jax.tree.flatten(type_)
    if jax.tree_util.treedef_is_leaf(structure):
        return _read_leaf(value, type_, param, where, present)
    try:
        values = structure.flatten_up_to(_tuples(value))
    except ValueError as error:
        raise ValueError(f"{where} has another structure: {error}") from None
    olds = jax.tree.leaves(present) if jax.tree.structure(present) == structure else [None] * len(types)
    return structure.unflatten(
        [
            _read_leaf(each, type_, param, f"{where}[{index}]", old)
            for index, (each, type_, old) in enumerate(zip(values, types, olds, strict=True))
        ]
    )


def _tuples(value: Any) -> Any:
    """Tuples in place of lists, which checkpointers make of them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_leaf(value: Any, type_: Any, param: jax.Array, where: str, present: Any) -> Any:
    if isinstance(value, Tracer):
        return value
    array = slot_array(value, type_.dtype, where)
    if array.shape != type_.shape:
        raise ShapeError(f"{where} has shape {array.shape}, expected {type_.shape}")
    return _placed(array, value, param, present)


def _placed(array: jax.Array, given: Any, param: Any, present: Any = None) -> jax.Array:
    """What was given stays where somebody has placed it; else it goes where the present one is, or its parameter."""
    return array if sharding_of(given) is not None else place(array, param, present)


def as_count(value: Any, where: str) -> int:
    """A number of updates, or ``ValueError`` that begins with ``where``."""
    try:
        number = np.asarray(from_tensor(value)).item()
        # Infinity has no remainder; what is larger than any float cannot be computed with.
        if number >= 0 and number % 1 == 0 and float(number) >= 0:
            return int(number)
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError):
        pass
    raise ValueError(f"{where} is {reprlib.repr(value)}, which is not a whole number from 0 on")


def slot_array(value: Any, dtype: Any, where: str) -> jax.Array:
    """What is loaded into a slot of this dtype: an array of the same kind, which keeps its own dtype.

    Plain numbers, and lists of them, get the slot's dtype; real numbers will do for complex ones.

    Raises:
      ValueError: it is of another kind; the message begins with ``where``.
    """
    try:
        return _of_kind(from_tensor(value), dtype)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is {reprlib.repr(value)}, which cannot be loaded: {error}") from None


def _of_kind(value: Any, dtype: Any) -> jax.Array:
    value = not_deleted(value)
    is_plain = isinstance(value, (int, float, complex, list, tuple))
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kind, most = _kind(array.dtype), _kind(dtype)
    least = min(most, _kind(jnp.int32 if is_plain else jnp.float32))
    if kind is None or not least <= kind <= most:
        raise TypeError(f"its dtype {array.dtype} is of another kind than {dtype}")
    if is_plain:
        array = array.astype(dtype)
    array = array if isinstance(array, jax.Array) else as_array(array)
    if kind == most:
        return array
    with jax.numpy_dtype_promotion("standard"):  # meant here, whatever is forbidden elsewhere
        return array.astype(jnp.promote_types(array.dtype, dtype))


_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)  # each can hold those before it


def _kind(dtype: Any) -> Any:
    return next((index for index, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), None)


def read_array(value: Any, param: Any = None) -> Any:
    """A JAX array in place of one of PyTorch or NumPy, whose own dtype JAX keeps; anything else as it is.

    It goes where ``param`` is, unless somebody has placed it.
    """
    given = value = not_deleted(from_tensor(value))
    if isinstance(value, np.ndarray):
        try:
            array = as_array(value)
        except TypeError:  # of strings, objects, ...
            return own_memory(value)
        value = array if array.dtype == value.dtype else own_memory(value)
    return _placed(value, given, param) if isinstance(value, jax.Array) and param is not None else value
