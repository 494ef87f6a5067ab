"""The class works inside jit and grad, where its rates may be tracers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim


def test_the_facade_inside_jit_is_differentiable() -> None:
    """Rates that are tracers become scalars of the program; nothing is read on the host."""

    def last(lr: Any, start: Any) -> Any:
        optimizer = optim.SGD([start], lr=1.0)
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(3):
            optimizer.step([2 * optimizer.params[0]])
        return optimizer.params[0]

    value, slope = jax.jit(jax.value_and_grad(last))(0.1, jnp.array(1.0))
    np.testing.assert_allclose(value, 0.8**3, rtol=1e-6)
    np.testing.assert_allclose(slope, -6 * 0.8**2, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("form", ["grads", "loss", "backward"])
def test_the_facade_is_differentiable_as_the_functional_core(form: str, donate: bool, compiled: bool) -> None:
    """State that a step has updated in place would be missing on the way back."""

    def loss(params: Any) -> Any:
        return jnp.sum((params["w"] - 0.3) ** 4)

    def by_class(lr: Any, params: Any) -> Any:
        optimizer = optim.Adam(params, lr=lr, differentiable=True)
        optimizer.donate = donate
        for _ in range(3):
            if form == "backward":
                optimizer.zero_grad()
                optimizer.backward(loss)
            optimizer.step(*{"grads": [jax.grad(loss)(optimizer.params)], "loss": [loss], "backward": []}[form])
        return loss(optimizer.params)

    def by_function(lr: Any, params: Any) -> Any:
        adam = optim.functional.adam(lr=lr)
        state = adam.init(params)
        for _ in range(3):
            params, state = adam.update(params, jax.grad(loss)(params), state)
        return loss(params)

    at = 0.1, {"w": jnp.array([1.0, -2.0])}
    slopes = jax.grad(by_class, argnums=(0, 1))
    ours = (jax.jit(slopes) if compiled else slopes)(*at)
    expected = jax.jit(jax.grad(by_function, argnums=(0, 1)))(*at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, expected)
