"""A step sees everything that has changed since the last one, and what it remembers is of use to the next."""

import gc
import weakref
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax._engine.state import ParameterState
from optimjax.rule import Rule


@pytest.mark.parametrize("name", ["Adam", "LBFGS"])
def test_state_set_as_a_dict_is_taken(name: str) -> None:
    box = optim.Parameter(jnp.ones(2))
    loss = lambda params: jnp.sum(params[0] ** 2 + params[0] ** 4)  # noqa: E731
    optimizer, twin = (getattr(optim, name)([box], lr=0.1) for _ in range(2))
    optimizer.step(loss)
    copied = dict(optimizer.state[box])
    value = box.value
    optimizer.step(loss)
    expected, box.value = box.value, value
    twin.state[box] = copied
    assert "<table>" in twin._repr_html_()
    twin.step(loss)
    np.testing.assert_array_equal(box.value, expected)
    twin.state = defaultdict(dict)
    twin.step(loss)
    assert "<table>" in twin._repr_html_()


def test_keywords_from_a_hook_are_those_of_step() -> None:
    box = optim.Parameter(jnp.ones(2))
    optimizer = optim.SGD([box], lr=1.0)
    with optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"grads_or_loss": [jnp.full(2, 3.0)]})):
        optimizer.step()
    np.testing.assert_array_equal(box.value, [-2, -2])
    with (
        optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"grads": 1})),
        pytest.raises(TypeError, match=r"takes no further arguments, got grads, which belong to step\(loss_fn"),
    ):
        optimizer.step([jnp.ones(2)])
    np.testing.assert_array_equal(box.value, [-2, -2])


def test_slots_that_start_from_the_parameter_are_arrays_of_their_own() -> None:
    """The step updates slots in place, and a parameter that a slot starts from may be in other hands."""

    class Slots(NamedTuple):
        average: Any
        anchor: Any

    class Scalars(NamedTuple):
        lr: Any

    def update(param: Any, grad: Any, slots: Any, scalars: Any, flags: Any) -> Any:
        param = param - scalars.lr * grad
        return param, Slots(0.5 * slots.average + 0.5 * param, slots.anchor)

    class Averaged(optim.Optimizer):
        rule = Rule(Slots, lambda p, h, f: Slots(p, p), lambda step, hyper: Scalars(hyper.lr), update)

        def __init__(self, params: Any, lr: float = 1.0) -> None:
            super().__init__(params, dict(lr=lr))

    start = jnp.array([1.0, 2.0])
    optimizer = Averaged([start])
    algorithm = optim.functional.factory(Averaged)()
    params, state = [start], algorithm.init([start])
    compiled = jax.jit(lambda p, g, s: algorithm.update(p, g, s)[::-1], donate_argnums=2)
    for _ in range(2):
        optimizer.step([jnp.ones(2)])
        state, params = compiled(params, [jnp.ones(2)], state)
    np.testing.assert_array_equal(start, [1, 2])
    np.testing.assert_array_equal(optimizer.params[0], params[0])
    entries = optimizer.state[optimizer.param_groups[0]["params"][0]]
    for average, anchor in ((entries["average"], entries["anchor"]), (state.average[0], state.anchor[0])):
        np.testing.assert_array_equal(average, [-0.25, 0.75])
        np.testing.assert_array_equal(anchor, [1, 2])


def _set_value(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0].value = jnp.array([5.0, -5.0])


def _set_state(optimizer: Any) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"] = jnp.array([1.0, 2.0])


def _replace_state(optimizer: Any) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]] = ParameterState({"momentum_buffer": jnp.array([1.0, 2.0])})


def _forget_state(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def _move_to_the_other_group(optimizer: Any) -> None:
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def _reorder(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _drop_from_the_group(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


def _no_momentum(optimizer: Any) -> None:
    optimizer.param_groups[0]["momentum"] = 0


def _other_rate(optimizer: Any) -> None:
    optimizer.param_groups[1]["lr"] = 0.5


def _read_state(optimizer: Any) -> None:
    list(optimizer.state.values())[1]["momentum_buffer"]


def _reload(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        _set_value,
        _set_state,
        _replace_state,
        _forget_state,
        _move_to_the_other_group,
        _reorder,
        _drop_from_the_group,
        _no_momentum,
        _other_rate,
        _read_state,
        _reload,
    ],
)
def test_a_step_takes_over_nothing_that_has_changed(change: Any) -> None:
    def make() -> Any:
        boxes = [optim.Parameter(jnp.array([1.0, 2.0]) + k) for k in range(4)]
        groups = [{"params": boxes[:2]}, {"params": boxes[2:], "lr": 0.2}]
        return boxes, optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)

    boxes, optimizer = make()
    others, forgetful = make()
    for index in range(6):
        if index == 3:
            change(optimizer)
            change(forgetful)
        for box, other in zip(boxes, others, strict=True):
            box.grad = other.grad = jnp.sin(box.value)
        optimizer.step()
        forgetful._stepper.planner.plan = None
        forgetful.step()
        for box, other in zip(boxes, others, strict=True):
            np.testing.assert_array_equal(box.value, other.value)
    for box, other in zip(boxes, others, strict=True):
        ours, theirs = dict(optimizer.state.get(box, {})), dict(forgetful.state.get(other, {}))
        assert ours.keys() == theirs.keys()
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_a_step_remembers_holds_no_array_that_is_of_no_use() -> None:
    boxes = [optim.Parameter(jnp.array([1.0, 2.0]) + k) for k in range(2)]
    optimizer = optim.Adam(boxes, lr=0.1)

    def step(*with_gradient: int) -> None:
        for index, box in enumerate(boxes):
            box.grad = jnp.ones(2) if index in with_gradient else None
        optimizer.step()

    step(0, 1)
    step(0, 1)
    old = [weakref.ref(box.value) for box in boxes] + [weakref.ref(optimizer.state[boxes[0]]["exp_avg"])]
    step(0)  # the other one is frozen from now on
    step(0)
    gc.collect()
    assert [reference() is None for reference in old] == [True, False, True]
