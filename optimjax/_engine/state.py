"""What an optimizer keeps for its parameters between steps.

Who has the slots of a parameter, for which the optimizer's ``state`` has a ParameterState::

    ParameterState._values    slots that somebody may have seen; a step works on copies of them
    ParameterState.place ---> Place ---> Store.slots    slots that the last step has left and nobody has seen, together
                                              ^         with others; the next step updates them in place
    Bucket -----------------------------------'         what the next step starts from, with the compiled program's key
    ParameterState.claim ---> Store.whole               whoever looks takes the slots away, and says so here

No arrow leads back, so that arrays are freed as soon as the optimizer is.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from optimjax._core.definition import Definition
from optimjax._engine.handover import Handover
from optimjax._engine.watch import Tally

__all__ = ["ParameterState", "Place", "Store"]


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


class Store:
    """Where the slots of several parameters are between steps.

    Attributes:
      handover: to be asked before looking.
      definition: whose slots they are.
      structures: of the slots of each parameter.
      slots: for each parameter its slots, a list of arrays; ``None`` where somebody has taken them.
      steps: updates tried here.
      before: how many updates the optimizer had skipped before the first of these.
      tally: of those skipped until the last of these.
      whole: whether what a step is going to start from is still what it was.
    """

    __slots__ = ("before", "definition", "handover", "slots", "steps", "structures", "tally", "whole")

    def __init__(self, handover: Handover, definition: Definition, slots: Sequence[Any], tally: Tally):
        self.handover, self.definition = handover, definition
        self.structures = tuple(map(jax.tree.structure, slots))
        self.slots: list[list[Array] | None] = [jax.tree.leaves(slot) for slot in slots]
        self.steps = 0
        self.tally, self.before = tally, tally.total
        self.whole = True


class Place(NamedTuple):
    """Where the slots of a parameter are."""

    store: Store
    position: int
    flags: Any  # under which the slots were made
    shape: tuple[int, ...]  # of the parameter that they were made for
    start: int  # updates done before those of the store

    def fits(self, definition: Definition, flags: Any, shape: tuple[int, ...]) -> bool:
        """Whether the slots are such as this algorithm keeps, with these flags, for a parameter of this shape."""
        return (self.store.definition, self.flags, self.shape) == (definition, flags, shape)

    @property
    def slots(self) -> Any:
        """The present slots."""
        return self.store.structures[self.position].unflatten(self.store.slots[self.position])

    @property
    def step(self) -> Any:
        """Updates done; where some may have been skipped, this waits for the last one."""
        return self.start + self.store.steps - (self.store.tally.total - self.store.before)

    def entries(self) -> dict[str, Any]:
        """Slots and count, as PyTorch's state has them."""
        step, definition = self.step, self.store.definition
        # Where PyTorch keeps no count, the slots say that there was an update.
        none_yet = not definition.arithmetic.counts_steps and type(step) is int and step == 0
        return {} if none_yet else definition.entries(self.slots, step)

    def names(self) -> Iterable[str]:
        """The names of the entries."""
        structure = self.store.structures[self.position]
        return self.store.definition.entries(structure.unflatten(range(structure.num_leaves)), 0).keys()

    def left(self) -> list[tuple[Any, str, Any]]:
        """What has to be set once the slots are elsewhere, so that they are not updated in place here."""
        slots = list(self.store.slots)  # another list, because a program may just be given this one
        slots[self.position] = None
        return [(self.store, "whole", False), (self.store, "slots", slots)]
