"""From gradients to buckets: which parameters share a program, and what the next step starts from."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Set
from operator import is_
from typing import Any

import jax
from jax import Array
from jax.core import Tracer

from optimjax._core.definition import Definition, of_group
from optimjax._core.guard import Limits
from optimjax._core.reading import as_count, read_slot
from optimjax._core.tree import by_key, check_gradient, copied_array
from optimjax._engine.bucket import Bucket, Member, StepStructure
from optimjax._engine.handover import Call, Handover, kinds
from optimjax._engine.interned import interned
from optimjax._engine.state import ParameterState, Place
from optimjax._engine.watch import Tally, Watch
from optimjax._params.handed import name_of
from optimjax._params.parameter import Parameter

__all__ = ["Plan", "Planner", "distinct"]

PATTERNS = 8  # patterns of present gradients that get programs of their own
MIXED = 256  # parameters of any shapes that one program updates; see docs/architecture.md for the measurement
ALIKE = 64  # parameters of one shape, where there are more


class Plan:
    """The buckets of a step, for as long as the next step is of the same kind.

    Attributes:
      key: what must be equal in the next step.
      buckets: in the order of their programs' calls.
    """

    def __init__(self, key: Any, buckets: list[Bucket], parameters: list[Parameter]):
        self.key, self.buckets, self._parameters = key, buckets, parameters

    @functools.cached_property
    def structure(self) -> StepStructure:
        """What is compiled in where one program updates all buckets."""
        order = {parameter: index for index, parameter in enumerate(self._parameters)}
        positions = (tuple(order[parameter] for parameter in bucket.parameters) for bucket in self.buckets)
        return interned(StepStructure, tuple(bucket.structure for bucket in self.buckets), tuple(positions))

    def calls(self, grads: Mapping[Parameter, Any], rows: Sequence[Any], in_place: bool, limits: Limits) -> list[Call]:
        """The calls of :data:`update_bucket`, which may update parameters in place, too."""
        values = [bucket.values for bucket in self.buckets]
        if in_place:
            rest = iter(distinct(list(itertools.chain(*values)), list(grads.values())))
            values = [[next(rest) for _ in part] for part in values]
        kind = tuple(limit is None for limit in limits), *kinds(jax.tree.leaves(limits))
        return [
            Call(
                (b.structure, isinstance(row, jax.Array), *kind),
                (b.structure, b.store.slots, part, [grads[p] for p in b.parameters], row, limits),
            )
            for b, part, row in zip(self.buckets, values, rows, strict=True)
        ]

    def commit(
        self, state: MutableMapping[Parameter, ParameterState], watch: Watch, tally: Tally
    ) -> Callable[[list[Any], Any, Any], list[tuple[Any, str, Any]]]:
        """What takes over results of the next step, its norm, and whether it counts (``None``: it does).

        The tally is that of the steps before it. See :class:`optimjax._engine.handover.Launch`.
        """
        steps = [bucket.store.steps + 1 for bucket in self.buckets]

        def commit(results: list[Any], norm: Any, counts: Any) -> list[tuple[Any, str, Any]]:
            new = tally.after(counts)
            remaining: list[tuple[Any, str, Any]] = [(watch, "norm", norm), (watch, "tally", new)]
            for bucket, count, (slots, params, *_) in zip(self.buckets, steps, results, strict=False):
                remaining += bucket.commit(slots, params, count, new, state)
            return remaining

        return commit

    def drop(self) -> None:
        """See :meth:`Bucket.drop`."""
        for bucket in self.buckets:
            bucket.drop()


class Planner:
    """Plans the steps of one optimizer; a step that is like the last one takes over its plan.

    Attributes:
      plan: of the last step.
    """

    def __init__(self, own: Definition, handover: Handover):
        self._own, self._handover = own, handover
        self.plan: Plan | None = None
        self._patterns: list[tuple[Any, list[list[int]]]] = []
        self._resolved: dict[int, tuple[list[Any], Any]] = {}

    def planned(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Parameter, Any],
        grads: Mapping[Parameter, Any],
        tally: Tally,
        skips: bool,
        together: bool = False,
    ) -> tuple[Plan, list[Any]]:
        """The buckets of a step, and the scalars of each; everything is checked here, before anything changes.

        Args:
          groups: of the optimizer, with the parameters and the present hyperparameters.
          state: what is kept for each parameter.
          grads: by parameter, whatever is not ``None``.
          tally: of the steps that were skipped.
          skips: whether this one may be.
          together: one bucket for each algorithm, in the order of ``grads``; as it always is for a rule that takes all
            parameters at once.
        """
        definitions = [of_group(group, self._own) for group in groups]
        resolved = [self.resolved(groups, index) for index in range(len(groups))]
        hypers, flags = [hyper for hyper, _ in resolved], [flag for _, flag in resolved]
        sizes = [len(group["params"]) for group in groups]
        leaves, structure = jax.tree.flatten(list(grads.values()))  # a sparse gradient has two
        parameters = [parameter for group in groups for parameter in group["params"]]
        key = together, sizes, definitions, flags, parameters, list(grads), structure, kinds(leaves)
        plan = self.plan
        if plan is None or plan.key != key or not all(bucket.fits(state) for bucket in plan.buckets):
            _check_known(tally)
            if twice := [p for p, count in Counter(parameters).items() if count > 1]:
                names = ", ".join(name_of(parameter, groups) for parameter in twice[:3])
                raise ValueError(f"a parameter appears more than once in the groups, which were edited: {names}")
            members = self._members(groups, state, grads, resolved)
            positions, shared = self._layout(members)
            if together:
                order = {parameter: index for index, parameter in enumerate(grads)}
                positions = in_order(members, [order[member.parameter] for member in members])
            if plan is not None:
                plan.drop()
            buckets = []
            for part in positions:
                first = members[part[0]]
                scalars = type(first.definition.arithmetic.scalars(1, hypers[first.group]))
                parts = [members[index] for index in part]
                buckets.append(Bucket(self._handover, first.definition, scalars, parts, shared, tally))
            self.plan = plan = Plan(key, buckets, list(grads))
        known: dict[tuple[int, int], Any] = {}
        return plan, [bucket.scalars(hypers, known, tally, skips) for bucket in plan.buckets]

    def resolved(self, groups: Sequence[Mapping[str, Any]], index: int) -> tuple[Any, Any]:
        """A group's hyperparameters and flags; the same again until somebody edits the group."""
        group = groups[index]
        definition = of_group(group, self._own)
        given = [definition, *map(group.get, definition.hyperparameters.kinds)]
        known = self._resolved.get(index)
        if known is None or len(given) != len(known[0]) or not all(map(is_, given, known[0])):
            known = given, definition.resolve(group, f" of param_groups[{index}]")
            if all(map(_is_constant, given[1:])):
                self._resolved[index] = known
        return known[1]

    def _layout(self, members: list[Member]) -> tuple[list[list[int]], bool]:
        """The members of each bucket, and whether those of one group share a row of scalars.

        Each pattern of present gradients compiles programs of its own. Where there is no end of patterns (routing,
        stochastic depth), later ones use programs from a bounded set. Step counts must not multiply programs either:
        where a group's counts differ, each member has its own row.
        """
        even = len({(m.group, m.step) for m in members}) == len({m.group for m in members})
        pattern = [(member.definition, member.signature, member.group if even else 0) for member in members]
        for known, positions in self._patterns:
            if pattern == known:
                return positions, even
        if len(self._patterns) == PATTERNS:
            return bounded_layout(members), False
        self._patterns.append((pattern, layout(members)))
        return self._patterns[-1][1], even

    def _members(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Parameter, Any],
        grads: Mapping[Parameter, Any],
        resolved: Sequence[tuple[Any, Any]],
    ) -> list[Member]:
        members: list[Member] = []
        missing: dict[int, dict[str, Any]] = {}
        definitions = {of_group(group, self._own) for group in groups}
        for index, group in enumerate(groups):
            definition = of_group(group, self._own)
            for parameter in group["params"]:
                if (grad := grads.get(parameter)) is not None:
                    value, name = parameter.value, functools.partial(name_of, parameter, groups)
                    check_gradient(name, value, grad)
                    definition.check_layout(grad, name)
                    known = state.get(parameter)
                    kept = ParameterState.of({} if known is None else known)
                    flags = resolved[index][1]
                    _check_not_moved(definition, definitions, name, kept)
                    slots, seen, step = _prepared(definition, name, value, kept, flags)
                    if slots is None:
                        missing[len(members)] = seen
                    grad_kind = tuple(kinds(jax.tree.leaves(grad)))
                    members.append(
                        Member(parameter, value, grad_kind, index, definition, flags, kept, known, slots, step)
                    )
        for definition, positions in _by_definition(members, missing).items():
            values, all_flags = ([getattr(members[at], field) for at in positions] for field in ("value", "flags"))
            hypers = [resolved[members[at].group][0] for at in positions]
            for at, slots in zip(positions, definition.slots(values, hypers, all_flags), strict=True):
                members[at] = members[at]._replace(slots=slots._replace(**missing[at]))
        return members


