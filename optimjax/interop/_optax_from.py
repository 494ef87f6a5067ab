"""An optax transformation as an algorithm of the functional core."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from optimjax._core.algorithm import Algorithm, Params, State, check_order, check_overrides, spread
from optimjax._core.numerics import at_least_float32
from optimjax._core.sparse import is_sparse
from optimjax._core.states import state_class
from optimjax._core.tree import check_gradient, copied_array, flatten_params, match, names
from optimjax._storage.placement import explicit, place, resharded, sharding_of
from optimjax.interop._optax_package import accepted, optax

__all__ = ["STATE", "Transformed", "advanced", "check_extra", "check_present", "initial"]

STATE = state_class("FromOptax", ("tx",))


def initial(tx: Any, params: Any) -> Any:
    """The state of a transformation before the first update, in arrays of its own.

    A step updates them in place, and some transformations begin with the parameters themselves. What has not the shape
    of a parameter, such as a count, goes onto the mesh that parameters are on.
    """
    placed = [leaf for leaf in jax.tree.leaves(params) if sharding_of(leaf) is not None]

    def own(leaf: Any) -> Array:
        array = copied_array(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
        return place(array, placed[0]) if placed and sharding_of(array) is None else array

    return jax.tree.map(own, tx.init(params))


def advanced(tx: Any, params: Any, grads: Any, state: Any, rates: list[Any], extra: Mapping[str, Any]) -> Any:
    """New parameters and state, after one update.

    Args:
      tx: the transformation.
      params: a tree of arrays.
      grads: of the same structure, as ``jax.grad`` returns them. optax wants the conjugate of complex ones.
      state: of the transformation.
      rates: for each leaf the number that its update is multiplied by.
      extra: arguments of the transformation.
    """
    grads = jax.tree.map(lambda grad: jnp.conj(grad) if jnp.iscomplexobj(grad) else grad, grads)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax relies on
        updates, state = tx.update(grads, state, params, **extra)
        leaves, treedef = jax.tree.flatten(params)
        updates = [scaled(u, rate) for u, rate in zip(treedef.flatten_up_to(updates), rates, strict=True)]
        new = jax.tree.leaves(optax().apply_updates(leaves, updates))
    return treedef.unflatten([resharded(a, explicit(old)) for a, old in zip(new, leaves, strict=True)]), state


def scaled(update: Any, rate: Any) -> Any:
    """The update times the rate; by a plain 1 nothing is rounded."""
    if isinstance(rate, (int, float)) and rate == 1:
        return update
    dtype = jnp.result_type(update)
    wide = at_least_float32(dtype)
    return (jnp.asarray(update, wide) * jnp.asarray(rate, wide)).astype(dtype)


def check_present(missing: list[str]) -> None:
    """Raise where parameters have no gradient, which optax has no notion of.

    Raises:
      ValueError: with their names.
    """
    if missing:
        raise ValueError(
            f"{', '.join(map(repr, missing[:3]))}: no gradient. A transformation of optax updates all of its "
            "parameters together, so give zeros, or leave out of training what has none (requires_grad=False, or None "
            "in place of the parameter)"
        )


def check_extra(tx: Any, extra: Mapping[str, Any]) -> None:
    """Raise where a transformation would not look at its arguments.

    Raises:
      TypeError: with their names.
    """
    if unknown := extra.keys() - accepted(tx, extra):
        raise TypeError(f"this transformation does not take the arguments {', '.join(map(repr, sorted(unknown)))}")


class Transformed(Algorithm):
    """What :func:`optimjax.interop.optax.from_optax` returns: its state has ``step``, and ``tx``, that of optax."""

    def __post_init__(self) -> None:
        check_overrides(self.hyperparameters, {"lr": self.values["lr"]})

    @property
    def tx(self) -> Any:
        """The transformation."""
        return self.values["tx"]

    def __repr__(self) -> str:
        lr = self.values["lr"]
        return f"from_optax({self.tx!r}{'' if isinstance(lr, float) and lr == 1 else f', lr={lr!r}'})"

    def init(self, params: Any) -> Any:
        """The state before the first update: ``step``, and ``tx``, the state that optax makes."""
        leaves, treedef = flatten_params(params)
        tx = initial(self.tx, treedef.unflatten(leaves))
        step = jnp.zeros((), jnp.int32)
        return STATE(next((place(step, leaf) for leaf in leaves if sharding_of(leaf) is not None), step), tx)

    def update(self, params: Params, grads: Any, state: State, **extra: Any) -> tuple[Params, State]:
        """One update of every parameter.

        Args:
          params: the parameters.
          grads: their gradients, in the same structure, all of them.
          state: what :meth:`init` or the last update has returned.
          extra: ``lr`` for this call; all else are arguments of the transformation, such as ``value``.

        Raises:
          ValueError: gradients of another structure or shape, or a missing one.
          TypeError: gradients of another kind, another algorithm's state, an argument that the transformation does not
            take.
        """
        known = cast(Any, state)
        leaves, treedef = flatten_params(params)
        check_order(grads, STATE)
        if not isinstance(state, STATE):
            raise TypeError(
                f"state must be the {STATE.__name__}{STATE._fields} that this algorithm's init returns, got "
                f"{type(state).__name__}{getattr(state, '_fields', '')}"
            )
        lr = extra.pop("lr", self.values["lr"])
        check_overrides(self.hyperparameters, {"lr": lr})
        check_extra(self.tx, extra)
        paths = names(params)
        given = match(treedef, grads, lambda: paths)
        check_present([path or "params" for path, grad in zip(paths, given, strict=True) if grad is None])
        for path, leaf, grad in zip(paths, leaves, given, strict=True):
            check_gradient(lambda path=path: path or "params", leaf, grad)
            if is_sparse(grad):
                raise RuntimeError(f"optax does not support sparse gradients ({path or 'params'!r})")
        kind: Any = self.hyperparameters.kinds["lr"]
        rates = [kind.resolve(rate, known.step) for rate in spread(kind, "lr", lr, params)]
        new, tx = advanced(
            self.tx, treedef.unflatten(leaves), treedef.unflatten(map(jnp.asarray, given)), known.tx, rates, extra
        )
        return new, STATE(jnp.asarray(known.step) + 1, tx)
