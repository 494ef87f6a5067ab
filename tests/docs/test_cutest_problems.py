"""The problems that L-BFGS is compared on have the documented values at the start, and at the minimum."""

import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
PROBLEMS = {
    problem.name: problem for problem in runpy.run_path(str(ROOT / "benchmarks" / "cutest_problems.py"))["PROBLEMS"]
}
# MINPACK's tests print the roots of most of these, as the norm of the residuals at the start.
AT_START = {
    "BARD": 41.68170,
    "BEALE": 14.203125,
    "BIGGS6": 0.7790701,
    "BOX3": 1031.154,
    "BROWNBS": 9.99998e11,
    "BROWNDEN": 7926693.3,
    "GULF": 12.11071,
    "HELIX": 2500,
    "JENSMP": 4171.306,
    "KOWOSB": 5.313172e-3,
    "MEYER3": 1.693608e9,
    "OSBORNEA": 0.8790263,
    "OSBORNEB": 2.093420,
    "PENALTY1": 148032.57,
    "PENALTY2": 162.6528,
    "POWELLBS": 1.135262,
    "POWELLSG": 215,
    "ROSENBR": 24.2,
    "WATSON": 30,
    "WOODS": 19192,
}
# Where the least value is, of those that have it at a point that one can write down.
ONES = ("FLETCHCR", "GENROSE", "LIARWHD", "NONDIA", "ROSENBR", "SROSENBR", "VARDIM", "WOODS")
MINIMA: dict[str, Any] = {
    **dict.fromkeys(ONES, 1.0),
    "DQDRTIC": 0.0,
    "POWELLSG": 0.0,
    "DIXMAANA": 0.0,
    "DIXMAANL": 0.0,
    "BEALE": [3, 0.5],
    "BOX3": [1, 10, 1],
    "BROWNBS": [1e6, 2e-6],
    "GULF": [50, 25, 1.5],
    "HELIX": [1, 0, 0],
    "ARWHEAD": [1.0] * 999 + [0.0],
    "TRIDIA": 0.5 ** np.arange(1000),
}


@pytest.mark.parametrize("name", AT_START)
def test_at_the_start(x64: None, name: str) -> None:
    problem = PROBLEMS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(jax.jit(problem.function)(problem.start), AT_START[name], rtol=5e-7)


@pytest.mark.parametrize("name", MINIMA)
def test_at_the_minimum(x64: None, name: str) -> None:
    problem = PROBLEMS[name]
    point = jnp.asarray(np.broadcast_to(MINIMA[name], problem.start.shape), float)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, grad = jax.jit(jax.value_and_grad(problem.function))(point)
    np.testing.assert_allclose(value, problem.least, atol=1e-15)
    np.testing.assert_allclose(grad, 0, atol=1e-9)


FITTED = ("BROWNDEN", "JENSMP", "KOWOSB", "OSBORNEB", "CHEBYQAD")


@pytest.mark.parametrize("name", FITTED)
def test_the_documented_least_value_is_that_of_a_minimum(x64: None, name: str) -> None:
    """SciPy finds it, and no less."""
    optimize = pytest.importorskip("scipy.optimize")
    problem = PROBLEMS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        call = jax.jit(jax.value_and_grad(problem.function))
        found = optimize.minimize(
            lambda x: tuple(map(np.asarray, call(x))), problem.start, jac=True, method="BFGS", options={"maxiter": 1000}
        )
    np.testing.assert_allclose(found.fun, problem.least, rtol=5e-6)
