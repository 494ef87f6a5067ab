"""Gradients, parameters and states that do not fit each other are refused by name."""

from typing import Any

import chex
import jax.numpy as jnp
import pytest
from cases import Case
from functional_runs import PARAMS, every_case

from optimjax import functional as F


@every_case
def test_gradients_of_another_structure(case: Case, options: dict[str, Any]) -> None:
    given = case.fit(PARAMS)
    algorithm = case.factory(**options)
    state = algorithm.init(given)
    with pytest.raises(ValueError, match=r"base\.bias"):
        algorithm.update(given, {"base": {"kernel": given["base"]["kernel"]}, "head": given["head"]}, state)
    with pytest.raises(ValueError, match=r"unexpected \['tail'\]"):
        algorithm.update(given, {**given, "tail": jnp.ones(2)}, state)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (jnp.ones((2, 1)), ValueError, r"'base\.kernel' has shape \(2, 1\), the parameter has \(2, 2\)"),
        (jnp.ones(()), ValueError, r"'base\.kernel' has shape \(\), the parameter has \(2, 2\)"),
        (jnp.ones((2, 2), jnp.int32), TypeError, r"'base\.kernel' is int32"),
        (jnp.ones((2, 2), bool), TypeError, r"'base\.kernel' is bool"),
        (jnp.ones((2, 2), jnp.complex64), TypeError, r"'base\.kernel' is complex64, the parameter is real \(float32\)"),
        ("ones", TypeError, r"'base\.kernel' must be an array or None, got str"),
    ],
    ids=["shape", "broadcast", "integer", "bool", "complex", "string"],
)
@every_case
def test_gradient_of_another_kind(
    case: Case, options: dict[str, Any], grad: Any, error: type[Exception], message: str
) -> None:
    given = case.fit(PARAMS)
    algorithm = case.factory(**options)
    grads = {**given, "base": {**given["base"], "kernel": grad}}
    with pytest.raises(error, match=message):
        algorithm.update(given, grads, algorithm.init(given))


@every_case
def test_parameters_that_are_no_floats(case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    with pytest.raises(TypeError, match=r"'embedding\.ids' is a int32 array"):
        algorithm.init({"embedding": {"ids": jnp.arange(3), "table": jnp.ones(3)}})


def test_a_gradient_of_another_floating_dtype_is_cast() -> None:
    adam = F.adam(lr=0.1)
    params = {"w": jnp.ones(3)}
    ours, state = adam.update(params, {"w": jnp.ones(3, jnp.bfloat16)}, adam.init(params))
    chex.assert_trees_all_equal((ours, state), adam.update(params, {"w": jnp.ones(3)}, adam.init(params)))


def test_state_that_does_not_belong_to_the_parameters() -> None:
    adam = F.adam()
    with pytest.raises(ValueError, match=r"head|base"):
        adam.update(PARAMS, PARAMS, adam.init(PARAMS["base"]))
