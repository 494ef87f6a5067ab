"""One small network with its data and its loss, as functions and as a module of ``flax.nnx``."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["HEAD", "VALUES", "Net", "batch", "forward", "groups", "module_leaves", "module_loss", "mse"]

VALUES = [np.random.default_rng(0).normal(size=shape) for shape in [(3, 4), (4,), (4, 2)]]


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(100 + step)
    return rng.normal(size=(5, 3)), rng.normal(size=(5, 2))


def forward(kernel: Any, bias: Any, head: Any, x: Any) -> Any:
    return jnp.tanh(x @ kernel + bias[None]) @ head


def mse(output: Any, y: Any) -> Any:
    return jnp.mean((output - y) ** 2)


class Net(nnx.Module):
    def __init__(self, arrays: Sequence[Any]):
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, use_bias=False, rngs=rngs)
        for variable, array in zip(module_leaves(self), arrays, strict=True):
            variable.set_value(jnp.asarray(array))

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.base(x)))


def module_leaves(net: Net) -> Sequence[Any]:
    return net.base.kernel, net.base.bias, net.head.kernel


def module_loss(net: Any, x: Any, y: Any) -> Any:
    return mse(net(x), y)


# Groups: the head has a rate and a decay of its own.
HEAD = {"lr": 0.02, "weight_decay": 0.0}


def groups(first: Any, second: Any) -> list[dict[str, Any]]:
    return [{"params": first}, {"params": second, **HEAD}]
