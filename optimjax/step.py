"""How a step of the facade runs: compiled programs, each for a bucket of parameters, and what is kept between steps.

Who has the slots of a parameter, for which the optimizer's ``state`` has a ParameterState::

    ParameterState._values    slots that somebody may have seen; a step works on copies of them
    ParameterState.place ---> Place ---> Store.slots    slots that the last step has left and nobody has seen, together
                                              ^         with others; the next step updates them in place
    Bucket -----------------------------------'         what the next step starts from, with the compiled program's key
    ParameterState.claim ---> Store.whole               whoever looks takes the slots away, and says so here

No arrow leads back, so that arrays are freed as soon as the optimizer is.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax.handover import Call, Commit, Handover, Program, kind
from optimjax.interned import interned
from optimjax.parameter import Parameter
from optimjax.placement import canonical, pin, pinned
from optimjax.rule import Rule, apply_each
from optimjax.tree import copied_array

__all__ = [
    "Bucket",
    "Member",
    "ParameterState",
    "Place",
    "Plan",
    "Updates",
    "bounded_layout",
    "concrete",
    "distinct",
    "entries",
    "layout",
    "update_bucket",
    "update_each",
]

ALIKE = 64  # parameters of one shape that one program updates; see docs/architecture.md for the measurement
MIXED = 256  # parameters of any shapes


class ParameterState(MutableMapping[str, Any]):
    """What the optimizer keeps for one parameter: arrays by name, and ``step``.

    A step gives the arrays to a compiled program, which updates them in place. Arrays that were read through this
    mapping may be in the user's hands, so the next step works on copies of them: an array once read stays valid.
    Reading waits for a step in another thread to end.
    """

    __slots__ = ("_handover", "_values", "claim", "place")

    def __init__(self, values: Mapping[str, Any] = {}):
        self._values = dict(values)
        self._handover: Handover | None = None
        self.place: Any = None  # of what is newer than the values: a Place, or for LBFGS, which has no buckets, `Kept`
        self.claim: Store | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ParameterState":
        """The values themselves if they are such a state; or one with them, where somebody has set a dict."""
        return values if isinstance(values, cls) else cls(values)

    def peek(self) -> dict[str, Any]:
        """The entries; from now on they count as seen."""
        if self._handover is None:  # no step has met it yet
            return self._values
        with self._handover.lock:
            self._handover.look()
            if self.claim is not None:
                self.claim.whole, self.claim = False, None
                self._handover.taken += 1
            if (place := self.place) is not None:
                self._handover.taken += 1
                self._values = self._values | place.entries()
                self.place = None
                for target, name, value in place.left():
                    setattr(target, name, value)
            return self._values

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays, which do not count as seen by that."""
        place = self.place
        entries = self._values | (place.entries() if place is not None else {})
        return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(list(entries.values())))

    def claimed(self, store: "Store") -> None:
        """Note that a step is going to start from what is here now."""
        self._handover, self.claim = store.handover, store

    def moved(self, place: Any, handover: Handover, claim: "Store | None" = None) -> list[tuple[Any, str, Any]]:
        """What has to be set for the slots to be at this place: attributes of objects, and their values."""
        kept = place.names()  # what was seen once must not be held for good
        values = {name: value for name, value in self._values.items() if name not in kept}
        before = self.place
        return [
            *(before.left() if before is not None and before != place else ()),
            (self, "_values", values),
            (self, "_handover", handover),
            (self, "claim", claim),
            (self, "place", place),
        ]

    def __getitem__(self, name: str) -> Any:
        return self.peek()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.peek()[name] = value

    def __delitem__(self, name: str) -> None:
        del self.peek()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.peek()))

    def __len__(self) -> int:
        return len(self.peek())

    def __repr__(self) -> str:
        return repr(self.peek())

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParameterState":
        return ParameterState(self.peek())  # a step does not touch the arrays that either of them has

    def __reduce__(self) -> Any:
        return ParameterState, (dict(self.peek()),)


class Member(NamedTuple):
    """One parameter on its way into a bucket."""

    parameter: Parameter
    value: Array
    grad_kind: Any  # what decides what is compiled for its gradient
    group: int  # its index among the groups
    flags: Any
    state: ParameterState
    known: Any  # what the optimizer's state has for it, which may be nothing yet
    slots: Any
    step: int  # updates done

    @property
    def signature(self) -> tuple[Any, ...]:
        """Members that agree in it compile alike."""
        return self.value.shape, self.value.dtype, canonical(getattr(self.value, "sharding", None)), self.flags


