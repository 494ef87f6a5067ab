"""How a step of the facade runs: compiled programs, each for a bucket of parameters, and what is kept between steps."""

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax.parameter import Parameter
from optimjax.rule import Rule, apply_each

__all__ = [
    "Bucket",
    "Donating",
    "Member",
    "ParameterState",
    "Plan",
    "Updates",
    "bounded_layout",
    "concrete",
    "entries",
    "layout",
    "update_bucket",
    "update_bucket_in_place",
    "update_each",
]

ALIKE = 64  # parameters of one shape that one program updates; see docs/architecture.md for the measurement
MIXED = 256  # parameters of any shapes


class ParameterState(MutableMapping[str, Any]):
    """What the optimizer keeps for one parameter: arrays by name, and ``step``.

    A step donates the arrays to the compiled program, which updates them in place. Arrays that were read through this
    mapping may be in the user's hands, so the next step works on copies of them: an array once read stays valid.
    """

    __slots__ = ("_values", "place")

    def __init__(self, values: Mapping[str, Any] = {}):
        self._values = dict(values)
        # Of what is newer than the values, and seen by nobody: a Place, or for LBFGS, which has no buckets, its like.
        self.place: Any = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ParameterState":
        """The values themselves if they are such a state; or one with them, where somebody has set a dict."""
        return values if isinstance(values, cls) else cls(values)

    def peek(self) -> dict[str, Any]:
        """The entries; from now on they count as seen."""
        if self.place is not None:
            self._values.update(self.place.entries())
            self.place.leave()
            self.place = None
        return self._values

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays, which do not count as seen by that."""
        entries = self._values | (self.place.entries() if self.place is not None else {})
        return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(entries))

    def move(self, place: "Place") -> None:
        """From now on the slots are there."""
        if self.place is not None:
            self.place.leave()
        self.place = place
        for name in place.entries():  # or what was seen once would be held for good
            self._values.pop(name, None)

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


class Member(NamedTuple):
    """One parameter on its way into a bucket."""

    parameter: Parameter
    value: Array
    group: int  # its index among the groups
    flags: Any
    state: ParameterState
    slots: Any
    step: int  # updates done

    @property
    def signature(self) -> tuple[Any, ...]:
        """Members that agree in it compile alike."""
        return self.value.shape, self.value.dtype, getattr(self.value, "sharding", None), self.flags


class Updates:
    """What is compiled in when a bucket is updated: structure only.

    Attributes:
      rule: the rule.
      scalars: the NamedTuple type of its scalars.
      flags: the flags of each row of scalars.
      rows: for each parameter its row: by group and step count, never by values.
    """

    def __init__(self, rule: Rule, scalars: Any, flags: tuple[Any, ...], rows: tuple[int, ...]):
        self.rule, self.scalars, self.flags, self.rows = rule, scalars, flags, rows
        self._key = (rule, scalars, flags, rows)
        self._hash = hash(self._key)  # once, not at each step

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Updates) and self._key == other._key)


def update_each(updates: Updates, slots: Any, params: Any, grads: Any, rows: Any) -> tuple[list[Any], list[Array]]:
    """New slots and new parameters.

    The slots come first, for JAX gives donated memory to the first outputs that fit: in the other order the
    parameters would take it, and every slot would be copied.
    """
    scalars = [updates.scalars(*row) for row in rows]
    flags = [updates.flags[row] for row in updates.rows]
    results = apply_each(updates.rule, flags, params, grads, slots, [scalars[row] for row in updates.rows])
    return [slot for _, slot in results], [param for param, _ in results]


class Donating:
    """A compiled function that may take the memory of some arguments for its results.

    Under ``grad`` it leaves them alone: the way back needs them again. Inside ``jit`` it makes no difference.
    """

    def __init__(self, function: Callable[..., Any], static: Sequence[str], donate: Sequence[str]):
        self._donating = jax.jit(function, static_argnames=static, donate_argnames=donate)
        self._keeping = jax.jit(function, static_argnames=static)
        self.lower = self._donating.lower

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        kinds = set(map(type, jax.tree.leaves(args)))  # one by one, thousands of arrays would cost
        return (self._keeping if any(issubclass(kind, Tracer) for kind in kinds) else self._donating)(*args)


update_bucket = Donating(update_each, ["updates"], ["slots"])
update_bucket_in_place = Donating(update_each, ["updates"], ["slots", "params"])


class Bucket:
    """Parameters that one program updates. Between steps it keeps their slots.

    Attributes:
      updates: what is compiled in.
      boxes: the parameters.
      values, slots: what the next step starts from.
    """

    def __init__(self, rule: Rule, scalars: Any, members: Sequence[Member], shared: bool):
        self.boxes = [member.parameter for member in members]
        self.values = [member.value for member in members]
        self.slots = [member.slots for member in members]
        self.steps = 0  # done by this bucket
        self._whole = True
        self._states: list[ParameterState | None] = [member.state for member in members]
        # Parameters of one group and step count share a row of scalars; or each has its own.
        keys = [(m.group, m.step) if shared else (m.group, m.step, index) for index, m in enumerate(members)]
        row = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        flags = {member.group: member.flags for member in members}
        self._rows = [key[:2] for key in row]
        self.updates = Updates(
            rule, scalars, tuple(flags[group] for group, _ in self._rows), tuple(row[key] for key in keys)
        )
        for index, member in enumerate(members):
            member.state.move(Place(self, index, member.flags, member.step))

    def fits(self, state: Mapping[Parameter, ParameterState]) -> bool:
        """Whether values and slots are what the last step has left."""
        return (
            self._whole
            and all(map(is_, self.values, [box.value for box in self.boxes]))
            and all(map(is_, self._states, map(state.get, self.boxes)))
        )

    def scalars(self, hypers: Sequence[Any], known: dict[tuple[int, int], Any]) -> Any:
        """The rows of scalars for the next step, as one array; ``known`` collects those of a group and a count."""
        rows = []
        for group, step in self._rows:
            key = group, step + self.steps + 1
            if key not in known:
                known[key] = list(map(concrete, self.updates.rule.scalars(key[1], hypers[group])))
            rows.append(known[key])
        if any(isinstance(scalar, Tracer) for row in rows for scalar in row):  # the facade inside a `jit`
            return rows
        return np.array(rows)

    def commit(self, slots: list[Any], params: list[Array], state: MutableMapping[Parameter, ParameterState]) -> None:
        """Take the results of an update."""
        # The slots at once: the old ones were donated, and an interrupt must not lose the new ones.
        self.slots, self.values, self.steps = slots, params, self.steps + 1
        for box, param in zip(self.boxes, params, strict=True):
            box.write(param)
        if self.steps == 1:
            # Where there is nothing to keep, as for SGD without momentum, PyTorch has no state.
            kept = [bool(entries(self.updates.rule, slot, 1)) for slot in slots]
            self._states = [entry if keep else None for entry, keep in zip(self._states, kept, strict=True)]
            state.update((box, entry) for box, entry in zip(self.boxes, self._states, strict=True) if entry is not None)

    def drop(self) -> None:
        """Only the slots are of further use."""
        self.values, self._whole = [], False

    def remove(self, index: int) -> None:
        """A parameter's slots are elsewhere now, or somebody has seen them: they must not be donated from here."""
        self.slots[index], self._whole = None, False


