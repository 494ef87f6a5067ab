"""From the facade to the functional core and back: the same algorithm, parameters and state, in the other form."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax.lift import Algorithm, active_fields
from optimjax.parameter import Parameter
from optimjax.rule import Ignored, Rule
from optimjax.step import ParameterState
from optimjax.tree import dotted

if TYPE_CHECKING:
    from optimjax.optimizer import Optimizer

__all__ = ["algorithm_of", "functional_state", "load_functional_state"]


def algorithm_of(optimizer: "Optimizer") -> Algorithm:
    """The functional algorithm with the hyperparameters of the groups: where these differ, trees of values.

    Raises:
      ValueError: the groups differ in what must be the same for all parameters.
    """
    groups = optimizer.param_groups
    values = {}
    for name, kind in optimizer.hyperparameters.kinds.items():
        given = [group[name] for group in groups]
        if isinstance(kind, Ignored) or all(_equal(value, given[0]) for value in given[1:]):
            values[name] = given[0]
        elif name in optimizer.hyperparameters.numeric:
            values[name] = optimizer._arranged({box: group[name] for group in groups for box in group["params"]})
        else:
            raise ValueError(f"the functional form has one {name!r} for all parameters, the groups have {given}")
    return optimizer._algorithm(values)


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are known to be equal; tracers are only where they are the same one."""
    return a is b or (not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((a, b))) and bool(a == b))


def functional_state(optimizer: "Optimizer") -> tuple[Any, Any]:
    """See :meth:`optimjax.Optimizer.functional_state`."""
    rule, fields = _rule_of(optimizer), _fields(optimizer)
    entries = {box: dict(optimizer.state.get(box, {})) for box in fields}
    # Where PyTorch keeps no count, the slots say whether there was an update; where there are none, nothing does.
    counts = {entry.get("step", 0) for entry in entries.values()}
    if not rule.counts_steps:
        counts = {int(bool(entry)) for box, entry in entries.items() if fields[box]}
    if len(counts) > 1:
        raise ValueError(
            f"parameters have done different numbers of updates ({', '.join(map(str, sorted(counts)))}): "
            "the functional state has one count for all"
        )
    params = optimizer._arranged({box: box.value for box in fields})
    state = algorithm_of(optimizer).init(params)

    def filled(field: str, initial: Any) -> Any:
        pairs = optimizer._pair(initial)
        present = {box: entries[box].get(field) for box in entries}
        return optimizer._arranged(
            {box: slot if present[box] is None else present[box] for box, slot in pairs if box in entries}
        )

    slots = {field: filled(field, getattr(state, field)) for field in state._fields if field != "step"}
    count = max(counts, default=0)
    if count > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"{count} updates were done, more than the functional state can count (int32)")
    return params, state._replace(step=jnp.full_like(state.step, count), **slots)


def load_functional_state(optimizer: "Optimizer", params: Any, state: Any) -> None:
    """See :meth:`optimjax.Optimizer.load_functional_state`."""
    rule, fields = _rule_of(optimizer), _fields(optimizer)
    present = optimizer._arranged({box: box.value for box in fields})
    expected = jax.eval_shape(algorithm_of(optimizer).init, present)
    _check_like((params, state), (present, expected), _kept_dtypes(optimizer, fields, expected))
    values = dict(optimizer._pair(params))
    columns = {field: dict(optimizer._pair(getattr(state, field))) for field in state._fields if field != "step"}
    step = int(state.step)
    count = {"step": step} if rule.counts_steps else {}
    slots = {"step", *rule.slots._fields}
    written, states = dict(optimizer.state), {}
    for box, active in fields.items():
        own = {name: value for name, value in dict(optimizer.state.get(box, {})).items() if name not in slots}
        entries = count | {field: jax.tree.map(jnp.asarray, columns[field][box]) for field in active}
        states[box] = ParameterState(own | (entries if step or rule.eager else {}))
        written.pop(box, None)
    written |= {box: entries for box, entries in states.items() if entries}
    before = {box: box.value for box in fields}, dict(optimizer.state)
    try:
        _set(optimizer, {box: jnp.asarray(values[box]) for box in fields}, written)
    except BaseException:  # an interrupt
        _set(optimizer, *before)
        raise
    optimizer._step_called |= step > 0  # outside: a scheduler need not warn that it is stepped first


def _set(optimizer: "Optimizer", values: dict[Parameter, Any], state: dict[Any, Any]) -> None:
    for box, value in values.items():
        box._write(value)
    optimizer.state.clear()
    optimizer.state.update(state)


def _fields(optimizer: "Optimizer") -> dict[Parameter, tuple[str, ...]]:
    """The parameters that cross, which are those that are not frozen, and the slots of each."""
    fields = {}
    for index, group in enumerate(optimizer.param_groups):
        _, flags = optimizer._resolve(group, f" of param_groups[{index}]")
        for box in group["params"]:
            if box.requires_grad:
                fields[box] = active_fields(_rule_of(optimizer), optimizer.hyperparameters, flags, box.shape)
    return fields


def _rule_of(optimizer: "Optimizer") -> Rule:
    """Its rule; or ``NotImplementedError`` for LBFGS, and for a ``step`` written in Python."""
    if optimizer.rule is None:
        raise NotImplementedError(
            f"{type(optimizer).__name__} has no rule for one parameter, so its state cannot be taken over: "
            "begin a new run of the functional form with optimizer.params"
        )
    return optimizer.rule


def _kept_dtypes(optimizer: "Optimizer", fields: Iterable[Parameter], expected: Any) -> dict[str, set[Any]]:
    """The dtypes of slots that were loaded in another one than a new state has: by name, as in messages."""
    kept: dict[str, set[Any]] = {}
    for field in expected._fields[1:]:
        present = {box: dict(optimizer.state.get(box, {})).get(field) for box in fields}
        leaves = jax.tree_util.tree_flatten_with_path({"state": {field: optimizer._arranged(present)}})[0]
        kept.update({dotted(path): {jnp.result_type(leaf)} for path, leaf in leaves})
    return kept


def _check_like(given: Any, expected: Any, kept: dict[str, set[Any]]) -> None:
    """Raise where parameters and state have not the structure, shapes and dtypes of the optimizer's own."""
    ours, treedef = jax.tree_util.tree_flatten_with_path(dict(zip(("params", "state"), expected, strict=True)))
    leaves, structure = jax.tree.flatten(dict(zip(("params", "state"), given, strict=True)))
    if structure != treedef:
        raise ValueError(f"parameters and state must have the structure {treedef}, got {structure}")
    for (path, own), leaf in zip(ours, leaves, strict=True):
        name, shape, dtype = dotted(path), np.shape(leaf), jnp.result_type(leaf)
        if shape != own.shape or dtype not in {own.dtype, *kept.get(name, ())}:
            raise ValueError(
                f"{name!r} has shape and dtype {(shape, dtype)}, the optimizer's has {(own.shape, own.dtype)}"
            )