def _check_known(tally: Tally) -> None:
    """Raise where only values that JAX traces tell how many updates were done, and so which parameters go together."""
    if isinstance(tally.total, Tracer):
        raise RuntimeError(
            "inside a function that JAX traces, a step after one that may have been skipped must be of the same kind, "
            "with gradients for the same parameters: take optimizer.algorithm and functional_state() there"
        )


def _check_not_moved(
    definition: Definition, definitions: Set[Definition], name: Callable[[], str], state: ParameterState
) -> None:
    """Raise where a parameter has state of another algorithm of the optimizer, from whose group it has come."""
    if len(definitions) == 1 or (isinstance(state.place, Place) and state.place.store.definition is definition):
        return
    values = state.peek()
    for other in definitions - {definition}:
        if left := [slot for slot in other.slot_names if slot in values and slot not in definition.slot_names]:
            raise ValueError(
                f"parameter {name()!r} has {left[0]!r} of {other.name}, and its group is updated by {definition.name}: "
                "a parameter that goes to another algorithm begins again, so delete optimizer.state[parameter]"
            )


def _prepared(
    definition: Definition, name: Callable[[], str], param: Array, state: ParameterState, flags: Any
) -> tuple[Any, dict[str, Any], int]:
    """Slots that a step may update in place, or ``None`` where some are missing; those that are not; the count.

    Slots that somebody has seen are checked, because they may have been edited, and copied.
    """
    rule, place = definition.arithmetic, state.place
    if isinstance(place, Place) and place.fits(definition, flags, param.shape):
        return place.slots, {}, place.step
    values = state.peek()
    types = definition.slot_types(flags, param.shape, param.dtype)
    of_parameter = f"state of parameter {name()!r}" if values else ""
    seen = {
        field: jax.tree.map(copied_array, read_slot(values[field], type_, param, f"{of_parameter}: {field!r}"))
        for field, type_ in types.items()
        if type_ is not None and values.get(field) is not None
    }
    complete = all(type_ is None or field in seen for field, type_ in types.items())
    # Where PyTorch keeps no count, the presence of the slots says whether this is the first update.
    step = as_count(values.get("step", 0), f"{of_parameter}: 'step'") if rule.counts_steps else int(complete)
    return rule.slots(**dict.fromkeys(types) | seen) if complete else None, seen, step


