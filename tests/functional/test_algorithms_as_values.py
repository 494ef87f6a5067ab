"""Algorithms and their states are data: shown, compared, copied, pickled, and exported."""

import copy
import dataclasses
import functools
import inspect
import pickle
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY, Case
from functional_runs import PARAMS, every_case, train_eagerly

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules

# --- state as data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["deepcopy", "pickle"]
)
@every_case
def test_state_can_be_copied(case: Case, options: dict[str, Any], duplicate: Any) -> None:
    given = case.fit(PARAMS)
    algorithm = case.factory(**options)
    params, state = train_eagerly(algorithm, given, 2)
    again = duplicate(state)
    assert type(again) is type(state)
    chex.assert_trees_all_equal(algorithm.update(params, given, again), algorithm.update(params, given, state))


def test_state_of_another_algorithm() -> None:
    with pytest.raises(TypeError, match=r"state must be the AdamState\('step', 'exp_avg', 'exp_avg_sq'\).*SGDState"):
        F.adam().update(PARAMS, PARAMS, F.sgd().init(PARAMS))
    with pytest.raises(TypeError, match=r"state must be the AdamState.*got AdamState.*max_exp_avg_sq"):
        F.adam().update(PARAMS, PARAMS, F.adam(amsgrad=True).init(PARAMS))


# --- What people see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "shown"),
    [
        (F.adam(), "adam()"),
        (F.adam(1e-3, betas=(0.9, 0.999)), "adam()"),  # the defaults
        (F.adam(lr=0.1), "adam(lr=0.1)"),
        (F.adamw(betas=(0.8, 0.9), maximize=True), "adamw(betas=(0.8, 0.9), maximize=True)"),
        (F.sparse_adam(lr={"a": 0.1, "b": [0.2]}), "sparse_adam(lr={'a': 0.1, 'b': [0.2]})"),
        (F.sgd(lr=schedules.step(0.1, step_size=3)), "sgd(lr=step(0.1, step_size=3))"),
        (F.lbfgs(max_iter=40), "lbfgs(max_iter=40, max_eval=50)"),
        (optim.SGD([jnp.ones(1)], momentum=0.9).algorithm, "sgd(momentum=0.9)"),
    ],
    ids=str,
)
def test_an_algorithm_is_shown_as_the_call_that_makes_it(algorithm: F.Algorithm, shown: str) -> None:
    assert repr(algorithm) == shown


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_help_says_what_the_arguments_are(case: Case) -> None:
    factory = getattr(F, case.factory.__name__)  # that of the class, not of a stand-in
    _, arguments = factory.__doc__.split("\nArgs:\n")
    documented = {name for line in re.findall(r"^  (\S.*?):", arguments, re.MULTILINE) for name in line.split(", ")}
    assert documented == set(inspect.signature(factory).parameters)


def test_arguments_in_the_order_of_optax() -> None:
    params = {"w": jnp.ones(2)}
    for algorithm, more in ((F.adam(), {}), (F.lbfgs(), {"loss_fn": lambda params: jnp.sum(params["w"])})):
        with pytest.raises(TypeError, match=r"the order is update\(params, grads, state\), but grads is .*State"):
            algorithm.update(params, algorithm.init(params), params, **more)


def test_a_state_that_was_loaded_as_plain_data() -> None:
    params, adam = {"w": jnp.ones(2)}, F.adam()
    state = adam.init(params)
    with pytest.raises(TypeError, match=r"got tuple; .* type\(algorithm.init\(params\)\)\(\*state\)"):
        adam.update(params, params, tuple(state))
    adam.update(params, params, type(adam.init(params))(*tuple(state)))


@pytest.mark.parametrize(
    ("grads", "where"), [(None, "'grads' is that of ['a.v', 'a.w', 'b']"), ({"a": None, "b": 1.0}, "'a' is that of")]
)
def test_none_in_place_of_a_tree_of_gradients(grads: Any, where: str) -> None:
    params = {"a": {"v": jnp.ones(()), "w": jnp.ones(())}, "b": jnp.ones(())}
    with pytest.raises(ValueError, match=re.escape(where)):
        F.sgd().update(params, grads, F.sgd().init(params))


# --- Algorithms as values -------------------------------------------------------------------------------------------


def test_algorithms_that_were_made_alike_are_equal() -> None:
    schedule = schedules.step(0.1, step_size=3)
    for make in (F.adam, lambda: F.adam(0.1), lambda: F.sgd(lr={"a": [0.1]}), lambda: F.sgd(lr=schedule), F.lbfgs):
        assert make() == make()
        assert hash(make()) == hash(make())
    for other in (F.adamw(), F.adam(lr=0.2), F.adam(betas=(0.9, 0.99)), F.adam(lr=jnp.array(1e-3)), F.sgd(), "adam()"):
        assert F.adam() != other
    assert F.sgd(lr=jnp.array(0.1)) != F.sgd(lr=jnp.array(0.1))  # arrays are compared by identity
    assert optim.Adam([jnp.ones(1)]).algorithm == F.adam()


def test_an_algorithm_may_be_a_static_argument(compilations: Any) -> None:
    @functools.partial(jax.jit, static_argnums=0)
    def step(algorithm: F.Algorithm, params: Any, state: Any) -> Any:
        return algorithm.update(params, params, state)

    params = jnp.ones(3)
    step(F.adam(lr=0.1), params, F.adam().init(params))
    before = compilations()
    step(F.adam(lr=0.1), params, F.adam().init(params))
    assert compilations() == before


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "deepcopy", "pickle"]
)
def test_an_algorithm_can_be_copied_and_pickled(case: Case, duplicate: Any) -> None:
    algorithm = case.factory(**case.variants()[1])
    assert duplicate(algorithm) == algorithm


def test_an_algorithm_is_a_pair_of_functions() -> None:
    init, update = F.sgd(lr=1.0)
    params, _ = update(jnp.ones(2), jnp.ones(2), init(jnp.ones(2)))
    np.testing.assert_array_equal(params, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        F.sgd().values = {}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_compiled_update_can_be_exported() -> None:
    """Its state is a type that `jax.export` can write."""
    adam, params = F.adam(lr=0.1), {"w": jnp.ones(2)}
    state = adam.init(params)
    written = jax.export.export(jax.jit(adam.update))(params, params, state).serialize()
    read = jax.export.deserialize(written).call(params, params, state)
    chex.assert_trees_all_equal(read, adam.update(params, params, state))
    assert type(read[1]) is type(state)
