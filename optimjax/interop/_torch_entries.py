"""The state of one parameter: PyTorch's axes into ours, and back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from optimjax._core.contract import kinds_of_slots
from optimjax._core.definition import package
from optimjax.interop._torch_arrays import is_array
from optimjax.interop._torch_layout import Layout, Parts, ambiguous, join, split
from optimjax.interop._torch_vectors import Entries, Member

__all__ = ["join_entries", "label", "matrix_axes", "shape_of", "split_entries"]

FACTORS = ("row_var", "col_var")  # of Adafactor: means along the last axis and along the last but one
OTHER_RUN = (
    "so the run would be another one: train PyTorch's arrays as they are, as the page on PyTorch's checkpoints shows"
)


def label(name: str | None) -> str:
    """A parameter as messages name it."""
    return "a parameter without a name" if name is None else repr(name)


def _is_shaped(name: str) -> bool | None:
    """Whether a slot has the parameter's shape, in any algorithm of the package; ``None`` if none knows it."""
    kinds = [kinds_of_slots(each.rule.slots) for each in package if each.rule is not None]
    fixed = [kind[name].fixed for kind in kinds if name in kind]
    return None if not fixed else not all(fixed)


def shape_of(entries: Mapping[str, Any]) -> tuple[int, ...]:
    """The parameter's shape, as far as its entries tell."""
    if all(name in entries for name in FACTORS):
        return (*np.shape(entries["row_var"])[:-1], np.shape(entries["col_var"])[-1])
    return next((np.shape(value) for name, value in entries.items() if _is_shaped(name)), ())


def split_entries(name: str | None, parts: Parts | None, entries: Entries) -> list[Member]:
    """What a parameter of PyTorch is here, with its entries."""
    its = label(name)
    parts = _certain(its, parts, entries)
    _check_same_run(its, parts, entries)
    made: list[Entries] = [{} for _ in parts]
    for key, value in entries.items():
        if _moves(its, key, value, parts):
            values = _fitting(its, key, lambda key=key, value=value: split(_for(key, parts), value))
        else:
            values = [value] * len(parts)
        for one, each in zip(made, values, strict=True):
            one[key] = each
    return [Member(part.name or name, _exchanged(one, parts)) for part, one in zip(parts, made, strict=True)]


def join_entries(name: str | None, parts: Parts | None, entries: Sequence[Entries]) -> Member:
    """What :func:`split_entries` came from."""
    its = label(name)
    parts = _certain(its, parts, entries[0])
    _check_same_run(its, parts, entries[0])
    if len({frozenset(each) for each in entries}) > 1:
        raise ValueError(f"the parts of {its} have different state: {[sorted(each) for each in entries]}")
    joined: Entries = {}
    for key in entries[0]:
        values = [each[key] for each in entries]
        if _moves(its, key, values[0], parts):
            joined[key] = _fitting(its, key, lambda key=key, values=values: join(_for(key, parts), values))
        elif all(_same(values[0], value) for value in values[1:]):
            joined[key] = values[0]
        else:
            raise ValueError(f"the parts of {its} differ in {key!r}: {values}")
    return Member(name, _exchanged(joined, parts))


def _certain(its: str, parts: Parts | None, entries: Entries) -> Parts:
    """The layout; where there is none, the array stays, if it could not be meant otherwise."""
    if parts is not None:
        return parts
    shape = shape_of(entries)
    if ambiguous(shape):
        raise ValueError(
            f"the state of {its} has shape {shape}, which would fit with its axes exchanged, too: name it in layout, "
            "with its axes, or with None if it stays as it is"
        )
    return (Layout(),)


def _check_same_run(its: str, parts: Parts, entries: Entries) -> None:
    """Refuse what works on an array as a whole where PyTorch has another array than we."""
    if not {*FACTORS, "variance"} & entries.keys():
        return
    first, *others = parts
    axes = first.axes or ()
    if others or not first.keeps_axes or sorted(axes[-2:]) != list(range(len(axes)))[-2:]:
        raise ValueError(f"Adafactor keeps means along the last two axes of {its}, which ours has not, {OTHER_RUN}")


def _moves(its: str, key: str, value: Any, parts: Parts) -> bool:
    """Whether an entry has the parameter's axes. What no algorithm knows can only stay as it is."""
    if value is not None and (_is_shaped(key) or key in FACTORS):
        return True
    first, *others = parts
    if getattr(value, "ndim", 0) and (others or first.axes or not first.keeps_axes):
        raise ValueError(f"{key!r} of {its} is a slot of one's own, so its layout does not say what becomes of it")
    return False


def _for(key: str, parts: Parts) -> Parts:
    """The layout of a slot: factors have the parameter's axes, but not its sizes."""
    return tuple(dataclasses.replace(part, shape=None) for part in parts) if key in FACTORS else parts


def _exchanged(entries: Entries, parts: Parts) -> Entries:
    """The factors by each other's name, where the last two axes have changed places."""
    first, *_ = parts
    axes = first.axes or ()
    if axes[-2:] != (len(axes) - 1, len(axes) - 2) or not set(FACTORS) <= entries.keys():
        return entries
    rows, columns = FACTORS
    return {**entries, rows: entries[columns], columns: entries[rows]}


def _fitting(its: str, key: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ValueError as error:
        raise ValueError(f"{key!r} of {its} {error}") from None


def _same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other)) if is_array(one) or is_array(other) else one == other


def matrix_axes(group: Mapping[str, Any], parts: Parts | None, name: str | None) -> Any:
    """Where Muon finds in our array the matrix that it finds in PyTorch's; ``None`` for other algorithms."""
    if "adjust_lr_fn" not in group or parts is None:
        return None
    first, *others = parts
    if others:
        raise ValueError(f"Muon works on {label(name)} as one matrix, which is several parameters here, {OTHER_RUN}")
    try:
        return first.matrix_axes()
    except ValueError as error:
        raise ValueError(f"Muon: {label(name)} {error}") from None
