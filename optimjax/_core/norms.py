"""Norms of gradients, and what a step is held back by: a largest norm, and values that are not finite."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax._core.numerics import at_least_float32, widened
from optimjax._core.sparse import Entries, is_sparse, over_values

__all__ = ["all_finite", "measured", "plus", "real_dtype", "root_of", "scalar_limit", "scaled_by", "sum_of_powers"]


def sum_of_powers(grads: Sequence[Any], order: float) -> Array:
    """The sum of absolute values to the power of the order; of infinite order their maximum."""
    powers = [_powers(grad, order) for grad in grads]
    dtype = np.result_type(*(power.dtype for power in powers))
    return functools.reduce(plus(order), (power.astype(dtype) for power in powers))


def plus(order: float) -> Callable[[Array, Array], Array]:
    return jnp.maximum if order == float("inf") else jnp.add


def _powers(grad: Any, order: float) -> Array:
    values = widened(Entries(grad).values if is_sparse(grad) else grad)
    if order == float("inf"):
        return jnp.max(_absolute(values), initial=0)
    power = int(order) if order.is_integer() else order  # whole powers are products
    if order < 1:
        return jnp.sum(_flat_at_zero(lambda x: _absolute(x) ** power, values))
    return jnp.sum(_absolute(values) ** power)


def _absolute(x: Array) -> Array:
    """Absolute values with derivative 0 at 0. To choose elements here would make sums ten times slower on a CPU."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * jnp.sign(x)


def root_of(power: Array, order: float) -> Array:
    """The norm of all gradients as one vector."""
    if order == float("inf"):
        return power
    return _flat_at_zero(lambda x: jnp.sqrt(x) if order == 2 else x ** (1 / order), power)


def _flat_at_zero(function: Callable[[Array], Array], x: Array) -> Array:
    """A function that is 0 at 0, with the derivative 0 there, where its own is infinite."""
    some = x != 0
    return jnp.where(some, function(jnp.where(some, x, 1)), 0)


def _times(scale: Array, grad: Array) -> Array:
    wide = widened(grad)
    scale = scale.astype(real_dtype(grad))
    if jnp.iscomplexobj(grad):
        return jax.lax.complex(jnp.real(wide) * scale, jnp.imag(wide) * scale)
    return (wide * scale).astype(grad.dtype)


def scaled_by(grads: Sequence[Any], limit: Array, norm: Array) -> list[Any]:
    # Within bounds it is 1. As min(max_norm / enough, 1) it would have no derivative for max_norm=inf.
    enough = norm + 1e-6
    scale = jnp.minimum(limit.astype(norm.dtype), enough) / enough
    return [over_values(functools.partial(_times, scale), grad) for grad in grads]


def real_dtype(grad: Any) -> Any:
    """The real dtype to compute in."""
    return at_least_float32(jnp.finfo(grad.dtype).dtype)


def measured(grads: Sequence[Any]) -> tuple[Array, Array]:
    """The norm of all gradients as one vector, and whether all are finite."""
    if not grads:
        return jnp.zeros(()), jnp.array(True)
    norm = root_of(sum_of_powers(grads, 2.0), 2.0)
    return norm, all_finite(grads, norm)


def all_finite(grads: Sequence[Any], norm: Array) -> Array:
    """Whether all gradients are finite.

    Where their norm is, they are. It may also be infinite because squares are too large, so the elements are only then
    looked at.
    """

    def look() -> Array:
        values = (Entries(grad).values if is_sparse(grad) else grad for grad in grads)
        return jnp.stack([jnp.all(jnp.isfinite(each)) for each in values]).all()

    return jax.lax.cond(jnp.isfinite(norm), lambda: jnp.array(True), look)


def scalar_limit(name: str, value: Any) -> Any:
    """The limit as one kind of scalar, since each kind would compile a program of its own."""
    number = isinstance(value, (int, float)) or (
        isinstance(value, (np.generic, np.ndarray, jax.Array))
        and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool)
        and not jnp.issubdtype(value.dtype, jnp.complexfloating)
    )
    if not number or np.shape(value):
        raise TypeError(f"{name} must be a number or a scalar array, and real, got {value!r}")
    if isinstance(value, jax.Array):
        wanted = value.dtype == jnp.result_type(float) and not value.weak_type
        if isinstance(value, Tracer) or wanted or not value.is_fully_addressable:
            return value
    try:
        return np.float64(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits into a float, got {value!r}") from None
