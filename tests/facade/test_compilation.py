"""A step compiles when shapes change, and not when values, counts or patterns of missing gradients do."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim


@pytest.mark.parametrize("form", ["backward", "grads", "loss"])
@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
def test_changing_group_values_never_recompiles(form: str, optimizer_class: Any, compilations: Any) -> None:
    optimizer = optimizer_class([jnp.ones(3), jnp.ones((2, 2))], lr=0.1, weight_decay=0.1)

    def loss(params: Any, x: Any) -> Any:
        return x * sum(jnp.sum(p**2) for p in params)

    def step(x: float) -> None:
        if form == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss, x)
            optimizer.step()
        elif form == "grads":
            optimizer.step(optimizer.params)
        else:
            optimizer.step(loss, x)

    step(1.0)
    step(1.0)
    before = compilations()
    numeric = [
        key
        for key, value in optimizer.param_groups[0].items()
        if isinstance(value, float) and not isinstance(value, bool)
    ]
    assert {"lr", "weight_decay"} <= set(numeric)
    for index in range(3):
        for key in numeric:
            optimizer.param_groups[0][key] *= 0.9
        if "betas" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["betas"] = (0.5 + 0.1 * index, 0.9)
        step(1.0 + index)
    assert compilations() == before


def test_a_rate_in_an_array_does_not_recompile_either(compilations: Any) -> None:
    optimizer = optim.SGD([jnp.ones(3)], lr=jnp.asarray(0.1))
    rates = [jnp.asarray(0.01 * i) for i in range(4)]
    for _ in range(2):
        optimizer.step([jnp.ones(3)])
    before = compilations()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step([jnp.ones(3)])
    assert compilations() == before


def test_differing_step_counts_do_not_recompile(compilations: Any) -> None:
    """Experts of a mixture: each step another few get gradients. The number of parameters decides, not their counts."""
    rng = np.random.default_rng(0)
    optimizer = optim.Adam([jnp.ones(4) for _ in range(6)], lr=0.1)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step([jnp.ones(4) if rng.random() < 0.6 else None for _ in range(6)])

    run(30)
    before = compilations()
    run(30)
    assert compilations() - before <= 1  # a number of gradients that had not come up


def test_endless_patterns_of_missing_gradients_stop_compiling(compilations: Any) -> None:
    """Each pattern of shapes would be a program of its own; after some the optimizer uses programs for any pattern."""
    rng = np.random.default_rng(1)
    shapes = [(2, 3), (4,), (), (5, 1)] * 3
    grads = [jnp.ones(shape) for shape in shapes]
    optimizer = optim.Adam(grads, lr=0.1)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step([grad if rng.random() < 0.6 else None for grad in grads])

    run(40)
    before = compilations()
    run(30)
    assert compilations() - before <= 1


def test_a_new_optimizer_of_the_same_shapes_compiles_nothing(compilations: Any) -> None:
    def run() -> None:
        optimizer = optim.Adam([jnp.ones(7), jnp.ones(7)], lr=0.1)
        for _ in range(2):
            optimizer.step([jnp.ones(7), jnp.ones(7)])

    run()
    before = compilations()
    run()
    assert compilations() == before


def test_up_to_256_parameters_share_one_program(compilations: Any) -> None:
    shapes = [(3,)] * 70 + [(2, 2), (5,)]
    optimizer = optim.SGD([np.ones(shape, np.float32) for shape in shapes], lr=0.1)
    grads = [np.ones(shape, np.float32) for shape in shapes]
    before = compilations()
    optimizer.step(grads)
    assert compilations() == before + 1