class Updates:
    """What is compiled in when a bucket is updated: structure only. Equal ones are one object.

    Attributes:
      rule: the rule.
      scalars: the NamedTuple type of its scalars.
      flags: the flags of each row of scalars.
      rows: for each parameter its row: by group and step count, never by values.
      slots: for each parameter the structure of its slots.
      pins: for each parameter where its value and its slots stay, see :func:`optimjax.placement.pin`.
    """

    def __init__(
        self,
        rule: Rule,
        scalars: Any,
        flags: tuple[Any, ...],
        rows: tuple[int, ...],
        slots: tuple[Any, ...],
        pins: tuple[Any, ...],
        kinds: Hashable,  # of the arrays: what else decides which executable runs
    ):
        self.rule, self.scalars, self.flags, self.rows, self.slots, self.pins = rule, scalars, flags, rows, slots, pins


def update_each(
    updates: Updates, slots: Any, params: Any, grads: Any, rows: Any
) -> tuple[list[list[Array]], list[Array]]:
    """New slots, as lists of arrays, and new parameters.

    The slots come first, because JAX gives donated memory to the first outputs that fit: in the other order the
    parameters would take it, and every slot would be copied.
    """
    scalars = [updates.scalars(*row) for row in rows]
    results = apply_each(
        updates.rule,
        [updates.flags[row] for row in updates.rows],
        params,
        grads,
        [structure.unflatten(leaves) for structure, leaves in zip(updates.slots, slots, strict=True)],
        [scalars[row] for row in updates.rows],
    )
    new_slots, new_params = [jax.tree.leaves(slot) for _, slot in results], [param for param, _ in results]
    pins = [list(slots) for _, slots in updates.pins], [param for param, _ in updates.pins]
    return pinned((new_slots, new_params), pins)


update_bucket = Program(update_each, static=1)
SLOTS, PARAMS = 1, 2  # positions of its arguments that may be updated in place


class Store:
    """Where the slots of several parameters are between steps.

    Attributes:
      handover: to be asked before looking.
      rule: whose slots they are.
      structures: of the slots of each parameter.
      slots: for each parameter its slots, a list of arrays; ``None`` where somebody has taken them.
      steps: updates done here.
      whole: whether what a step is going to start from is still what it was.
    """

    __slots__ = ("handover", "rule", "slots", "steps", "structures", "whole")

    def __init__(self, handover: Handover, rule: Rule, slots: Sequence[Any]):
        self.handover, self.rule = handover, rule
        self.structures = tuple(map(jax.tree.structure, slots))
        self.slots: list[list[Array] | None] = [jax.tree.leaves(slot) for slot in slots]
        self.steps = 0
        self.whole = True


class Place(NamedTuple):
    """Where the slots of a parameter are."""

    store: Store
    position: int
    flags: Any  # under which the slots were made
    shape: tuple[int, ...]  # of the parameter that they were made for
    start: int  # updates done before those of the store

    @property
    def slots(self) -> Any:
        """The present slots."""
        return self.store.structures[self.position].unflatten(self.store.slots[self.position])

    @property
    def step(self) -> int:
        """Updates done."""
        return self.start + self.store.steps

    def entries(self) -> dict[str, Any]:
        """Slots and count, as PyTorch's state has them."""
        return entries(self.store.rule, self.slots, self.step)

    def names(self) -> Iterable[str]:
        """The names of the entries."""
        structure = self.store.structures[self.position]
        return entries(self.store.rule, structure.unflatten(range(structure.num_leaves)), self.step).keys()

    def left(self) -> list[tuple[Any, str, Any]]:
        """What has to be set once the slots are elsewhere, so that they are not updated in place here."""
        slots = list(self.store.slots)  # another list, because a program may just be given this one
        slots[self.position] = None
        return [(self.store, "whole", False), (self.store, "slots", slots)]


