"""Infinite, undefined, huge and tiny numbers in parameters and gradients become what PyTorch makes of them.

What differs stands in the docstrings: numbers below the smallest normal one, which XLA takes for zero on a CPU; moments
that infinite gradients have made infinite; for Adadelta in single precision, gradients above 1e15.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, RPROP, Case
from reference import Result, facade, functional_steps, pytorch

import optimjax as optim
from optimjax import functional as F

STEPS = 3
VALUES = {
    np.float32: [0.0, 1.0, -2.0, math.inf, -math.inf, math.nan, 1e-20, 1e-12, -1e8, 1e15],
    np.float64: [0.0, 1.0, -2.0, math.inf, -math.inf, math.nan, 1e-150, 1e-20, -1e18, 1e100],
}


def assert_same(ours: Any, theirs: Any, infinite: bool, what: Any) -> None:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if infinite:  # whether it is infinite or undefined, nobody can go on from it
        ours, theirs = (np.where(np.isfinite(x), x, np.nan) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-30, err_msg=str(what))


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("run", [facade, pytest.param(functional_steps, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=str)
def test_numbers(
    torch: Any, request: pytest.FixtureRequest, case: Case, run: Callable[..., Result], dtype: Any
) -> None:
    """Each pair of values in arrays of their own, with an ordinary one: there are algorithms that take a norm."""
    if dtype == np.float64:
        request.getfixturevalue("x64")
    pairs = list(itertools.product(VALUES[dtype], repeat=2))
    params, grads = (
        [np.array([pair[index], ordinary], dtype).reshape(case.shape((2,))) for pair in pairs]
        for index, ordinary in enumerate((0.5, 0.25))
    )
    for options in case.variants():
        ours = run(case, options, params, [grads] * STEPS)
        theirs = pytorch(torch, case, options, params, [grads] * STEPS)
        for pair, param, reference in zip(pairs, ours.params, theirs.params, strict=True):
            assert_same(param, reference, math.isinf(pair[1]), (pair, options))
        for pair, state, reference in zip(pairs, ours.state, theirs.state, strict=True):
            for name in reference:
                assert_same(state.get(name, STEPS), reference[name], math.isinf(pair[1]), (pair, name, options))


@pytest.mark.parametrize("scale", [1e-20, 1e-30])
def test_rprop_sees_the_sign_of_tiny_gradients(scale: float) -> None:
    """The product of two of them is zero in single precision."""
    for run in (facade, functional_steps):
        grads = [[np.full(1, sign * scale, np.float32)] for sign in (1, 1, -1, -1)]
        result = run(RPROP, {"lr": 0.1}, [np.ones(1, np.float32)], grads)
        np.testing.assert_allclose(result.params[0], 1 - 0.1 - 0.12 - 0 + 0.06, rtol=1e-6)
        np.testing.assert_allclose(result.state[0]["step_size"], 0.06, rtol=1e-6)


def test_a_decay_of_zero_has_a_derivative() -> None:
    """It leaves out the parameter, but a decay that is learned must be able to leave zero."""
    for case in CASES:
        kind = case.optimizer.definition.hyperparameters.kinds.get("weight_decay")
        if kind is None:
            continue
        params = case.fit(jnp.array([2.0, -1.0]))
        grads = case.fit(jnp.array([0.5, 3.0]))
        algorithm = case.factory(**case.base)

        def moved(decay: Any, algorithm: Any = algorithm, params: Any = params, grads: Any = grads) -> Any:
            """The parameters and their state after a step, as one number."""
            new, state = algorithm.update(params, grads, algorithm.init(params), weight_decay=decay)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((new, state)) if leaf.dtype == jnp.float32)

        slope = jax.grad(moved)(0.0)
        assert slope != 0, case
        np.testing.assert_allclose(slope, (moved(2e-2) - moved(0.0)) / 2e-2, rtol=0.1, err_msg=str(case))


def test_an_infinite_parameter_of_a_group_whose_decay_is_edited() -> None:
    """Between zero and another decay nothing is compiled; at zero, infinity stays."""
    optimizer = optim.SGD([jnp.array([jnp.inf, 1.0])], lr=0.5)
    optimizer.step([jnp.ones(2)])
    np.testing.assert_array_equal(optimizer.params[0], [math.inf, 0.5])
    optimizer.param_groups[0]["weight_decay"] = 1.0
    optimizer.step([jnp.ones(2)])
    np.testing.assert_array_equal(optimizer.params[0], [math.nan, -0.25])


def test_one_undefined_element_of_adafactor_stays_alone() -> None:
    params, grads = jnp.array([[math.nan, 1.0], [1.0, 1.0]]), jnp.ones((2, 2))
    adafactor = F.adafactor(lr=0.5)
    new, _ = adafactor.update(params, grads, adafactor.init(params))
    assert np.isnan(np.asarray(new)).tolist() == [[True, False], [False, False]]
