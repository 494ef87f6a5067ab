"""Hyperparameters may be trees, even those whose nodes can be called, and what can be called may be a schedule.

A schedule is a function, or a tree that can be called where the parameters have not that node.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim
from optimjax import functional as F


class Scale(eqx.Module):
    """A tree that can be called, which gives a number too."""

    a: Any

    def __call__(self, x: Any) -> Any:
        return self.a * x


@flax.struct.dataclass
class Affine:
    w: Any
    b: Any

    def __call__(self, x: Any) -> Any:
        return self.w * x + self.b


class Half(eqx.Module):
    """A schedule with a number of its own: none of the trees of parameters below has such a node."""

    start: Any

    def __call__(self, count: Any) -> Any:
        return self.start * 0.5 ** jnp.asarray(count, float)


NODES: dict[str, Callable[[Any, Any], Any]] = {  # of two parts
    "dict": lambda one, other: {"one": one, "other": other},
    "equinox": lambda one, other: Scale((one, other)),
    "equinox in a dict": lambda one, other: {"a": Scale(one), "b": [Scale(other)]},
    "flax.struct": Affine,
    "nnx.Variable": lambda one, other: [nnx.Param(one), nnx.Param(other)],
}
nodes = pytest.mark.parametrize("node", NODES.values(), ids=NODES)
P = jax.tree_util.Partial
SCHEDULES: dict[str, Any] = {  # 0.5 at first, then half of it
    "function": lambda count: 0.5 * 0.5 ** jnp.asarray(count, float),
    "functools.partial": functools.partial(lambda start, count: start * 0.5 ** jnp.asarray(count, float), 0.5),
    "Partial": P(lambda start, count: start * 0.5 ** jnp.asarray(count, float), 0.5),
    "Partial of an array": P(lambda start, count: start * 0.5 ** jnp.asarray(count, float), jnp.array(0.5)),
    "Partial without arguments": P(lambda count: 0.5 * 0.5 ** jnp.asarray(count, float)),
    "module": Half(0.5),
    "module with an array": Half(jnp.array(0.5)),
}


def one(x: Any) -> Any:
    return jnp.full(2, x)


def moved(algorithm: F.Algorithm, params: Any, steps: int = 1, jit: bool = False, **overrides: Any) -> list[Any]:
    """How far each parameter has moved under gradients of one."""
    state = jax.jit(algorithm.init)(params) if jit else algorithm.init(params)
    grads, new = jax.tree.map(jnp.ones_like, params), params
    update = jax.jit(algorithm.update) if jit else algorithm.update
    for _ in range(steps):
        new, state = update(new, grads, state, **overrides)
    return [float(jnp.ravel(a - b)[0]) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True)]


@pytest.mark.parametrize("jit", [False, True])
@nodes
def test_rates(node: Callable[[Any, Any], Any], jit: bool) -> None:
    params = node(one(1.0), one(2.0))
    np.testing.assert_allclose(moved(F.sgd(lr=node(0.1, 0.2)), params, jit=jit), [0.1, 0.2], rtol=1e-6)


@nodes
def test_rates_of_parts_of_the_tree(node: Callable[[Any, Any], Any]) -> None:
    """A leaf of the prefix stands for all below it."""
    params = node({"x": one(1.0), "y": (one(1.0),)}, one(2.0))
    np.testing.assert_allclose(moved(F.sgd(lr=node(0.1, 0.2)), params), [0.1, 0.1, 0.2], rtol=1e-6)


@nodes
def test_overrides(node: Callable[[Any, Any], Any]) -> None:
    params = node(one(1.0), one(2.0))
    np.testing.assert_allclose(moved(F.sgd(), params, lr=node(0.1, 0.2)), [0.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@nodes
def test_schedules_in_a_tree(node: Callable[[Any, Any], Any], schedule: Any) -> None:
    params = node(one(1.0), one(2.0))
    np.testing.assert_allclose(moved(F.sgd(lr=node(schedule, 0.2)), params, 2), [0.75, 0.4], rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@nodes
def test_one_schedule_for_all(node: Callable[[Any, Any], Any], schedule: Any, jit: bool) -> None:
    params = node(one(1.0), one(2.0))
    np.testing.assert_allclose(moved(F.sgd(lr=schedule), params, 2, jit), [0.75, 0.75], rtol=1e-6)


@nodes
def test_pairs(node: Callable[[Any, Any], Any]) -> None:
    """Of values that are tuples, a tuple of as many numbers is one value."""
    params, grads = node(one(1.0), one(2.0)), node(one(1.0), one(1.0))
    adam = F.adam(lr=0.1, betas=node((0.9, 0.99), (0.5, 0.99)))
    _, state = adam.update(params, grads, adam.init(params))
    means = [float(mean[0]) for mean in jax.tree.leaves(state.exp_avg)]
    np.testing.assert_allclose(means, [0.1, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "schedule", [SCHEDULES["Partial"], SCHEDULES["module with an array"]], ids=["Partial", "module"]
)
def test_a_schedule_in_a_pair(schedule: Any) -> None:
    adam = F.adam(betas=(schedule, 0.99))
    params = (one(1.0), one(2.0))  # of which the pair might be a prefix
    _, state = adam.update(params, params, adam.init(params))
    np.testing.assert_allclose([mean[0] for mean in state.exp_avg], [0.5, 1.0], rtol=1e-6)


# --- Switches -------------------------------------------------------------------------------------------------------


@nodes
def test_masks_of_weight_decay(node: Callable[[Any, Any], Any]) -> None:
    params = node(one(1.0), one(1.0))
    adamw = F.adamw(lr=0.1, weight_decay=node(0.5, 0.0))
    alone = [moved(F.adamw(lr=0.1, weight_decay=decay), one(1.0))[0] for decay in (0.5, 0.0)]
    np.testing.assert_allclose(moved(adamw, params), alone, rtol=1e-6)


def test_the_usual_mask_of_an_equinox_model() -> None:
    model = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    mask = jax.tree.map(lambda a: 0.5 if a.ndim > 1 else 0.0, model)
    adamw = F.adamw(lr=0.1, weight_decay=mask)
    grads = jax.tree.map(jnp.zeros_like, model)
    new, _ = jax.jit(adamw.update)(model, grads, adamw.init(model))
    expected = jax.tree.map(lambda a: a * 0.95 if a.ndim > 1 else a, model)
    chex.assert_trees_all_close(new, expected, rtol=1e-6)


@nodes
def test_momentum_of_some(node: Callable[[Any, Any], Any]) -> None:
    """Where one part has momentum, all have buffers; where none has, none has."""
    params = node(one(1.0), one(2.0))
    some, none = F.sgd(lr=0.1, momentum=node(0.0, 0.5)), F.sgd(lr=0.1, momentum=node(0.0, 0.0))
    assert some.init(params)._fields == ("step", "momentum_buffer")
    assert none.init(params)._fields == ("step",)
    np.testing.assert_allclose(moved(some, params, 2), [0.2, 0.25], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_switches_on(schedule: Any) -> None:
    params = one(1.0)
    assert F.sgd(momentum=schedule).init(params)._fields == ("step", "momentum_buffer")
    np.testing.assert_allclose(moved(F.sgd(lr=1.0, weight_decay=schedule), params), [1.5], rtol=1e-6)


def test_a_schedule_of_zero_switches_on() -> None:
    """Its argument is not its value."""
    schedule = P(lambda start, count: start + 0.5, 0.0)
    np.testing.assert_allclose(moved(F.sgd(lr=1.0, weight_decay=schedule), one(1.0)), [1.5], rtol=1e-6)


@nodes
def test_what_the_tree_decides_is_checked_with_the_parameters(node: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum"):
        F.sgd(momentum=node(0.0, 0.0), nesterov=True).init(node(one(1.0), one(1.0)))


# --- Errors ---------------------------------------------------------------------------------------------------------


@nodes
def test_values_out_of_range(node: Callable[[Any, Any], Any]) -> None:
    """At once, or where it can be called with the parameters: only then is it known to be a tree of values."""
    params = node(one(1.0), one(2.0))
    with pytest.raises(ValueError, match=r"Invalid learning rate: -0\.1"):
        F.sgd(lr=node(0.1, -0.1)).init(params)
    sgd = F.sgd()
    with pytest.raises(ValueError, match=r"Invalid learning rate: -0\.1"):
        sgd.update(params, params, sgd.init(params), lr=node(0.1, -0.1))


@nodes
def test_values_that_are_no_numbers(node: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(TypeError, match="lr must be a number, an array or a schedule, got 'fast'"):
        F.sgd(lr=node(0.1, "fast")).init(node(one(1.0), one(2.0)))


def test_trees_of_another_structure() -> None:
    params = {"a": Scale(one(1.0)), "b": one(1.0)}
    message = "lr must be one value or a tree that is a prefix of the parameters"
    for wrong in ({"a": 0.1}, {"a": Scale((0.1, 0.2)), "b": 0.1}, [0.1, 0.2], {"a": Scale(0.1), "b": {"c": 0.1}}):
        with pytest.raises(ValueError, match=message):
            F.sgd(lr=wrong).init(params)


def test_none_is_a_node_without_values() -> None:
    params = {"a": one(1.0), "b": None}
    np.testing.assert_allclose(moved(F.sgd(lr={"a": 0.1, "b": None}), params), [0.1], rtol=1e-6)
    with pytest.raises(ValueError, match="lr must be one value or a tree"):
        F.sgd(lr={"a": None, "b": None}).init(params)
    with pytest.raises(TypeError, match="lr must be a number"):
        F.sgd(lr=None)


def test_a_schedule_is_evaluated_once_for_all_parameters() -> None:
    counts = []
    schedule = P(lambda start, count: counts.append(count) or start, 0.1)
    sgd = F.sgd(lr=schedule)
    params = {"a": one(1.0), "b": one(1.0)}
    state = sgd.init(params)
    counts.clear()
    sgd.update(params, params, state)
    assert len(counts) == 1


@pytest.mark.parametrize("node", [NODES[name] for name in NODES if name != "nnx.Variable"])  # which have no names
def test_the_functional_form_of_groups(node: Callable[[Any, Any], Any]) -> None:
    """Where the groups differ it has trees of values, with the nodes of the parameters."""
    params = node(one(1.0), one(2.0))
    first, second = (name for name, _ in optim.group_parameters(params, [])[0]["params"])
    groups = optim.group_parameters(params, [{"params": first, "weight_decay": 0.0}, {"params": second, "lr": 0.5}])
    optimizer = optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    algorithm = optimizer.algorithm
    ours, state = optimizer.functional_state()
    optimizer.step(params)
    new, _ = algorithm.update(ours, params, state)
    chex.assert_trees_all_close(jax.tree.leaves(new), jax.tree.leaves(optimizer.params), rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(new), [one(0.9), one(1.0)], rtol=1e-6)
