"""The named tuples that pure functions keep their state in, by name: a file that has one can give it back.

Files hold names only, and loading one runs no code of theirs: what comes back is registered here, or has the fields of
an algorithm's state.
"""

import functools
from collections import namedtuple
from typing import Any, TypeVar

import jax

__all__ = ["COUNTS", "is_registered", "named_state", "registered", "slots_of", "state_class"]

COUNTS = ("step", "skipped")  # the first fields of an algorithm's state, the second one if steps may be skipped

Class = TypeVar("Class", bound=type)
_registered: dict[tuple[str, tuple[str, ...]], Any] = {}


def registered(cls: Class) -> Class:
    """Register a named tuple, so that :func:`optimjax.load` gives it back as what it was; a decorator of classes."""
    _registered[cls.__name__, cls._fields] = cls  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def is_registered(cls: Any) -> bool:
    """Whether this named tuple can be found by its name and fields."""
    return _registered.get((cls.__name__, cls._fields)) is cls


def slots_of(state: Any) -> tuple[str, ...]:
    """The fields of an algorithm's state, or of its class, that are not counts."""
    return tuple(name for name in state._fields if name not in COUNTS)


@functools.cache
def state_class(name: str, fields: tuple[str, ...]) -> Any:
    """One class for each set of fields, so that trees of states compare equal; it pickles by what it was made from."""
    cls = namedtuple(f"{name}State", ("step", *fields), module=__name__)
    cls.__doc__ = f"State of {name}: the number of updates done, then one tree like the parameters for each slot."
    cls.__reduce__ = lambda self: (_restore_state, (name, fields, tuple(self)))
    jax.export.register_namedtuple_serialization(cls, serialized_name=f"optimjax.{name}State{fields}")
    return registered(cls)


def _restore_state(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return state_class(name, fields)(*values)


def named_state(name: str, fields: tuple[str, ...]) -> Any:
    """The class of a state with this name and these fields, also of an algorithm that is not imported yet.

    Raises:
      ValueError: there is none.
    """
    known = _registered.get((name, fields))
    if known is None and name.endswith("State") and fields[:1] == ("step",):
        known = state_class(name.removesuffix("State"), fields[1:])
    if known is None:
        raise ValueError(f"this version of optimjax has no state {name}{fields}")
    return known
