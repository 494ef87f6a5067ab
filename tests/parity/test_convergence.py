"""Every algorithm finds the optimum, in single and double precision and over the complex numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY, Case

# Both start in a row of numbers, because some algorithms take matrices only, and have their optimum at ones.
CURVATURES = np.geomspace(1, 20, 4)


def rosenbrock(w: Any) -> Any:
    """A curved valley, a hundred times as steep as it is long."""
    x, y = w[0, 0], w[0, 1]
    return jnp.abs(1 - x) ** 2 + 100 * jnp.abs(y - x * x) ** 2


def quadratic(w: Any) -> Any:
    """A bowl with different curvatures."""
    return jnp.sum(CURVATURES[None] * jnp.abs(w - 1) ** 2) / 2


STARTS: dict[Callable[[Any], Any], Any] = {
    rosenbrock: [[-1.2 + 0.5j, 1.0 - 0.5j]],
    quadratic: [[3.0 + 1.0j, -2.0 + 2.0j, 0.5 - 1.0j, -1.0 + 0.0j]],
}
PRECISION = {"float32": 1e-3, "float64": 1e-6, "complex64": 1e-3}


def minimize(case: Case, problem: Callable[[Any], Any], start: Any) -> Any:
    """Where the functional core arrives, by one compiled loop and a schedule."""
    way = case.descent
    algorithm = case.factory(lr=lambda count: way.first * (way.last / way.first) ** (count / way.steps), **way.options)

    @jax.jit
    def run(start: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            params, state = carry
            if case.takes_loss:
                return algorithm.update(params, None, state, loss_fn=problem)
            return algorithm.update(params, jax.grad(problem)(params), state)

        return jax.lax.fori_loop(0, way.steps, step, (start, algorithm.init(start)))[0]

    return run(start)


RUNS = [
    pytest.param(case, problem, dtype, id=f"{case}-{problem.__name__}-{dtype}")
    for case in EVERY
    for problem in STARTS
    for dtype in PRECISION
    if dtype != "complex64" or case.complex_message is None
]


@pytest.mark.parametrize(("case", "problem", "dtype"), RUNS)
def test_finds_the_optimum(
    request: pytest.FixtureRequest, case: Case, problem: Callable[[Any], Any], dtype: str
) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
    start = np.array(STARTS[problem])
    start = jnp.asarray(start if dtype == "complex64" else start.real, dtype)
    found = minimize(case, problem, start)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.ones(start.shape), rtol=0, atol=PRECISION[dtype])
