"""Arithmetic that algorithms share, and the precision in which it runs.

Nothing here mixes dtypes, so that all of it works under JAX's strict promotion, too.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["at_least_float32", "bias_correction", "sqrt", "widened"]


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


@jax.custom_jvp
def sqrt(x: Array) -> Array:
    """Square root whose derivative at zero is zero, not infinite: a zero gradient must not turn into NaN."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x > 0, t / jnp.where(x > 0, 2 * root, 1), 0)
