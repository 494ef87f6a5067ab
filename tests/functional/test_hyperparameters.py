"""Hyperparameters of the functional core are numbers, trees, schedules or overrides, and vmap runs over them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from cases import CASES, Case
from functional_runs import PARAMS, every_case, loss, train, train_eagerly

from optimjax import functional as F

numeric = pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.numeric],
)


def options_with(case: Case, name: str) -> dict[str, Any]:
    """Options under which the hyperparameter has an effect, with a value that is not the default."""
    return {**case.base, **case.needs.get(name, {}), name: case.other[name]}


@numeric
def test_prefix_equals_separate_runs(case: Case, name: str) -> None:
    given = case.fit(PARAMS)
    options = options_with(case, name)
    values = [options[name], case.scaled(name, options[name], 0.5)]
    prefix = case.factory(**{**options, name: {"base": values[0], "head": values[1]}})
    params, state = train(prefix, given)
    for part, value in zip(("base", "head"), values, strict=True):
        alone, alone_state = train(case.factory(**{**options, name: value}), given[part])
        chex.assert_trees_all_close(params[part], alone, rtol=1e-6)
        for field in state._fields[1:]:  # a part whose parameters have no such slot has no such field when alone
            absent = jax.tree.map(lambda _: None, given[part])
            chex.assert_trees_all_close(getattr(state, field)[part], getattr(alone_state, field, absent), rtol=1e-5)


def test_prefix_of_another_structure() -> None:
    with pytest.raises(ValueError, match=r"^lr must be one value or a tree that is a prefix of the parameters"):
        F.sgd(lr={"base": 0.1, "tail": 0.1}).init(PARAMS)


@numeric
def test_schedule_is_evaluated_at_the_updates_done(case: Case, name: str) -> None:
    options = options_with(case, name)

    def at(count: Any) -> Any:
        return case.scaled(name, options[name], 1 / (1 + count))

    first = options[name]
    schedule: Any = at
    if isinstance(first, tuple):
        schedule = tuple(lambda count, i=i: at(count)[i] for i in range(len(first)))
    scheduled = case.factory(**{**options, name: schedule})
    params = expected = case.fit(PARAMS)
    state = expected_state = scheduled.init(params)
    for count in range(3):
        grads = jax.grad(loss)(params)
        params, state = scheduled.update(params, grads, state)
        now = case.factory(**{**options, name: at(count)})
        expected, expected_state = now.update(expected, grads, expected_state)
    chex.assert_trees_all_close((params, state), (expected, expected_state), rtol=1e-5)


def test_a_schedule_sees_the_count_of_updates_done() -> None:
    seen = []
    sgd = F.sgd(lr=lambda count: seen.append(int(count)) or 0.1)
    train_eagerly(sgd, {"w": jnp.ones(2)}, steps=3)
    assert seen[-3:] == [0, 1, 2]


@numeric
def test_override_is_for_one_call(case: Case, name: str) -> None:
    given = case.fit(PARAMS)
    options = options_with(case, name)
    value = case.scaled(name, options[name], 0.5)
    algorithm, other = case.factory(**options), case.factory(**{**options, name: value})
    grads = jax.grad(loss)(given)
    first = other.update(given, grads, algorithm.init(given))
    ours = algorithm.update(given, grads, algorithm.init(given), **{name: value})
    chex.assert_trees_all_equal(ours, first)
    chex.assert_trees_all_equal(algorithm.update(*swap(ours, grads)), algorithm.update(*swap(first, grads)))


def swap(result: tuple[Any, Any], grads: Any) -> tuple[Any, Any, Any]:
    return result[0], grads, result[1]


@every_case
def test_what_cannot_be_overridden(case: Case, options: dict[str, Any]) -> None:
    given = case.fit(PARAMS)
    algorithm = case.factory(**options)
    state = algorithm.init(given)
    for name in ("learning_rate", *case.structural):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            algorithm.update(given, given, state, **{name: True})


@numeric
def test_override_of_a_default(case: Case, name: str) -> None:
    given = case.fit(PARAMS)
    options = {**case.base, **case.needs.get(name, {})}
    algorithm, other = case.factory(**options), case.factory(**{**options, name: case.other[name]})
    grads, state = jax.grad(loss)(given), algorithm.init(given)
    if state._fields == other.init(given)._fields:
        ours = algorithm.update(given, grads, state, **{name: case.other[name]})
        chex.assert_trees_all_equal(ours, other.update(given, grads, state))
    else:
        with pytest.raises(ValueError, match=rf"'{name}': 0\.9.* would change which arrays the state has"):
            algorithm.update(given, grads, state, **{name: case.other[name]})


@every_case
def test_vmap_over_the_learning_rate_equals_a_loop(case: Case, options: dict[str, Any]) -> None:
    given = case.fit(PARAMS)
    rates = jnp.array([0.01, 0.05, 0.1])
    together = jax.vmap(lambda lr: train(case.factory(**{**options, "lr": lr}), given))(rates)
    for index, lr in enumerate(rates):
        alone = train(case.factory(**{**options, "lr": lr}), given)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=index: x[i], together), alone, rtol=1e-5, atol=1e-7)


@every_case
def test_vmap_over_parameters_and_state_equals_a_loop(case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    starts = jax.tree.map(lambda p: jnp.stack([p, p + 1, p * 2]), case.fit(PARAMS))
    together = jax.vmap(lambda params: train(algorithm, params))(starts)
    for index in range(3):
        alone = train(algorithm, jax.tree.map(lambda p, i=index: p[i], starts))
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=index: x[i], together), alone, rtol=1e-5, atol=1e-7)
