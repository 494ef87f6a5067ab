"""From the class to the functional form and back: the same parameters and state, in the other form."""

import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimjax._core.algorithm import Algorithm, function_name
from optimjax._core.containers import as_array, not_deleted
from optimjax._core.definition import Definition, of_group
from optimjax._core.hyperparameters import Ignored, Numeric
from optimjax._core.partition import Partition, partition
from optimjax._core.reading import read_slot
from optimjax._core.states import COUNTS, slots_of
from optimjax._core.tracing import holds_tracer
from optimjax._core.tree import copied_array, dotted
from optimjax._engine.state import ParameterState
from optimjax._params.handed import Handed, name_of
from optimjax._params.parameter import Parameter

__all__ = ["algorithm_of", "check_like", "functional_state", "taken_over"]

Groups = Sequence[Mapping[str, Any]]


class Part(NamedTuple):
    """Groups that one algorithm of a partition updates."""

    definition: Definition
    groups: Groups


def algorithm_of(
    make: Callable[[Mapping[str, Any]], Algorithm], own: Definition, groups: Groups, handed: Handed
) -> Algorithm:
    """The functional form of an optimizer with these groups; ``make`` makes it of hyperparameters.

    Where groups have algorithms of their own, it is a partition.

    Raises:
      ValueError: the groups differ in what must be the same for all parameters.
    """
    if not _is_mixed(groups):
        return make(hyperparameters(own, groups, handed))
    parts = _parts(own, groups)
    if not parts:
        raise ValueError("all parameters are frozen, so none of the algorithms has a functional form")
    labels = {
        parameter: label for label, part in parts.items() for group in part.groups for parameter in group["params"]
    }
    algorithms = {
        label: Algorithm(part.definition, hyperparameters(part.definition, part.groups, handed))
        for label, part in parts.items()
    }
    return partition(algorithms, handed.arranged({p: label for p, label in labels.items() if p.requires_grad}))


def _is_mixed(groups: Groups) -> bool:
    return any("algorithm" in group for group in groups)


def _parts(own: Definition, groups: Groups) -> dict[str, Part]:
    """By label, the groups with parameters that train: those of one algorithm, where it compiles in the same."""
    alike: dict[Any, list[Mapping[str, Any]]] = {}
    for index, group in enumerate(groups):
        if any(parameter.requires_grad for parameter in group["params"]):
            definition = of_group(group, own)
            _, flags = definition.resolve(group, f" of param_groups[{index}]")
            alike.setdefault((definition, flags), []).append(group)
    parts: dict[str, Part] = {}
    for (definition, _), members in alike.items():
        label = name = _legal_label(function_name(definition.name))
        number = 1
        while label in parts:
            number += 1
            label = f"{name}_{number}"
        parts[label] = Part(definition, members)
    return parts


def _legal_label(name: str) -> str:
    """The name of a function as the name of a field of a state."""
    name = name.lstrip("_")
    return f"{name}_" if keyword.iskeyword(name) or name in COUNTS else name


def hyperparameters(definition: Definition, groups: Groups, handed: Handed) -> dict[str, Any]:
    """The hyperparameters of the groups by name; where these differ, trees of values.

    Raises:
      ValueError: the groups differ in what must be the same for all parameters.
    """
    values = {}
    for name, kind in definition.hyperparameters.kinds.items():
        given = [group[name] for group in groups]
        if isinstance(kind, Ignored) or all(_equal(value, given[0]) for value in given[1:]):
            values[name] = given[0]
        elif isinstance(kind, Numeric) and not any(map(kind.is_fixed, given)):
            by_parameter = {parameter: group[name] for group in groups for parameter in group["params"]}
            if kind.fixed is not None:  # lists of tuples of numbers may look like a table; with arrays they do not
                by_parameter = {parameter: jax.tree.map(_as_array, each) for parameter, each in by_parameter.items()}
            values[name] = handed.arranged(by_parameter)
        else:
            raise ValueError(f"the functional form has one {name!r} for all parameters, the groups have {given}")
    return values


