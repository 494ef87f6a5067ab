"""Equinox: gradients of ``eqx.filter_value_and_grad`` go in as they are, and filtered modules are prefix trees."""

from collections.abc import Iterator
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimjax as optim
from optimjax import functional as F
from optimjax.interop.optax import from_optax, to_optax

X = jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.8]])


class Net(eqx.Module):
    """Layers, a function, a flag that is no parameter, and what can be called."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    scale: jax.Array
    count: jax.Array
    activation: Any = jnp.tanh
    size: int = eqx.field(static=True, default=4)

    def __call__(self, x: Any) -> Any:
        return self.second(self.activation(self.first(x) * self.scale))


def net() -> Net:
    first, second = jax.random.split(jax.random.key(0))
    linear = eqx.nn.Linear(2, 4, key=first), eqx.nn.Linear(4, 1, key=second)
    return Net(*linear, scale=jnp.ones(4), count=jnp.array(3))


def loss(model: Any, x: Any) -> Any:
    return jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)


@pytest.fixture(autouse=True)
def standard_promotion(strict: None) -> Iterator[None]:
    """Equinox and optax rely on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def by_optax(tx: Any, steps: int = 3) -> Any:
    """The loop of Equinox's documentation."""
    model = net()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        _, grads = eqx.filter_value_and_grad(loss)(model, X)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
    return model


def by_ours(algorithm: Any, steps: int = 3) -> Any:
    """The same with an algorithm of ours, which returns the new parameters themselves."""
    params, rest = eqx.partition(net(), eqx.is_inexact_array)
    state = algorithm.init(params)

    @eqx.filter_jit
    def step(params: Any, state: Any) -> Any:
        _, grads = eqx.filter_value_and_grad(loss)(eqx.combine(params, rest), X)
        return algorithm.update(params, grads, state)

    for _ in range(steps):
        params, state = step(params, state)
    return eqx.combine(params, rest)


def assert_close(ours: Any, theirs: Any) -> None:
    arrays = (eqx.filter(model, eqx.is_array) for model in (ours, theirs))
    chex.assert_trees_all_close(*arrays, rtol=2e-5, atol=1e-6)


ADAM = optax.adam(0.05)
OPTIMIZERS = {"Adam": lambda model: optim.Adam(model, lr=0.05), "FromOptax": lambda model: optim.FromOptax(model, ADAM)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", ["gradients", "loss", "filtered"])
def test_the_class_takes_its_gradients(optimizer: str, form: str) -> None:
    """The optimizer may be made from the whole module, or from its filtered half."""
    params, rest = eqx.partition(net(), eqx.is_inexact_array)
    own = OPTIMIZERS[optimizer](params if form == "filtered" else net())
    for _ in range(3):
        model = eqx.combine(own.params, rest) if form == "filtered" else own.params
        if form == "loss":
            own.step(loss, X)
        else:
            own.step(eqx.filter_value_and_grad(loss)(model, X)[1])
    assert_close(eqx.combine(own.params, rest) if form == "filtered" else own.params, by_optax(ADAM))


@pytest.mark.parametrize("algorithm", [F.adam(lr=0.05), from_optax(ADAM)], ids=["adam", "from_optax"])
def test_the_core_takes_its_gradients(algorithm: Any) -> None:
    assert_close(by_ours(algorithm), by_optax(ADAM))


def test_the_loop_of_equinox_takes_our_transformation() -> None:
    assert_close(by_optax(to_optax(F.adam(lr=0.05))), by_optax(ADAM))


def test_none_where_the_filter_has_taken_a_gradient_out() -> None:
    """A frozen layer: gradients by ``eqx.filter_grad`` of a partitioned model."""
    model = net()
    spec = jax.tree.map(eqx.is_inexact_array, model)
    spec = eqx.tree_at(lambda spec: (spec.second.weight, spec.second.bias), spec, (False, False))
    trained, frozen = eqx.partition(model, spec)

    def of_trained(trained: Any) -> Any:
        return loss(eqx.combine(trained, frozen), X)

    adam = F.adam(lr=0.05)
    new, state = adam.update(trained, eqx.filter_grad(of_trained)(trained), adam.init(trained))
    assert new.second.weight is None
    assert state.exp_avg.second.weight is None
    assert float(jnp.abs(new.first.weight - model.first.weight).max()) > 0
    optimizer = optim.FromOptax(trained, ADAM)
    optimizer.step(eqx.filter_grad(of_trained)(trained))
    chex.assert_trees_all_close(optimizer.params.first.weight, new.first.weight, rtol=1e-5)


def by_ndim(matrices: float, others: float) -> Any:
    """A module of numbers, as masks of decay are written."""
    arrays = eqx.filter(net(), eqx.is_inexact_array)
    return jax.tree.map(lambda a: matrices if a.ndim > 1 else others, arrays)


@pytest.mark.parametrize("whole", [False, True])
def test_filtered_modules_are_prefix_trees(whole: bool) -> None:
    """Of decay and of rates, although a module can be called, as a schedule can."""
    decay, rates = by_ndim(0.1, 0.0), by_ndim(0.05, 0.01)
    algorithm = F.adamw(lr=rates if whole else 0.05, weight_decay=decay)
    mask = by_ndim(True, False)
    theirs = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask))
    rate = rates if whole else by_ndim(0.05, 0.05)
    scale = optax.stateless(lambda updates, params: jax.tree.map(lambda u, r: -r * u, updates, rate))
    assert_close(by_ours(algorithm), by_optax(optax.chain(theirs, scale)))
    assert_close(by_optax(to_optax(algorithm)), by_optax(optax.chain(theirs, scale)))


def test_a_filtered_module_is_a_prefix_of_rates_for_a_transformation() -> None:
    half = from_optax(ADAM, lr=by_ndim(0.5, 0.0))
    model = by_ours(half, 1)
    np.testing.assert_array_equal(model.first.bias, net().first.bias)
    expected = 0.5 * (by_optax(ADAM, 1).first.weight + net().first.weight)
    np.testing.assert_allclose(model.first.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_of_a_module(optimizer: str) -> None:
    """The way to the core and back, where rates of groups are a module of numbers."""
    groups = optim.group_parameters(net(), [{"params": "*bias", "lr": 0.0}])
    own = OPTIMIZERS[optimizer](groups)
    before = own.params
    own.step(loss, X)
    np.testing.assert_array_equal(own.params.first.bias, before.first.bias)
    params, state = own.functional_state()
    grads = eqx.filter_grad(loss)(own.params, X)
    new, state = own.algorithm.update(params, eqx.filter(grads, eqx.is_inexact_array), state)
    own.load_functional_state(new, state)
    assert int(own.params.count) == 3
    np.testing.assert_array_equal(own.params.first.bias, before.first.bias)
    assert float(jnp.abs(own.params.first.weight - before.first.weight).max()) > 0.01
