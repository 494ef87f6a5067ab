"""What the tests of clipping share: an infinite norm, and parameters with gradients."""

from typing import Any

import jax.numpy as jnp

import optimjax as optim

__all__ = ["INF", "boxes"]

INF = float("inf")


def boxes(grads: Any) -> list[optim.Parameter]:
    made = [optim.Parameter(jnp.zeros_like(grad)) for grad in grads]
    for box, grad in zip(made, grads, strict=True):
        box.grad = grad
    return made
