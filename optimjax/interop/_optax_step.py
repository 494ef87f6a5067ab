"""One step by an optax transformation: the program, and the state that it leaves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from optimjax._core.foreign import is_variable
from optimjax._core.reading import ShapeError, slot_array
from optimjax._core.tree import distinct_names
from optimjax._engine.handover import Program
from optimjax._engine.loss import Packed, evaluate, packed
from optimjax._engine.loss_call import CallStructure
from optimjax._params.parameter import Parameter
from optimjax._storage.placement import pinned, place, sharding_of
from optimjax.interop._optax_from import advanced
from optimjax.interop._optax_package import accepted

__all__ = [
    "GIVEN_TO_UPDATE",
    "GIVEN_TO_UPDATE_FROM_LOSS",
    "Kept",
    "Problem",
    "by_gradients",
    "paths_of",
    "read",
    "update_from_loss",
]


# --- The program ------------------------------------------------------------------------------------------------------


class Problem:
    """What is compiled into a step. Equal ones are one object.

    Attributes:
      tx: the transformation.
      params: the structure of the parameters, as optax sees them.
      order: for each of their leaves, which of the given parameters it is.
      rates: for each of the given parameters, which rate is its own.
      state: the structure of the state.
      pins: where the arrays of the state, and those of parameters, stay.
      extra: the structure of extra arguments, and those that are compiled in, with their positions.
    """

    def __init__(
        self,
        tx: Any,
        params: Any,
        order: tuple[int, ...],
        rates: tuple[int, ...],
        state: Any,
        pins: tuple[tuple[Any, ...], tuple[Any, ...]],
        extra: tuple[Any, tuple[tuple[int, Any], ...]],
    ):
        self.tx, self.params, self.order, self.rates = tx, params, order, rates
        self.state, self.pins, self.extra = state, pins, extra

    def tree(self, arrays: Sequence[Any]) -> Any:
        """What optax sees, of one array for each given parameter."""
        return self.params.unflatten([arrays[index] for index in self.order])

    def arrays(self, tree: Any) -> list[Any]:
        """One array for each given parameter, of what optax has made."""
        found = dict(zip(self.order, self.params.flatten_up_to(tree), strict=True))
        return [found[index] for index in range(len(self.order))]

    def extra_arguments(self, traced: Sequence[Any]) -> dict[str, Any]:
        """The extra arguments, of those that are traced."""
        structure, static = self.extra
        leaves, rest = dict(static), iter(traced)
        return structure.unflatten([leaves[i] if i in leaves else next(rest) for i in range(structure.num_leaves)])

    def advanced(
        self,
        state: Sequence[Array],
        params: Sequence[Array],
        grads: Sequence[Array],
        rates: Any,
        extra: Mapping[str, Any],
    ) -> tuple[list[Array], list[Array]]:
        """New arrays of the state, and new parameters."""
        by_leaf = [rates[self.rates[index]] for index in self.order]
        kept = self.state.unflatten(state)
        new, kept = advanced(self.tx, self.tree(params), self.tree(grads), kept, by_leaf, extra)
        leaves, structure = jax.tree.flatten(kept)
        if structure != self.state:
            raise TypeError(
                f"the transformation has changed the structure of its state from {self.state} to {structure}: a "
                "compiled step needs one that stays"
            )
        return pinned((list(map(jnp.asarray, leaves)), self.arrays(new)), tuple(map(list, self.pins)))


def update(
    problem: Problem, state: list[Array], params: list[Array], grads: list[Array], rates: Any, traced: list[Any]
) -> tuple[list[Array], list[Array]]:
    """One update by gradients. The state comes first, see :func:`optimjax._engine.bucket.update_each`."""
    return problem.advanced(state, params, grads, rates, problem.extra_arguments(traced))


def update_from_loss(
    loss_fn: Callable[..., Any],
    problem: Problem,
    call: CallStructure,
    state: list[Array],
    params: list[Array],
    traced: list[Array],
    rates: Any,
) -> tuple[list[Array], list[Array], Array, Packed, list[Array]]:
    """Value, gradient and update: ``(state, params, loss, aux, what the loss has changed in modules)``.

    The transformation gets what line searches and others ask for: ``value``, ``grad`` and ``value_fn``.
    """
    loss, aux, changed, written, grads = evaluate(loss_fn, call, params, traced)
    params = [written.get(index, param) for index, param in enumerate(params)]

    def value_fn(tree: Any) -> Any:
        args, kwargs, _ = call.arguments(problem.arrays(tree), traced)
        result = loss_fn(*args, **kwargs)
        return result[0] if call.has_aux else result

    extra = {"value": loss, "grad": problem.tree(grads), "value_fn": value_fn}
    state, params = problem.advanced(state, params, grads, rates, accepted(problem.tx, extra))
    return state, params, loss, packed(aux), changed


by_gradients = Program(update, static=1)
# Positions of the state, and of the state and parameters, that the two programs may update in place: by `donate`.
GIVEN_TO_UPDATE = (1,), (1, 2)
GIVEN_TO_UPDATE_FROM_LOSS = (2,), (2, 3)


# --- What is kept -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The state between two steps, for as long as nobody has looked at it."""

    trained: list[Parameter]
    structure: Any  # of the state of optax
    paths: tuple[str, ...]
    slots: list[Array]
    step: int

    def names(self) -> tuple[str, ...]:
        """The names of the entries."""
        return ("step", *self.paths)

    def entries(self) -> dict[str, Any]:
        """The count of updates, and each array by its path.

        One that goes with any dtype, because JAX has made it of a Python number, is a Python number: then it does so
        again after loading.
        """
        values = [slot.item() if _is_weak_number(slot) else slot for slot in self.slots]
        return {"step": self.step, **dict(zip(self.paths, values, strict=True))}

    def left(self) -> list[Any]:
        """Nothing has to be set once the entries are the state."""
        return []


def _is_weak_number(slot: Array) -> bool:
    return not isinstance(slot, Tracer) and slot.ndim == 0 and getattr(slot, "weak_type", False)  # which keys lack


def paths_of(state: Any) -> tuple[list[str], list[Any], Any]:
    """The paths of the arrays of a state, as in ``functional_state()``; the arrays; the structure."""
    leaves, structure = jax.tree.flatten(state)
    paths: list[Any] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path({"tx": state}, is_leaf=is_variable)[0]:
        below = [inner for inner, _ in jax.tree_util.tree_flatten_with_path(leaf)[0]]
        paths += [path] if len(below) == 1 else [(*path, *inner) for inner in below]
    return distinct_names(paths), leaves, structure


def read(value: Any, like: Any, param: Array, where: str) -> Array:
    """A loaded or edited array of the state: of the shape and the kind of this one.

    Raises:
      ValueError: it is of another.
    """
    if isinstance(value, Tracer):
        return value
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        if not isinstance(value, Array) or value.dtype != like.dtype or value.shape != like.shape:
            raise ValueError(f"{where} must be a random key of the type {like}, got {value!r}")
        return value
    array = slot_array(value, like.dtype, where)
    if array.shape != like.shape:
        raise ShapeError(f"{where} has shape {array.shape}, expected {like.shape}")
    if like.weak_type and isinstance(value, (bool, int, float, complex)):
        array = jnp.asarray(value)
    return array if sharding_of(value) is not None else place(array, param)
