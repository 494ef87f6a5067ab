"""What a scheduler consists of: the arguments of its constructor, its entries in a state dict, and how it is shown."""

import inspect
import reprlib
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optimjax._core.containers import plain
from optimjax._facade.state_dict import as_dict

__all__ = ["by_group", "checked", "entry_error", "is_number", "like", "shown"]

# What the state dicts of PyTorch versions other than 2.13 have.
OF_OTHER_VERSIONS = {"verbose", "anneal_func", "_scale_fn_ref", "_scale_mode"}
SHARED = {"optimizer", "last_epoch", "key", "schedulers"}
WHOLE = {"last_epoch", "_step_count", "num_bad_epochs", "cooldown_counter"}


def arguments(cls: type) -> list[str]:
    """The names of a constructor's arguments, without those that schedulers share."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):  # a user's class may have any constructor
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.name not in SHARED]


# --- State dicts ----------------------------------------------------------------------------------------------------


def checked(scheduler: Any, state_dict: Any) -> dict[str, Any]:
    """A state dict of plain values that fit the scheduler.

    A value must be of the kind that the scheduler has there now. Of a user's class only the entries of the class above
    are known, which is ours: its own may be missing or new.

    Raises:
      ValueError: it does not fit; the message names the entry.
    """
    saved, present, name = as_dict(state_dict), vars(scheduler), type(scheduler).__name__
    required = _names(type(scheduler), "_state")
    known = required | _names(type(scheduler), "_optional_state")
    for entry in sorted(required & present.keys() - saved.keys()):
        raise ValueError(f"the state dict has no {entry!r}, which {name} needs; it has {sorted(map(str, saved))}")
    for entry in saved.keys() - known - present.keys() - OF_OTHER_VERSIONS:
        if _is_ours(type(scheduler)) or not isinstance(entry, str):
            raise ValueError(f"the state dict has {entry!r}, which {name} does not keep")
    if (key := saved.get("key", "lr")) != scheduler.key:
        raise ValueError(f"the state dict is of a scheduler with key={key!r}, this {name} has key={scheduler.key!r}")
    try:
        return {entry: scheduler._entry(entry, x) if entry in known else plain(x) for entry, x in saved.items()}
    except RecursionError:
        raise ValueError("the state dict holds itself, or is nested too deeply") from None


def _names(cls: type, listed: str) -> set[str]:
    """What our classes list under this attribute, and the arguments of their constructors."""
    ours = [each for each in cls.__mro__ if _is_ours(each)]
    return {name for each in ours for name in [*vars(each).get(listed, ()), *arguments(each)]}


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("optimjax.")


def like(present: Any, value: Any, name: str) -> Any:
    """A plain value of a state dict, or ``ValueError`` unless it is of the same kind as the present one."""
    if isinstance(present, bool):
        if not (isinstance(value, bool) or value in (0, 1)):
            raise entry_error(name, value, "True or False")
        return bool(value)
    if is_number(present):
        return _number(value, name)
    for kind, what in ((str, "a string"), (Mapping, "a dict"), ((list, tuple), "a list")):
        if isinstance(present, kind) and not isinstance(value, kind):
            raise entry_error(name, value, what)
    return value


def by_group(present: list[Any], value: Any, name: str, groups: int) -> list[Any]:
    """A list with a value for each group; groups that were added after the last step may have none."""
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= groups:
        raise entry_error(name, value, f"a list with a value for each of {groups} groups")
    return [like(present[0], each, f"{name}[{index}]") for index, each in enumerate(value)]


def _number(value: Any, name: str) -> Any:
    if not is_number(value) or np.size(value) != 1:
        raise entry_error(name, value, "a number")
    if name in WHOLE:
        if not float(value).is_integer():
            raise entry_error(name, value, "a whole number")
        return int(value)
    return value


def entry_error(name: str, value: Any, expected: str) -> ValueError:
    """The error that an entry of a state dict has another value than one that can be loaded."""
    return ValueError(f"{name!r} of the state dict is {reprlib.repr(value)}, expected {expected}")


def is_number(value: Any) -> bool:
    """Whether this can be a rate: a real number, or an array of them."""
    return isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and not isinstance(value, bool)


# --- Showing --------------------------------------------------------------------------------------------------------


def shown(scheduler: Any) -> str:
    """``StepLR(step_size=30, gamma=0.1) at epoch 3: lr [0.1]``; one that is half built shows what it has."""
    text, present = described(scheduler), vars(scheduler)
    if "last_epoch" in present:
        text += f" at epoch {_text(present['last_epoch'])}"
    if "_last_lr" in present:
        text += f": {scheduler.key} {_text(present['_last_lr'])}"
    return text


def described(scheduler: Any) -> str:
    """The call that makes such a scheduler, with those of its arguments that it keeps."""
    name, inside = type(scheduler).__name__, vars(scheduler).get("_schedulers", ())
    words = [f"{argument}={_text(value)}" for argument, value in _values(scheduler).items()]
    if scheduler.key != "lr" and not inside:
        words.append(f"key={scheduler.key!r}")
    if not inside:
        return f"{name}({', '.join(words)})"
    lines = [f"{line},\n" for line in [*map(described, inside), *words]]
    return f"{name}(\n{textwrap.indent(''.join(lines), '    ')})"


def _values(scheduler: Any) -> dict[str, Any]:
    """The arguments, kept under their own name, a private one, or as a list with a value for each group."""
    present, values = vars(scheduler), {}
    try:
        elsewhere = scheduler._arguments_elsewhere()
    except Exception:  # it is half built, or the groups have changed
        elsewhere = {}
    for name in arguments(type(scheduler)):
        if name in elsewhere:
            values[name] = _one(elsewhere[name])
        elif f"{name}s" in present:
            values[name] = _one(present[f"{name}s"])
        elif name in present or f"_{name}" in present:
            values[name] = present.get(name, present.get(f"_{name}"))
    return values


def _one(values: Any) -> Any:
    """The value of all groups where they have the same."""
    alike = isinstance(values, list) and all(_text(value) == _text(values[0]) for value in values)
    return values[0] if alike and values else values


def _text(value: Any) -> str:
    try:
        if isinstance(value, Counter):
            return _text(sorted(value.elements()))
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(_text, value))}]"
        if callable(value):
            name = getattr(value, "__qualname__", None) or repr(value)
            return type(value).__name__ if " at 0x" in name else name.rpartition(">.")[2]
        if is_number(value) and not isinstance(value, int):
            return f"{float(np.asarray(value).item()):g}"
        return reprlib.repr(value)
    except Exception:  # of an array that is deleted or being traced, or of a class of the user's
        return f"<{type(value).__name__}>"
