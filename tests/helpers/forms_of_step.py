"""Every form of step, with and without updates in place, from one start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimjax as optim

__all__ = ["FORMS", "START", "Form", "both_ways", "by_gradients", "by_loss", "contents", "loss_fn"]

START = {"a": jnp.arange(6.0).reshape(2, 3) / 4, "b": jnp.array([0.5, -1.0])}


def loss_fn(params: Any) -> Any:
    return sum(jnp.sum(jnp.sin(leaf) ** 2) for leaf in jax.tree.leaves(params))


gradient = jax.jit(jax.grad(loss_fn))


def by_loss(optimizer: Any) -> None:
    optimizer.step(loss_fn)


def by_gradients(optimizer: Any) -> None:
    optimizer.step(gradient(optimizer.params))


def by_backward(optimizer: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(loss_fn)
    optimizer.step()


@dataclass(frozen=True)
class Form:
    """A way to step, and the number of updates that it counts."""

    step: Callable[[Any], None]
    make: Callable[..., Any] = lambda: optim.NAdam(START, lr=0.05)  # three slots, one of them a number

    def optimizer(self, donate: bool) -> Any:
        optimizer = self.make()
        optimizer.donate = donate
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.value = jnp.copy(parameter.value)  # so that START can be used again
        return optimizer


def by_loss_with_aux(optimizer: Any) -> None:
    _, aux = optimizer.step(loss_and_aux, has_aux=True)
    assert isinstance(aux, Aux)


def loss_and_aux(params: Any) -> Any:
    return loss_fn(params), Aux(params["a"] + 1)


@jax.tree_util.register_pytree_node_class
class Aux:
    """A node that JAX puts together by Python code."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> Any:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


def held_back() -> Any:
    return optim.NAdam(START, lr=0.05, max_grad_norm=1.0, skip_nonfinite=True)


ADAM = optax.adam(0.05)
FORMS = {
    "loss": Form(by_loss),
    "gradients": Form(by_gradients),
    "backward": Form(by_backward),
    "loss, aux": Form(by_loss_with_aux),
    "loss, held back": Form(by_loss, held_back),
    "gradients, held back": Form(by_gradients, held_back),
    # One iteration a step, so that the parameters go on moving.
    "LBFGS": Form(by_loss, lambda: optim.LBFGS(START, lr=0.05, max_iter=1)),
    "optax, loss": Form(by_loss, lambda: optim.FromOptax(START, ADAM)),
    "optax, gradients": Form(by_gradients, lambda: optim.FromOptax(START, ADAM)),
}
both_ways = pytest.mark.parametrize("donate", [False, True], ids=["copying", "in place"])


def contents(optimizer: Any) -> Any:
    """All numbers of parameters and state."""
    return jax.tree.map(np.array, (optimizer.params, optimizer.state_dict()["state"]))
