"""The functional core under JAX's transformations: hyperparameters of every form, errors, state as data."""

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
from cases import CASES, EVERY, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules

variants = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{label}")
        for case in CASES
        for label, options in zip(("base", "full"), case.variants(), strict=True)
    ],
)
every_case = pytest.mark.parametrize(
    ("case", "options"), [pytest.param(case, case.variants()[1], id=str(case)) for case in CASES]
)
numeric = pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.numeric],
)
PARAMS = {
    "base": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])},
    "head": jnp.array(1.0),
}


def loss(params: Any) -> Any:
    return sum(jnp.sum((leaf - 0.3) ** 4) for leaf in jax.tree.leaves(params))


def train(algorithm: F.Algorithm, params: Any, steps: int = 4, loss: Any = loss, **overrides: Any) -> Any:
    """A few steps down the loss in one traced loop."""

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        return algorithm.update(params, jax.grad(loss)(params), state, **overrides), None

    return jax.lax.scan(step, (params, algorithm.init(params)), length=steps)[0]


def train_eagerly(algorithm: F.Algorithm, params: Any, steps: int = 4) -> Any:
    state = algorithm.init(params)
    for _ in range(steps):
        params, state = algorithm.update(params, jax.grad(loss)(params), state)
    return params, state


def options_with(case: Case, name: str) -> dict[str, Any]:
    """Options under which the hyperparameter has an effect, with a value that is not the default."""
    return {**case.base, **case.needs.get(name, {}), name: case.other[name]}


# --- hyperparameters ------------------------------------------------------------------------------------------------


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


@every_case
def test_update_needs_no_temporary_copies(usual: Any, case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    params = case.fit({"w": jnp.zeros(1_000_000)})
    update = jax.jit(algorithm.update, donate_argnums=(0, 2))
    memory = update.lower(params, params, algorithm.init(params)).compile(usual).memory_analysis()
    assert memory.temp_size_in_bytes < case.temporary * params["w"].nbytes


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


# --- trees that do not fit ------------------------------------------------------------------------------------------


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
