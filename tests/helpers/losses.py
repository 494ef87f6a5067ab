"""Loss functions, the data for them, and a module with everything that a loss can change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["Net", "Scale", "X", "Y", "boxes_of", "loss_fn", "square", "sum_of_squares"]

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


class Net(nnx.Module):
    """Statistics, random state and tied parameters."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(params=0, dropout=1)
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = nnx.Linear(3, 3, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(self.dropout(self.norm(self.second(jnp.tanh(self.first(x))))))


def loss_fn(net: Any, x: Any, y: Any) -> Any:
    return jnp.mean((net(x) - y) ** 2)


def sum_of_squares(params: Any, scale: Any = 1.0) -> Any:
    return scale * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def boxes_of(optimizer: Any) -> list[Any]:
    return [box for group in optimizer.param_groups for box in group["params"]]


class Scale:
    def loss(self, params: Any) -> Any:
        return 2.0 * params["w"]


def square(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