class Bucket:
    """Parameters that one program updates: what the next step starts from.

    Attributes:
      updates: what is compiled in.
      boxes: the parameters.
      values: of the parameters.
      store: their slots.
    """

    def __init__(self, handover: Handover, rule: Rule, scalars: Any, members: Sequence[Member], shared: bool):
        self.boxes = [member.parameter for member in members]
        self.values = [member.value for member in members]
        self.store = Store(handover, rule, [member.slots for member in members])
        self._entries = [member.state for member in members]
        self._places = [
            Place(self.store, index, member.flags, member.value.shape, member.step)
            for index, member in enumerate(members)
        ]
        self._known = [member.known for member in members]  # by the optimizer's state
        self._committed = False
        # Parameters of one group and step count share a row of scalars; or each has its own.
        keys = [(m.group, m.step) if shared else (m.group, m.step, index) for index, m in enumerate(members)]
        row = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        flags = {member.group: member.flags for member in members}
        self._rows = [key[:2] for key in row]
        slots = self.store.slots
        self.updates = interned(
            Updates,
            rule,
            scalars,
            tuple(flags[group] for group, _ in self._rows),
            tuple(row[key] for key in keys),
            self.store.structures,
            tuple((pin(value), tuple(map(pin, slot or ()))) for value, slot in zip(self.values, slots, strict=True)),
            tuple(
                (member.signature, kind(member.value), member.grad_kind, tuple(map(kind, slot or ())))
                for member, slot in zip(members, slots, strict=True)
            ),
        )
        for entry in self._entries:
            entry.claimed(self.store)

    def fits(self, state: Mapping[Parameter, ParameterState]) -> bool:
        """Whether the next step starts from these values and slots."""
        return (
            self.store.whole
            and all(map(is_, self.values, [box.value for box in self.boxes]))
            and all(map(is_, self._known, map(state.get, self.boxes)))
        )

    def scalars(self, hypers: Sequence[Any], known: dict[tuple[int, int], Any]) -> Any:
        """The rows of scalars for the next step, as one array; ``known`` collects those of a group and a count."""
        rows = []
        for group, step in self._rows:
            key = group, step + self.store.steps + 1
            if key not in known:
                known[key] = list(map(concrete, self.updates.rule.scalars(key[1], hypers[group])))
            rows.append(known[key])
        if any(isinstance(scalar, Tracer) for row in rows for scalar in row):  # the facade inside a `jit`
            return rows
        return np.array(rows)

    def commit(
        self, slots: list[Any], params: list[Array], steps: int, state: MutableMapping[Parameter, ParameterState]
    ) -> list[tuple[Any, str, Any]]:
        """Write the results of the program into the parameters; ``steps`` are done then.

        Returns:
          What remains to be set, see :class:`optimjax.handover.Launch`.
        """
        for box, param in zip(self.boxes, params, strict=True):
            box._write(param)
        remaining = [(self.store, "slots", slots), (self.store, "steps", steps), (self, "values", params)]
        if self._committed and self.store.whole:
            return remaining
        # The first time; or somebody has looked at the slots before the program, which left them alone, has returned.
        known: list[Any] = []
        for box, entry, place, leaves in zip(self.boxes, self._entries, self._places, slots, strict=True):
            if leaves or self.store.rule.counts_steps:
                remaining += entry.moved(place, self.store.handover, self.store)
                state[box] = entry
                known.append(entry)
            else:  # Where there is nothing to keep, as for SGD without momentum, PyTorch has no state.
                known.append(None)
        return [*remaining, (self, "_known", known), (self, "_committed", True), (self.store, "whole", True)]

    def drop(self) -> None:
        """Release the values; of further use are only the slots."""
        self.values, self.store.whole = [], False


def entries(rule: Rule, slots: Any, step: int) -> dict[str, Any]:
    """What PyTorch's state has: the slots that exist, by name, and ``step`` where it counts."""
    count = {"step": step} if rule.counts_steps else {}
    return count | {name: slot for name, slot in slots._asdict().items() if slot is not None}


class Plan:
    """The buckets of a step, for as long as the next step is of the same kind.

    Attributes:
      key: what must be equal in the next step.
      buckets: in the order of their programs' calls.
    """

    def __init__(self, key: Any, buckets: list[Bucket]):
        self.key, self.buckets = key, buckets

    def calls(self, grads: Mapping[Parameter, Any], rows: Sequence[Any], in_place: bool) -> list[Call]:
        """The calls of :data:`update_bucket`, which may update parameters in place, too."""
        values = [bucket.values for bucket in self.buckets]
        if in_place:
            rest = iter(distinct(list(itertools.chain(*values)), list(grads.values())))
            values = [[next(rest) for _ in part] for part in values]
        return [
            Call((b.updates,), (b.updates, b.store.slots, part, [grads[box] for box in b.boxes], row))
            for b, part, row in zip(self.buckets, values, rows, strict=True)
        ]

    def commit(self, state: MutableMapping[Parameter, ParameterState]) -> Commit:
        """What takes the results of the next step over, see :class:`optimjax.handover.Launch`."""
        steps = [bucket.store.steps + 1 for bucket in self.buckets]

        def commit(results: list[Any]) -> list[tuple[Any, str, Any]]:
            remaining = []
            for bucket, count, (slots, params, *_) in zip(self.buckets, steps, results, strict=False):
                remaining += bucket.commit(slots, params, count, state)
            return remaining

        return commit

    def drop(self) -> None:
        """See :meth:`Bucket.drop`."""
        for bucket in self.buckets:
            bucket.drop()


def distinct(arrays: Sequence[Array], others: Any) -> list[Array]:
    """The arrays, with copies of those that occur again, or among the others: these cannot all be updated in place."""
    seen = set(map(id, jax.tree.leaves(others)))
    result = []
    for array in arrays:
        result.append(copied_array(array) if id(array) in seen else array)
        seen.add(id(array))
    return result


# --- Which parameters share a program ---------------------------------------------------------------------------------


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
