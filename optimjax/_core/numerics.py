"""Arithmetic that algorithms share, and the precision in which it runs.

Nothing here mixes dtypes, so that all of it works under JAX's strict promotion, too.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "after",
    "at_least_float32",
    "bias_correction",
    "coupled_decay",
    "decay",
    "maximum",
    "sqrt",
    "where",
    "widened",
]


def at_least_float32(dtype: Any) -> Any:
    """The dtype to compute in: float32 in place of a narrower floating one (float8 too), any other as it is."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def widened(array: Array) -> Array:
    """The array in the dtype to compute in."""
    return array.astype(at_least_float32(array.dtype))


def bias_correction(beta: Any, step: Any) -> Any:
    """``1 - beta**step``, exact to rounding for Python numbers and for traced ones.

    For float32 arrays the plain form cancels (``1 - 0.999`` keeps four digits), so it is taken from the logarithm.
    """
    if isinstance(beta, float) and isinstance(step, int):
        return 1 - beta**step
    log = math.log(beta) if isinstance(beta, (int, float)) and beta > 0 else jnp.log(beta)
    return -jnp.expm1(step * log)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """One of two numbers, for Python's and for traced ones: as ``scalars`` of a rule are computed."""
    return jnp.where(condition, yes, no) if isinstance(condition, Array) else yes if condition else no


def maximum(a: Any, b: Any) -> Any:
    """The larger of two numbers, Python's or traced; as Python's ``max``, the first one if the second is NaN."""
    return where(b > a, b, a)


def coupled_decay(param: Array, grad: Array, scalars: Any, flags: Any) -> Array:
    """The gradient with weight decay added, an L2 penalty."""
    return grad + _penalty(scalars.weight_decay, param) if flags.weight_decay else grad


@jax.custom_jvp
def _penalty(weight_decay: Array, param: Array) -> Array:
    """``weight_decay * param``, or zero without decay, as in PyTorch, also where the parameter is infinite.

    The class always compiles decay in. Without decay the parameter is not even read here: XLA's CPU backend takes the
    condition, which is one for all elements, out of its loop.
    """
    return jnp.where(weight_decay != 0, weight_decay * param, 0)


@_penalty.defjvp
def _penalty_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (weight_decay, param), (weight_decay_dot, param_dot) = primals, tangents
    # By the weight decay it is the parameter, at zero, too: a decay can be learned from there.
    return _penalty(weight_decay, param), weight_decay_dot * param + _penalty(weight_decay, param_dot)


def decay(param: Array, grad: Array, scalars: Any, flags: Any) -> tuple[Array, Array]:
    """Parameter and gradient after weight decay: decoupled, the parameter shrinks; coupled, it enters the gradient."""
    if flags.weight_decay and flags.decoupled_weight_decay:
        return scalars.shrink * param, grad
    return param, coupled_decay(param, grad, scalars, flags)


@jax.custom_jvp
def sqrt(x: Array) -> Array:
    """Square root whose derivative at zero is zero, not infinite: a zero gradient must not turn into NaN."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x > 0, t / jnp.where(x > 0, 2 * root, 1), 0)


def after(earlier: Array, array: Array) -> Array:
    """The array, computed after another one.

    XLA's CPU backend makes each result by a loop of its own, and one may be written over an old slot only if every
    other loop that reads the slot runs before. The compiler does not order loops; it takes the order from what needs
    what. Where a slot would be copied otherwise, this says so. It costs nothing: that the condition always holds is
    found out only inside the loop, which then does not read the other array.
    """
    return jnp.where((earlier == earlier) | (earlier != earlier), array, earlier)
