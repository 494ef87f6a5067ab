"""An error while the program of a step runs changes nothing."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms_of_step import FORMS, START, both_ways, by_loss, contents, loss_fn


def equinox_error(x: Any) -> Any:
    return eqx.error_if(x, jnp.isnan(x), "bad batch")


def raise_for_nan(x: Any) -> Any:
    if np.isnan(x):
        raise ValueError("bad batch")
    return np.float32(x)


def pure_callback(x: Any) -> Any:
    return jax.pure_callback(raise_for_nan, jax.ShapeDtypeStruct((), x.dtype), x)


def debug_callback(x: Any) -> Any:
    jax.debug.callback(raise_for_nan, x)
    return x


def inside_a_loop(x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: (pure_callback(carry), None), x, length=2)[0]


@pytest.mark.parametrize("check", [equinox_error, pure_callback, debug_callback, inside_a_loop])
@pytest.mark.parametrize("name", ["loss", "backward", "LBFGS"])
@both_ways
@pytest.mark.filterwarnings("ignore")
def test_an_error_in_the_loss_while_it_runs(check: Any, name: str, donate: bool) -> None:
    def checked(params: Any, x: Any) -> Any:
        return loss_fn(params) * check(x)

    def step(optimizer: Any, x: float) -> None:
        if name == "backward":
            optimizer.zero_grad()
            optimizer.backward(checked, jnp.float32(x))
            optimizer.step()
        else:
            optimizer.step(checked, jnp.float32(x))

    optimizer, twin = FORMS[name].optimizer(donate), FORMS[name].optimizer(False)
    for x in (1.0, 1.0, np.nan, 1.0, np.nan, 1.0):
        if np.isnan(x):
            with pytest.raises(Exception, match="bad batch"):
                step(optimizer, x)
        else:
            step(optimizer, x)
            step(twin, x)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


@pytest.mark.parametrize("name", ["gradients", "loss"])
def test_debug_nans_switched_on_after_the_first_steps(name: str) -> None:
    def loss(params: Any, x: Any) -> Any:
        return loss_fn(params) * x

    def step(optimizer: Any, x: float) -> None:
        if name == "loss":
            optimizer.step(loss, jnp.float32(x))
        else:
            optimizer.step(jax.tree.map(lambda p: jnp.full_like(p, x), START))

    optimizer, twin = FORMS["loss"].optimizer(False), FORMS["loss"].optimizer(False)
    step(optimizer, 1.0)
    step(twin, 1.0)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        step(optimizer, np.nan)
    step(optimizer, 1.0)
    step(twin, 1.0)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


def test_without_compilation_an_error_in_the_loss_changes_nothing() -> None:
    optimizer, twin = FORMS["loss"].optimizer(True), FORMS["loss"].optimizer(True)

    def fails(params: Any) -> Any:
        raise ArithmeticError("of the user")

    with jax.disable_jit():
        by_loss(optimizer)
        with pytest.raises(ArithmeticError):
            optimizer.step(fails)
    by_loss(optimizer)
    by_loss(twin)
    by_loss(twin)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), contents(optimizer), contents(twin))