class Place(NamedTuple):
    """Where the slots of a parameter are."""

    bucket: Bucket
    position: int
    flags: Any  # under which the slots were made
    start: int  # updates done before those of the bucket

    @property
    def slots(self) -> Any:
        """The present slots."""
        return self.bucket.slots[self.position]

    @property
    def step(self) -> int:
        """Updates done."""
        return self.start + self.bucket.steps

    def entries(self) -> dict[str, Any]:
        """Slots and count, as PyTorch's state has them."""
        return entries(self.bucket.updates.rule, self.slots, self.step)

    def leave(self) -> None:
        """See :meth:`Bucket.remove`."""
        self.bucket.remove(self.position)


def entries(rule: Rule, slots: Any, step: int) -> dict[str, Any]:
    """What PyTorch's state has: the slots that exist, by name, and ``step`` where it counts."""
    count = {"step": step} if rule.counts_steps else {}
    return count | {name: slot for name, slot in slots._asdict().items() if slot is not None}


class Plan(NamedTuple):
    """The buckets of a step, for as long as the next step is of the same kind."""

    key: Any
    buckets: list[Bucket]

    def drop(self) -> None:
        """See :meth:`Bucket.drop`."""
        for bucket in self.buckets:
            bucket.drop()


def layout(members: Sequence[Member]) -> list[list[int]]:
    """Positions of the members of each bucket: up to 64 of one shape together, then what is left of all shapes.

    Compiling costs by distinct shapes, dispatching by programs, tracing by parameters.
    """
    full, rest = [], []
    for positions in _alike(members):
        cut = len(positions) - len(positions) % ALIKE
        full += [positions[start : start + ALIKE] for start in range(0, cut, ALIKE)]
        rest += positions[cut:]
    return full + [rest[start : start + MIXED] for start in range(0, len(rest), MIXED)]


def bounded_layout(members: Sequence[Member]) -> list[list[int]]:
    """Members of one shape in portions of 64, 32, ..., 2 and 1: seven programs for a shape, whoever has a gradient."""
    result = []
    for positions in _alike(members):
        size = ALIKE
        while positions:
            if len(positions) < size:
                size //= 2
                continue
            result.append(positions[:size])
            positions = positions[size:]
    return result


def _alike(members: Sequence[Member]) -> list[list[int]]:
    """Positions of members that compile alike, together."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for position, member in enumerate(members):
        alike[member.signature].append(position)
    return list(alike.values())


def concrete(value: Any) -> Any:
    """A Python number where that is possible; a tracer stays one. An array has one element."""
    if isinstance(value, str):  # which float() would read
        raise ValueError("it is a string")
    if getattr(value, "ndim", 0):
        value = value.reshape(())
    return value if isinstance(value, Tracer) else float(value)