def _is_constant(value: Any) -> bool:
    """Whether a value of a group can only be replaced, not edited in place."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str))


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
    """Positions of the members of each bucket: all together, or if they are many, first 64 of one shape at a time.

    Compiling costs by distinct shapes and by programs, dispatching by programs, tracing by parameters. Each algorithm
    has its own buckets; one that takes all parameters at once has one.
    """
    result = []
    for definition, positions in _by_definition(members).items():
        whole, rest = definition.arithmetic.takes == "all", positions
        if not whole and len(positions) > MIXED:
            rest = []
            for alike in _alike(members, positions):
                cut = len(alike) - len(alike) % ALIKE
                result += [alike[start : start + ALIKE] for start in range(0, cut, ALIKE)]
                rest += alike[cut:]
        size = len(rest) if whole else MIXED
        result += [rest[start : start + size] for start in range(0, len(rest), size)]
    return result


def bounded_layout(members: Sequence[Member]) -> list[list[int]]:
    """Split each shape into runs of 64, 32, ..., 1: at most seven programs, whichever parameters have gradients."""
    result = []
    for definition, of_one in _by_definition(members).items():
        if definition.arithmetic.takes == "all":
            result.append(of_one)
            continue
        result += _runs(members, of_one)
    return result


def _runs(members: Sequence[Member], positions: Sequence[int]) -> list[list[int]]:
    result = []
    for left in _alike(members, positions):
        size = ALIKE
        while left:
            if len(left) < size:
                size //= 2
                continue
            result.append(left[:size])
            left = left[size:]
    return result


def in_order(members: Sequence[Member], order: Sequence[int]) -> list[list[int]]:
    """One bucket for each algorithm, its parameters in this order."""
    return [sorted(part, key=order.__getitem__) for part in _by_definition(members).values()]


def _by_definition(members: Sequence[Member], positions: Iterable[int] | None = None) -> dict[Any, list[int]]:
    return by_key([member.definition for member in members], positions)


def _alike(members: Sequence[Member], positions: Sequence[int]) -> list[list[int]]:
    """Positions of members that compile alike, together."""
    return list(by_key([member.signature for member in members], positions).values())