def _as_array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, (int, float)) else value


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are known to be equal; tracers are only where they are the same one."""
    return a is b or (not holds_tracer((a, b)) and bool(a == b))


def functional_state(
    algorithm: Algorithm, own: Definition, groups: Groups, state: Mapping[Any, Any], handed: Handed
) -> tuple[Any, Any]:
    """Parameters and state of the functional form; see :meth:`optimjax.Optimizer.functional_state`."""
    if not isinstance(algorithm, Partition):
        return _functional_state(algorithm, groups, state, handed)
    values = {p: p.value for group in groups for p in group["params"] if p.requires_grad}
    states = [
        _functional_state(algorithm.algorithms[label], part.groups, state, handed)[1]
        for label, part in _parts(own, groups).items()
    ]
    count = max((one.step for one in states), key=int)
    return handed.arranged(values), algorithm.state_class(*algorithm.first_counts(copied_array(count)), *states)


def _functional_state(
    algorithm: Algorithm, groups: Groups, state: Mapping[Any, Any], handed: Handed
) -> tuple[Any, Any]:
    fields = _fields(algorithm.definition, groups)
    entries = {parameter: dict(state.get(parameter, {})) for parameter in fields}
    # Where PyTorch keeps no count, the slots say whether there was an update; where there are none, nothing does.
    counts = {entry.get("step", 0) for entry in entries.values()}
    if not algorithm.definition.arithmetic.counts_steps:
        counts = {int(bool(entry)) for parameter, entry in entries.items() if fields[parameter]}
    if len(counts) > 1:
        raise ValueError(
            f"parameters have done different numbers of updates ({', '.join(map(str, sorted(counts)))}): "
            "the functional state has one count for all"
        )
    params = handed.arranged({parameter: parameter.value for parameter in fields})
    initial = algorithm.init(params)

    def one(parameter: Parameter, field: str, slot: Any) -> Any:
        present = entries[parameter].get(field)
        if present is None:
            return slot
        where = f"state of parameter {name_of(parameter, groups)!r}: {field!r}"  # which may have been edited
        return read_slot(present, slot, parameter.value, where, slot)

    def filled(field: str) -> Any:
        pairs = handed.pairs(getattr(initial, field))
        return handed.arranged(
            {parameter: one(parameter, field, slot) for parameter, slot in pairs if parameter in entries}
        )

    slots = {field: filled(field) for field in slots_of(initial)}
    count = max(counts, default=0)
    if count > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"{count} updates were done, more than the functional state can count (int32)")
    return params, initial._replace(step=jnp.full_like(initial.step, count), **slots)


def taken_over(
    algorithm: Algorithm,
    own: Definition,
    groups: Groups,
    state: Mapping[Any, Any],
    handed: Handed,
    params: Any,
    new: Any,
) -> tuple[dict[Parameter, Any], dict[Any, Any]]:
    """The values of parameters, and the optimizer's whole state, after updates of the functional form.

    Args:
      algorithm: the functional form.
      own: what updates groups without an algorithm of their own.
      groups: of the optimizer.
      state: what it keeps.
      handed: what it was made from.
      params: what the functional form has made of its parameters.
      new: and of its state.

    Raises:
      ValueError: they have another structure, or other shapes or dtypes, than the optimizer's own.
    """
    mixed = isinstance(algorithm, Partition)
    parts = _parts(own, groups) if mixed else {"": Part(own, groups)}
    fields = {label: _fields(part.definition, part.groups) for label, part in parts.items()}
    crossing = [parameter for each in fields.values() for parameter in each]
    kept = {parameter: dict(state.get(parameter, {})) for parameter in crossing}
    present = handed.arranged({parameter: parameter.value for parameter in crossing})
    expected = jax.eval_shape(algorithm.init, present)
    dtypes: dict[str, set[Any]] = {}
    for label in parts:
        dtypes |= _kept_dtypes(label, {p: kept[p] for p in fields[label]}, handed, _of_label(expected, label))
    check_like((params, new), (present, expected), dtypes)
    values = dict(handed.pairs(params))
    written = {key: value for key, value in state.items() if key not in kept}
    for label, part in parts.items():
        states = _states(part.definition, fields[label], kept, handed, _of_label(new, label))
        written |= {parameter: entries for parameter, entries in states.items() if entries}
    return {parameter: as_array(values[parameter]) for parameter in crossing}, written


def _of_label(state: Any, label: str) -> Any:
    """The state of one part; without a label, there is one part only."""
    return getattr(state, label) if label else state


def _states(
    definition: Definition,
    fields: Mapping[Parameter, tuple[str, ...]],
    kept: Mapping[Parameter, Mapping[str, Any]],
    handed: Handed,
    new: Any,
) -> dict[Parameter, ParameterState]:
    """What a functional state has for each parameter, and what the user keeps alongside."""
    rule, step = definition.arithmetic, int(new.step)
    columns = {field: dict(handed.pairs(getattr(new, field))) for field in slots_of(new)}
    count = {"step": step} if rule.counts_steps else {}
    slots = {"step", *definition.slot_names}
    states = {}
    for parameter, active in fields.items():
        others = {name: value for name, value in kept[parameter].items() if name not in slots}
        entries = count | {field: jax.tree.map(as_array, columns[field][parameter]) for field in active}
        states[parameter] = ParameterState(others | (entries if step or rule.eager else {}))
    return states


def _fields(definition: Definition, groups: Groups) -> dict[Parameter, tuple[str, ...]]:
    """The parameters that cross, which are those that are not frozen, and the slots of each.

    Raises:
      NotImplementedError: there is no rule, as for LBFGS, or for a ``step`` written in Python.
    """
    if definition.rule is None:
        raise NotImplementedError(
            f"{definition.name} has no rule for one parameter, so its state cannot be taken over: "
            "begin a new run of the functional form with optimizer.params"
        )
    fields = {}
    for index, group in enumerate(groups):
        _, flags = definition.resolve(group, f" of param_groups[{index}]")
        for parameter in group["params"]:
            if parameter.requires_grad:
                fields[parameter] = definition.fields(flags, parameter.shape, parameter.dtype)
    return fields


def _kept_dtypes(
    label: str, kept: Mapping[Parameter, Mapping[str, Any]], handed: Handed, expected: Any
) -> dict[str, set[Any]]:
    """The dtypes of slots that were loaded in another one than a new state has: by name, as in messages."""
    dtypes: dict[str, set[Any]] = {}
    for field in slots_of(expected):
        present = handed.arranged({parameter: entries.get(field) for parameter, entries in kept.items()})
        tree = {label: {field: present}} if label else {field: present}
        leaves = jax.tree_util.tree_flatten_with_path({"state": tree})[0]
        dtypes.update({dotted(path): {jnp.result_type(leaf)} for path, leaf in leaves})
    return dtypes


def check_like(given: Any, expected: Any, kept: dict[str, set[Any]]) -> None:
    """Raise where parameters and state have not the structure, shapes and dtypes of the optimizer's own."""
    ours, treedef = jax.tree_util.tree_flatten_with_path(dict(zip(("params", "state"), expected, strict=True)))
    leaves, structure = jax.tree.flatten(dict(zip(("params", "state"), given, strict=True)))
    if structure != treedef:
        raise ValueError(f"parameters and state must have the structure {treedef}, got {structure}")
    for (path, own), leaf in zip(ours, leaves, strict=True):
        name, shape, dtype = dotted(path), np.shape(leaf), jnp.result_type(leaf)
        try:
            not_deleted(leaf)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be taken over: {error}") from None
        if shape != own.shape or dtype not in {own.dtype, *kept.get(name, ())}:
            raise ValueError(
                f"{name!r} has shape and dtype {(shape, dtype)}, the optimizer's has {(own.shape, own.dtype)}"
            )
