"""How a step of the facade runs: what is kept for a parameter, and the compiled program for a bucket of parameters."""

import functools
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from optimjax.parameter import Parameter
from optimjax.rule import Rule, apply

__all__ = [
    "Bucket",
    "Job",
    "Kept",
    "ParameterState",
    "Updates",
    "bounded_buckets",
    "buckets",
    "pack",
    "update_bucket",
    "update_each",
    "updates_of",
]

BUCKET = 64  # parameters that one program updates; see docs/architecture.md for the measurement


class Kept(NamedTuple):
    """What a step leaves for the next one."""

    slots: Any
    flags: Any  # under which the slots were made
    step: int  # updates done
    counted: bool  # whether PyTorch's state has `step`


class ParameterState(MutableMapping[str, Any]):
    """What the optimizer keeps for one parameter: arrays by name, and ``step``.

    A step donates the arrays to the compiled program, which updates them in place. Arrays that were read through this
    mapping may be in the user's hands, so the next step works on copies of them: an array once read stays valid.
    """

    __slots__ = ("_values", "kept")

    def __init__(self, values: Mapping[str, Any] = {}):
        self._values = dict(values)
        self.kept: Kept | None = None  # newer than the values, and seen by nobody

    def peek(self) -> dict[str, Any]:
        """The entries; from now on they count as seen."""
        if self.kept is not None:
            if self.kept.counted:
                self._values["step"] = self.kept.step
            slots = self.kept.slots._asdict()
            self._values.update((name, slot) for name, slot in slots.items() if slot is not None)
            self.kept = None
        return self._values

    def __getitem__(self, name: str) -> Any:
        return self.peek()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.peek()[name] = value

    def __delitem__(self, name: str) -> None:
        del self.peek()[name]

    def __iter__(self) -> Any:
        return iter(self.peek())

    def __len__(self) -> int:
        return len(self.peek())

    def __repr__(self) -> str:
        return repr(self.peek())

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParameterState":
        return ParameterState(self.peek())  # arrays are immutable and can be shared

    def __reduce__(self) -> Any:
        return ParameterState, (dict(self.peek()),)


class Job(NamedTuple):
    """One parameter's share of a step."""

    parameter: Parameter
    value: Array
    grad: Any
    signature: Any  # of the value
    state: ParameterState
    kept: Kept
    scalars: Any  # one object for each group and step


class Updates(NamedTuple):
    """What is compiled in when a list of parameters is updated: structure only, one entry for each."""

    rule: Rule
    scalars: Any  # the NamedTuple type of the rule's scalars
    flags: tuple[Any, ...]
    rows: tuple[int, ...]  # which row of scalars: by group and step, never by their values


def updates_of(rule: Rule, jobs: Sequence[Job], share_rows: bool = True) -> Updates:
    """The static side of these jobs; those of one group and step share a row of scalars, or each has its own."""
    position: dict[int, int] = {}
    rows = [position.setdefault(id(job.scalars), len(position)) for job in jobs] if share_rows else range(len(jobs))
    return Updates(rule, type(jobs[0].scalars), tuple(job.kept.flags for job in jobs), tuple(rows))


def pack(updates: Updates, jobs: Sequence[Job]) -> Any:
    """The rows of scalars, as one array."""
    by_row = {row: job.scalars for row, job in zip(updates.rows, jobs, strict=True)}
    rows = [by_row[row] for row in range(len(by_row))]
    if any(isinstance(scalar, jax.Array) for row in rows for scalar in row):  # tracers: the facade inside a `jit`
        return [list(row) for row in rows]
    return np.array(rows)


def update_each(updates: Updates, params: Any, grads: Any, slots: Any, rows: Any) -> tuple[list[Any], list[Array]]:
    """New slots and new parameters.

    The slots come first, for JAX gives donated memory to the first outputs that fit: in the other order the
    parameters would take it, and every slot would be copied.
    """
    scalars = [updates.scalars(*row) for row in rows]
    results = [
        apply(updates.rule, flags, param, grad, slot, scalars[row])
        for flags, row, param, grad, slot in zip(updates.flags, updates.rows, params, grads, slots, strict=True)
    ]
    return [slot for _, slot in results], [param for param, _ in results]


update_bucket = functools.partial(jax.jit, static_argnames="updates", donate_argnames="slots")(update_each)


class Bucket(NamedTuple):
    """Jobs that run in one program, by their positions in the list of jobs."""

    positions: list[int]
    updates: Updates


def buckets(rule: Rule, jobs: Sequence[Job]) -> list[Bucket]:
    """Up to 64 jobs of equal shape together; what is left over of all shapes, up to 64 together.

    Compiling costs by distinct shapes, dispatching by programs, tracing by parameters.
    """
    full, rest = [], []
    for positions in _alike(jobs):
        cut = len(positions) - len(positions) % BUCKET
        full += positions[:cut]
        rest += positions[cut:]
    chunks = [part[start : start + BUCKET] for part in (full, rest) for start in range(0, len(part), BUCKET)]
    return [Bucket(chunk, updates_of(rule, [jobs[position] for position in chunk])) for chunk in chunks]


def bounded_buckets(rule: Rule, jobs: Sequence[Job]) -> list[Bucket]:
    """Jobs of one shape in portions of 64, 32, ..., 2 and 1: seven programs for a shape, whoever has a gradient."""
    result = []
    for positions in _alike(jobs):
        size = BUCKET
        while positions:
            if len(positions) < size:
                size //= 2
                continue
            chunk, positions = positions[:size], positions[size:]
            result.append(Bucket(chunk, updates_of(rule, [jobs[p] for p in chunk], share_rows=False)))
    return result


def _alike(jobs: Sequence[Job]) -> list[list[int]]:
    """Positions of jobs that compile alike, together."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for position, job in enumerate(jobs):
        alike[job.signature, job.kept.flags].append(position)
    return list(alike.values())
