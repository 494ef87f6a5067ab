"""Single steps of Muon, and what its programs multiply, for the tests of Muon."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimjax import functional as F

__all__ = ["direction", "lowered", "normal", "one_step", "products"]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def one_step(params: Any, grads: Any, **options: Any) -> Any:
    """The parameters after one update, which is the direction alone: from zeros, without decay, at rate 1."""
    algorithm = F.muon(**{"lr": 1.0, "weight_decay": 0, "ns_dtype": None, **options})
    return algorithm.update(params, grads, algorithm.init(params))[0]


def direction(grad: Any, **options: Any) -> Any:
    return one_step(jnp.zeros_like(grad), jnp.asarray(grad), **options)


def products(text: str) -> int:
    """The matrix products in a lowered or compiled program."""
    return len(re.findall(r"stablehlo\.dot_general|= \S+ dot\(", text))


def lowered(params: Any, **options: Any) -> Any:
    algorithm = F.muon(**options)
    return jax.jit(algorithm.update).lower(params, params, algorithm.init(params))
