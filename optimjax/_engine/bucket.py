"""Parameters that one program updates together."""

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import jax
from jax import Array

from optimjax._core.apply import apply_each
from optimjax._core.contract import Rule
from optimjax._core.definition import Definition, as_number
from optimjax._core.guard import Limits
from optimjax._engine.handover import Handover, Program, kind
from optimjax._engine.interned import interned
from optimjax._engine.state import ParameterState, Place, Store
from optimjax._engine.watch import Tally
from optimjax._params.parameter import Parameter
from optimjax._storage.placement import canonical, pin, pinned

__all__ = ["Bucket", "BucketStructure", "Member", "StepStructure", "update_bucket", "update_each"]


class Member(NamedTuple):
    """One parameter on its way into a bucket."""

    parameter: Parameter
    value: Array
    grad_kind: Any  # what decides what is compiled for its gradient
    group: int  # its index among the groups
    definition: Definition
    flags: Any
    state: ParameterState
    known: Any  # what the optimizer's state has for it, which may be nothing yet
    slots: Any
    step: int  # updates done

    @property
    def signature(self) -> tuple[Any, ...]:
        """Members that agree in it compile alike."""
        return self.value.shape, self.value.dtype, canonical(getattr(self.value, "sharding", None)), self.flags


class BucketStructure:
    """What is compiled in when a bucket is updated; equal ones are one object, as :func:`.interned` makes them.

    Attributes:
      rule: the rule.
      scalars: the NamedTuple type of its scalars.
      flags: the flags of each row of scalars.
      rows: for each parameter its row: by group and step count, never by values.
      slots: for each parameter the structure of its slots.
      pins: for each parameter where its value and its slots stay, see :func:`optimjax._storage.placement.pin`.
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


class StepStructure:
    """What is compiled in when one program updates all buckets of a step. Equal ones are one object.

    Attributes:
      buckets: the structure of each bucket.
      positions: for each bucket the positions of its parameters among those of the step.
    """

    def __init__(self, buckets: tuple[BucketStructure, ...], positions: tuple[tuple[int, ...], ...]):
        self.buckets, self.positions = buckets, positions


def update_each(
    structure: BucketStructure, slots: Any, params: Any, grads: Any, rows: Any, limits: Limits
) -> tuple[list[list[Array]], list[Array]]:
    """New slots, as lists of arrays, and new parameters.

    The slots come first, because JAX gives donated memory to the first outputs that fit: in the other order the
    parameters would take it, and every slot would be copied.
    """
    scalars = [structure.scalars(*row) for row in rows]
    results = apply_each(
        structure.rule,
        [structure.flags[row] for row in structure.rows],
        params,
        limits.clipped(grads),
        [treedef.unflatten(leaves) for treedef, leaves in zip(structure.slots, slots, strict=True)],
        [scalars[row] for row in structure.rows],
        limits.counts,
    )
    new_slots, new_params = [jax.tree.leaves(slot) for _, slot in results], [param for param, _ in results]
    pins = [list(slots) for _, slots in structure.pins], [param for param, _ in structure.pins]
    return pinned((new_slots, new_params), pins)


update_bucket = Program(update_each, static=1)
SLOTS, PARAMS = 1, 2  # positions of its arguments that may be updated in place


class Bucket:
    """Parameters that one program updates: what the next step starts from.

    Attributes:
      structure: what is compiled in.
      parameters: the parameters.
      values: of the parameters.
      store: their slots.
    """

    def __init__(
        self,
        handover: Handover,
        definition: Definition,
        scalars: Any,
        members: Sequence[Member],
        shared: bool,
        tally: Tally,
    ):
        self.parameters = [member.parameter for member in members]
        self.values = [member.value for member in members]
        self.store = Store(handover, definition, [member.slots for member in members], tally)
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
        self.structure = interned(
            BucketStructure,
            definition.arithmetic,
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
            and all(map(is_, self.values, [p.value for p in self.parameters]))
            and all(map(is_, self._known, map(state.get, self.parameters)))
        )

    def scalars(self, hypers: Sequence[Any], known: dict[tuple[int, int], Any], tally: Tally, skips: bool) -> Any:
        """The rows of scalars for the next step, as one array.

        Args:
          hypers: of the groups.
          known: collects the rows by group and count.
          tally: of the steps that were skipped.
          skips: whether this one may be.
        """

        def rows_at(skipped: int) -> list[Any]:
            rows = []
            for group, step in self._rows:
                key = group, step + self.store.steps + 1 - (skipped - self.store.before)
                if key not in known:
                    known[key] = list(map(as_number, self.structure.rule.scalars(key[1], hypers[group])))
                rows.append(known[key])
            return rows

        return tally.chosen(rows_at, skips, self.values[0])

    def commit(
        self,
        slots: list[Any],
        params: list[Array],
        steps: int,
        tally: Tally,
        state: MutableMapping[Parameter, ParameterState],
    ) -> list[tuple[Any, str, Any]]:
        """Write the results of the program into the parameters; ``steps`` are tried then, some of which are skipped.

        Returns:
          What remains to be set, see :class:`optimjax._engine.handover.Launch`.
        """
        for parameter, param in zip(self.parameters, params, strict=True):
            parameter._write(param)
        store = self.store
        remaining = [
            (store, "slots", slots), (store, "steps", steps), (store, "tally", tally), (self, "values", params)
        ]  # fmt: skip
        if self._committed and self.store.whole:
            return remaining
        # The first time; or somebody has looked at the slots before the program, which left them alone, has returned.
        known: list[Any] = []
        for parameter, entry, place, leaves in zip(self.parameters, self._entries, self._places, slots, strict=True):
            if leaves or self.structure.rule.counts_steps:
                remaining += entry.moved(place, self.store.handover, self.store)
                state[parameter] = entry
                known.append(entry)
            else:  # Where there is nothing to keep, as for SGD without momentum, PyTorch has no state.
                known.append(None)
        return [*remaining, (self, "_known", known), (self, "_committed", True), (self.store, "whole", True)]

    def drop(self) -> None:
        """Release the values; only the slots are still needed."""
        self.values, self.store.whole = [], False
