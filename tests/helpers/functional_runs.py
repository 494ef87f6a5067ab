"""Short runs of functional algorithms down one loss, and the cases that they are made for."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CASES

from optimjax import functional as F

__all__ = ["PARAMS", "every_case", "loss", "train", "train_eagerly"]

every_case = pytest.mark.parametrize(
    ("case", "options"), [pytest.param(case, case.variants()[1], id=str(case)) for case in CASES]
)
PARAMS = {
    "base": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])},
    "head": jnp.array(1.0),
}


def loss(params: Any) -> Any:
    return sum(jnp.sum((leaf - 0.3) ** 4) for leaf in jax.tree.leaves(params))


def train(algorithm: F.Algorithm, params: Any, steps: int = 4, loss: Any = loss, **overrides: Any) -> Any:
    """A few steps down the loss in one traced loop."""

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        return algorithm.update(params, jax.grad(loss)(params), state, **overrides), None

    return jax.lax.scan(step, (params, algorithm.init(params)), length=steps)[0]


def train_eagerly(algorithm: F.Algorithm, params: Any, steps: int = 4) -> Any:
    state = algorithm.init(params)
    for _ in range(steps):
        params, state = algorithm.update(params, jax.grad(loss)(params), state)
    return params, state
