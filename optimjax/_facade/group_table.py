"""The table of groups that a notebook shows for an optimizer."""

import html
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optimjax._engine.state import ParameterState

__all__ = ["table"]

NAMES = 3  # shown of a group's parameters


def table(cls: type, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], defaults: Mapping[str, Any]) -> str:
    """A row for each group: its parameters, their number of elements, the bytes of their state, its options.

    Options that every group has as PyTorch's default are left out, but for the learning rate.
    """
    keys = [key for key in dict.fromkeys(itertools.chain(*groups)) if key not in ("params", "param_names", "name")]
    # Options that are not arguments of the constructor have no default to compare with.
    usual = [_usual(group["algorithm"]) if "algorithm" in group else {**defaults, **_usual(cls)} for group in groups]
    pairs = list(zip(groups, usual, strict=True))
    shown = [
        key
        for key in keys
        if key == "lr" or any(key in group and _text(group[key]) != _text(own.get(key)) for group, own in pairs)
    ]
    header = ["group", "parameters", "elements", "state bytes", *map(str, shown)]
    rows = []
    for index, group in enumerate(groups):
        parameters = group["params"]
        kept = sum(ParameterState.of(state[p]).nbytes for p in parameters if p in state)
        cells = [
            str(group.get("name", index)),
            _names(group.get("param_names") or [p.name or str(p.shape) for p in parameters]),
            f"{sum(p.size for p in parameters):,}",
            f"{kept:,}",
            *(_text(group[key]) if key in group else "" for key in shown),
        ]
        rows.append(cells)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    caption = f"<caption>{cls.__name__}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _usual(cls: Any) -> dict[str, Any]:
    if not isinstance(cls, type):  # an entry that was edited, which the next step refuses
        return {}
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}


def _names(names: list[str]) -> str:
    rest = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f", and {rest} more" if rest > 0 else "")


def _text(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)):
        return str(np.asarray(value))
    if isinstance(value, type):  # an algorithm
        return value.__name__
    return f"{value:g}" if isinstance(value, float) else str(value)
