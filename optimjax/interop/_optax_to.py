"""An algorithm as an optax transformation."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optimjax._core.algorithm import Algorithm
from optimjax._core.hyperparameters import Numeric
from optimjax._core.partition import Partition
from optimjax._core.states import registered
from optimjax._core.tree import flatten_params, match, names
from optimjax.interop._optax_from import Transformed
from optimjax.interop._optax_package import accepted

__all__ = ["ToOptaxState", "Transformation"]


@registered
class ToOptaxState(NamedTuple):
    """The state of a transformation that :func:`optimjax.interop.optax.to_optax` has made.

    Attributes:
      hyperparams: the numbers by name, as arrays that may be replaced between updates. Of a partition by label, then by
        name. In place of a schedule it has the value of the last update, or the first one.
      inner_state: of the algorithm.
    """

    hyperparams: dict[str, Any]
    inner_state: Any


jax.export.register_namedtuple_serialization(ToOptaxState, serialized_name="optimjax.ToOptaxState")


@dataclass(frozen=True)
class Transformation:
    """The two functions of the transformation."""

    algorithm: Algorithm

    def init(self, params: Any) -> ToOptaxState:
        """The state before the first update."""
        state = self.algorithm.init(params)
        at = state.step
        return ToOptaxState(numbers(self.algorithm, own_values(self.algorithm), lambda schedule: schedule(at)), state)

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ToOptaxState]:
        """What has to be added to the parameters, and the new state."""
        if params is None:
            raise ValueError(
                f"{self.algorithm.name} needs the parameters, because the updates are the difference of new and old "
                "ones: call update(grads, state, params)"
            )
        if not isinstance(state, ToOptaxState):
            raise TypeError(f"state must be the ToOptaxState that init returns, got {type(state).__name__}")
        inner, given = state.inner_state, state.hyperparams
        overrides = numbers(self.algorithm, given, lambda schedule: schedule)
        keywords = arguments(self.algorithm, overrides, extra_args)
        leaves, treedef = flatten_params(params)
        grads = match(treedef, updates, lambda: names(params))
        conjugate = [jnp.conj(grad) if jnp.iscomplexobj(grad) else grad for grad in grads]  # as jax.grad returns it
        new, new_inner = self.algorithm.update(params, treedef.unflatten(conjugate), inner, **keywords)
        changes = map(difference, treedef.flatten_up_to(new), leaves, grads)
        kept = numbers(self.algorithm, given, lambda schedule: schedule(inner.step))
        return treedef.unflatten(changes), ToOptaxState(kept, new_inner)


def difference(new: Array, old: Array, grad: Any) -> Array:
    """What has to be added to the old value; in the wider dtype of parameter and gradient.

    Exact where new and old are within a factor of two of each other (Sterbenz), or the gradient is so much wider that
    it holds all digits of the difference. Where nothing has changed it is -0.0, which leaves any number as it is, where
    infinity less infinity would not.
    """
    dtype = jnp.result_type(old)
    if grad is not None and jnp.result_type(grad) != dtype:
        dtype = jnp.promote_types(dtype, jnp.result_type(grad))
    zero = jnp.asarray(-0.0, dtype)
    return jnp.where(new == old, zero, new.astype(dtype) - old.astype(dtype))


# --- Numbers in the state ---------------------------------------------------------------------------------------------


def own_values(algorithm: Algorithm) -> dict[str, Any]:
    """The values that an algorithm was made with, by name, of those numbers that its transformation has in the state.

    Not what is compiled in: a name or a table in place of numbers, and a plain zero that leaves a part of the algorithm
    out, with its slots.
    """
    if isinstance(algorithm, Partition):
        return {label: own_values(part) for label, part in algorithm.algorithms.items()}
    values = {}
    for name, kind in algorithm.hyperparameters.kinds.items():
        value = algorithm.values.get(name)
        if not isinstance(kind, Numeric) or kind.is_fixed(value):
            continue
        leaves = jax.tree.leaves(value)
        off = kind.switch and all(isinstance(leaf, (int, float)) and leaf == 0 for leaf in leaves)
        if leaves and not off:
            values[name] = value
    return values


def numbers(algorithm: Algorithm, given: Any, of_schedule: Callable[[Any], Any]) -> dict[str, Any]:
    """The given numbers as arrays; where the algorithm has a schedule, what ``of_schedule`` makes of it.

    Raises:
      ValueError: what is given has other names, or another structure.
    """
    own = own_values(algorithm)
    if not isinstance(given, Mapping) or set(given) != set(own):
        got = sorted(given) if isinstance(given, Mapping) else repr(given)
        raise ValueError(f"hyperparams of the state must have the keys {sorted(own)}, got {got}")
    arrays: dict[str, Any] = {}
    for name, value in own.items():
        leaves, treedef = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, jax.tree_util.Partial))
        try:
            replaced = treedef.flatten_up_to(given[name])
        except ValueError as error:
            raise ValueError(f"hyperparams[{name!r}] of the state has another structure: {error}") from None
        arrays[name] = treedef.unflatten(
            [
                _schedule(leaf, of_schedule) if callable(leaf) else _number(one)
                for leaf, one in zip(leaves, replaced, strict=True)
            ]
        )
    return arrays


def _schedule(schedule: Callable[[Any], Any], of_schedule: Callable[[Any], Any]) -> Any:
    result = of_schedule(schedule)
    return result if callable(result) else jax.tree.map(_number, result)


def _number(value: Any) -> Array:
    """Of one dtype, and not weakly typed, so that a number that is replaced compiles nothing."""
    return jnp.asarray(value, jnp.result_type(float))


def arguments(algorithm: Algorithm, overrides: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of the algorithm's ``update``: numbers of the state, and those extra arguments that it knows.

    Raises:
      TypeError: the algorithm evaluates a loss, and there is none.
    """
    if isinstance(algorithm, Partition):
        return {
            label: {**values, **extra[label]} if isinstance(extra.get(label), Mapping) else values
            for label, values in overrides.items()
        }
    known = {name: extra[name] for name in algorithm.hyperparameters.numeric if name in extra}
    if isinstance(algorithm, Transformed):
        return {**accepted(algorithm.tx, extra), **overrides, **known}
    if "loss_fn" in inspect.signature(algorithm.update).parameters:
        loss_fn = extra.get("loss_fn", extra.get("value_fn"))
        if not callable(loss_fn):
            raise TypeError(
                f"{algorithm.name} evaluates the loss itself: call update(grads, state, params, value_fn=loss_fn), "
                "where loss_fn(params) is a scalar, as optax.lbfgs wants it; wrappers such as nnx.Optimizer pass it on"
            )
        known["loss_fn"] = loss_fn
    return {**overrides, **known}
