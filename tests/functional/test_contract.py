"""Small rules, which ask for what the algorithms of the package do not, agree with NumPy in both faces.

They run eagerly, compiled, in a loop, and through the class, saved, loaded and crossed.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_rules import EXAMPLES, STEPS, Example, Kernel, Together, assert_is, by_parameter, examples

import optimjax as optim
from optimjax import functional as F

# --- The functional face --------------------------------------------------------------------------------------------


def eagerly(example: Example, algorithm: F.Algorithm) -> Any:
    params = example.arrays(0)
    state = algorithm.init(params)
    for step in range(STEPS):
        params, state = algorithm.update(params, example.arrays(step + 1), state)
    return params, state


def compiled(example: Example, algorithm: F.Algorithm) -> Any:
    params = example.arrays(0)
    state, update = jax.jit(algorithm.init)(params), jax.jit(algorithm.update, donate_argnums=(0, 2))
    for step in range(STEPS):
        params, state = update(params, example.arrays(step + 1), state)
    return params, state


def in_a_loop(example: Example, algorithm: F.Algorithm) -> Any:
    params = example.arrays(0)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(example.arrays(step + 1) for step in range(STEPS)))
    step = lambda carry, g: (algorithm.update(carry[0], g, carry[1]), None)  # noqa: E731
    return jax.lax.scan(step, (params, algorithm.init(params)), grads)[0]


def mapped(example: Example, algorithm: F.Algorithm) -> Any:
    """Two runs side by side, of which the second is returned."""
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), tree)  # noqa: E731
    params = twice(example.arrays(0))
    state = jax.vmap(algorithm.init)(params)
    for step in range(STEPS):
        params, state = jax.vmap(algorithm.update)(params, twice(example.arrays(step + 1)), state)
    return jax.tree.map(lambda x: x[1], (params, state))


@pytest.mark.parametrize("run", [eagerly, compiled, in_a_loop, mapped], ids=lambda run: run.__name__)
@examples
def test_functional(example: Example, run: Callable[..., Any]) -> None:
    params, state = run(example, F.factory(example.optimizer)())
    assert_is(example, params, by_parameter(example, state))


@examples
def test_maximize(example: Example) -> None:
    params, state = eagerly(example, F.factory(example.optimizer)(maximize=True))
    assert_is(example, params, by_parameter(example, state), maximize=True)


@examples
def test_dtypes_of_slots_are_kept(example: Example) -> None:
    algorithm = F.factory(example.optimizer)()
    params = example.arrays(0)
    state = algorithm.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(algorithm.update(params, params, state), (params, state))


def test_the_fields_are_those_that_some_parameter_has() -> None:
    algorithm = F.factory(Kernel)()
    conv, dense, bias = jnp.ones((1, 1, 2, 2)), jnp.ones((2, 2)), jnp.ones(2)
    for params, fields in (
        ([conv, dense, bias], ("total", "vector")),
        ([dense, conv], ("total",)),
        ([bias], ("vector",)),
        ([dense], ()),
        ([], ()),
    ):
        state = algorithm.init(params)
        assert state._fields == ("step", *fields)
        new, after = algorithm.update(params, params, state)
        assert type(after) is type(state)
        chex.assert_trees_all_equal_shapes_and_dtypes((new, after), (params, state))
    state = algorithm.init([conv, bias])
    assert state.total[1] is None
    assert state.vector[0] is None


def test_a_state_of_parameters_of_other_shapes_is_refused() -> None:
    algorithm = F.factory(Kernel)()
    with pytest.raises(TypeError, match=r"state must be the KernelState\('step', 'vector'\).*KernelState\('step', 'to"):
        algorithm.update([jnp.ones(2)], [jnp.ones(2)], algorithm.init([jnp.ones((1, 1, 2, 2))]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
@examples
def test_state_is_data(example: Example, duplicate: Callable[[Any], Any]) -> None:
    algorithm = F.factory(example.optimizer)()
    params, state = eagerly(example, algorithm)
    again = duplicate(state)
    assert type(again) is type(state)
    chex.assert_trees_all_equal(algorithm.update(params, params, again), algorithm.update(params, params, state))


def test_a_missing_gradient_leaves_every_kind_of_slot_alone() -> None:
    for example in EXAMPLES:
        algorithm = F.factory(example.optimizer)()
        params, state = eagerly(example, algorithm)
        first, *others = example.shapes
        grads = {**example.arrays(9), first: None}
        new, after = algorithm.update(params, grads, state)
        for field in state._fields[1:]:
            chex.assert_trees_all_equal(getattr(after, field)[first], getattr(state, field)[first])
        np.testing.assert_array_equal(new[first], params[first])
        assert not np.array_equal(new[others[0]], params[others[0]])


# --- The class ------------------------------------------------------------------------------------------------------


def of(example: Example, optimizer: optim.Optimizer) -> Any:
    """Parameters and slots of an optimizer, by name."""
    boxes = dict(zip(sorted(example.shapes), optimizer.param_groups[0]["params"], strict=True))
    return (
        {name: box.value for name, box in boxes.items()},
        {name: dict(optimizer.state[box]) for name, box in boxes.items()},
    )


def stepped(example: Example, optimizer: optim.Optimizer, first: int = 0, last: int = STEPS) -> optim.Optimizer:
    for step in range(first, last):
        optimizer.step(example.arrays(step + 1))
    return optimizer


@examples
def test_class(example: Example) -> None:
    optimizer = stepped(example, example.optimizer(example.arrays(0)))
    assert_is(example, *of(example, optimizer))


def test_all_parameters_of_the_class_are_together() -> None:
    """However many there are."""
    params = {str(index): jnp.ones((1 + index % 2,)) for index in range(130)}
    optimizer = Together(params, lr=1.0)
    optimizer.step(params)
    norm = np.sqrt(sum(p.size for p in params.values()))
    for value in optimizer.params.values():
        np.testing.assert_allclose(value, 1 - 1 / (1 + norm), rtol=1e-5)


@examples
def test_saved_and_loaded(example: Example) -> None:
    saved = stepped(example, example.optimizer(example.arrays(0)), last=1)
    other = example.optimizer(saved.params)
    other.load_state_dict(pickle.loads(pickle.dumps(saved.state_dict())))
    loaded, kept = (jax.tree.map(jnp.asarray, of(example, each)[1]) for each in (other, saved))
    chex.assert_trees_all_equal(loaded, kept)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, kept)
    assert_is(example, *of(example, stepped(example, other, first=1)))


@examples
def test_crossed(example: Example) -> None:
    """Into the functional form after one step, and back after the next."""
    optimizer = stepped(example, example.optimizer(example.arrays(0)), last=1)
    params, state = optimizer.functional_state()
    params, state = optimizer.algorithm.update(params, example.arrays(2), state)
    optimizer.load_functional_state(params, state)
    assert_is(example, *of(example, stepped(example, optimizer, first=2)))
