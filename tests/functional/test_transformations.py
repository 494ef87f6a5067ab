"""An update is the same eager, scanned and compiled, and has finite derivatives, also by complex parameters."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from functional_runs import PARAMS, every_case, loss, train, train_eagerly
from hypothesis import given, settings
from hypothesis import strategies as st

variants = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{label}", marks=pytest.mark.thorough if label == "base" else ())
        for case in CASES
        for label, options in zip(("base", "full"), case.variants(), strict=True)
    ],
)


# --- differentiating through updates --------------------------------------------------------------------------------


@every_case
def test_derivatives_by_learning_rate_and_initial_parameters(x64: None, case: Case, options: dict[str, Any]) -> None:
    """Against central finite differences, the parameters moved in a random direction."""
    params = jax.tree.map(lambda p: p.astype(jnp.float64), case.fit(PARAMS))
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)

    @jax.jit
    def final_loss(lr: Any, distance: Any) -> Any:
        start = jax.tree.map(lambda p, d: p + distance * d, params, direction)
        return loss(train(case.factory(**{**options, "lr": lr}), start, case.steps)[0])

    h = case.difference
    by_rate = (final_loss(0.05 + h, 0.0) - final_loss(0.05 - h, 0.0)) / (2 * h)
    by_start = (final_loss(0.05, h) - final_loss(0.05, -h)) / (2 * h)
    assert min(abs(by_rate), abs(by_start)) > 1e-3
    slopes = jax.jit(jax.grad(final_loss, argnums=(0, 1)))(0.05, 0.0)
    np.testing.assert_allclose(slopes, (by_rate, by_start), rtol=10 * h)


@variants
def test_derivatives_stay_finite_with_zero_gradients(x64: None, case: Case, options: dict[str, Any]) -> None:
    """By the initial parameters, which are at the optimum, and by every number, also through the gradients."""
    algorithm = case.factory(**options)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), case.fit(PARAMS))  # or weight decay would be a gradient

    def squares(params: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def final_loss(params: Any, numbers: Any) -> Any:
        return loss(train(algorithm, params, case.steps, squares, **numbers)[0])

    values, kinds = case.optimizer.definition.defaults(**options), case.optimizer.definition.hyperparameters.kinds
    names = [name for name in case.numeric if values[name] or not kinds[name].switch]  # what is switched off stays so
    numbers = {name: jax.tree.map(lambda value: jnp.asarray(value, float), values[name]) for name in names}
    chex.assert_tree_all_finite(jax.jit(jax.grad(final_loss, argnums=(0, 1)))(zeros, numbers))


# --- complex parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.complex_message], ids=str)
def test_complex_parameters_follow_jax_grad(case: Case) -> None:
    target = jnp.array([1.0 + 2.0j, -1.0 - 0.5j])
    distance = jax.grad(lambda z: jnp.sum(jnp.abs(z - target) ** 2))
    algorithm = case.factory(**case.base)
    start = jnp.zeros(2, jnp.complex64)

    def step(carry: Any, _: Any) -> Any:
        return algorithm.update(carry[0], distance(carry[0]), carry[1]), None

    (z, _), _ = jax.lax.scan(step, (start, algorithm.init(start)), length=2000)
    # A conjugated gradient would drive the imaginary part away; 0.05 is the learning rate.
    np.testing.assert_allclose(z, target, atol=0.06)


# --- eager, scanned, compiled ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(index=st.integers(0, len(CASES) - 1), steps=st.integers(0, 5), scale=st.floats(0.1, 10))
def test_scan_equals_eager_steps(index: int, steps: int, scale: float) -> None:
    case = CASES[index]
    algorithm = case.factory(**{**case.variants()[1], "lr": 1e-3})
    params = jax.tree.map(lambda p: p * scale, case.fit(PARAMS))
    chex.assert_trees_all_close(
        train(algorithm, params, steps), train_eagerly(algorithm, params, steps), rtol=1e-4, atol=1e-6
    )


@every_case
def test_order_of_dict_keys_does_not_matter(case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    params = case.fit({"a": jnp.array(1.0), "b": jnp.array([2.0])})
    grads = case.fit({"a": jnp.array(-1.0), "b": jnp.array([3.0])})
    expected = algorithm.update(params, grads, algorithm.init(params))
    reverse = lambda tree: dict(reversed(tree.items()))  # noqa: E731
    chex.assert_trees_all_equal(algorithm.update(params, reverse(grads), algorithm.init(reverse(params))), expected)
    ours = algorithm.update(reverse(params), grads, algorithm.init(params))
    chex.assert_trees_all_equal(ours, expected)
