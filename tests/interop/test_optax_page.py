"""The page "Coming from optax" names everything that optax has, and what it calls the same is the same."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_cases
import pytest

from optimjax import functional as F
from optimjax import schedules

PAGE = (Path(__file__).parent.parent.parent / "docs" / "coming_from_optax.md").read_text()
WORDS = set(re.findall(r"\w+", PAGE))


@pytest.fixture(autouse=True)
def double_precision(strict: None, x64: None) -> Iterator[None]:
    """And the promotion that optax relies on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_transformation_is_on_the_page() -> None:
    absent = {name for name in optax_cases.transformations() if not name.startswith("scale_by_")} - WORDS
    assert not absent


def test_every_schedule_is_on_the_page() -> None:
    made = {name for name, value in vars(optax.schedules).items() if inspect.isfunction(value)}
    assert len(made) > 10
    assert not made - WORDS


LR = 0.02
RATES = jnp.array([0.1, 0.05, 0.02])


def decayed(tx: Any) -> Any:
    return optax.chain(optax.add_decayed_weights(0.1), tx)


SAME = {
    "sgd": (optax.sgd(LR), F.sgd(lr=LR)),
    "sgd, momentum": (optax.sgd(LR, momentum=0.9), F.sgd(lr=LR, momentum=0.9)),
    "sgd, nesterov": (optax.sgd(LR, momentum=0.9, nesterov=True), F.sgd(lr=LR, momentum=0.9, nesterov=True)),
    "sgd, decay": (decayed(optax.sgd(LR, momentum=0.9)), F.sgd(lr=LR, momentum=0.9, weight_decay=0.1)),
    "adam": (optax.adam(LR), F.adam(lr=LR)),
    "adam, decay": (decayed(optax.adam(LR)), F.adam(lr=LR, weight_decay=0.1)),
    "adamw": (optax.adamw(LR, weight_decay=1e-2), F.adamw(lr=LR)),
    "adamw, mask": (
        optax.adamw(LR, weight_decay=0.1, mask={"base": {"w": True}, "b": False}),
        F.adamw(lr=LR, weight_decay={"base": 0.1, "b": 0.0}),
    ),
    "adamax": (optax.adamax(LR), F.adamax(lr=LR)),
    "adadelta": (optax.adadelta(1.0), F.adadelta()),
    "adagrad": (
        optax.adagrad(LR, initial_accumulator_value=0.0, eps=0.0),
        F.adagrad(lr=LR, eps=0.0),
    ),
    "rmsprop": (optax.rmsprop(LR, decay=0.99, eps_in_sqrt=False), F.rmsprop(lr=LR)),
    "rmsprop, centered": (
        optax.rmsprop(LR, decay=0.99, eps_in_sqrt=False, centered=True, momentum=0.9),
        F.rmsprop(lr=LR, centered=True, momentum=0.9),
    ),
    "radam": (optax.radam(LR, eps=1e-30), F.radam(lr=LR, eps=1e-30)),
    "a schedule": (optax.sgd(lambda count: RATES[count % 3]), F.sgd(lr=lambda count: RATES[count % 3])),
}
DIFFERENT = {
    "adamw": (optax.adamw(LR), F.adamw(lr=LR)),
    "adagrad": (optax.adagrad(LR), F.adagrad(lr=LR)),
    "rmsprop": (optax.rmsprop(LR), F.rmsprop(lr=LR)),
    "amsgrad": (optax.amsgrad(LR), F.adam(lr=LR, amsgrad=True)),
    "nadam": (optax.nadam(LR), F.nadam(lr=LR)),
    "radam": (optax.radam(LR), F.radam(lr=LR)),
    "rprop": (optax.rprop(LR), F.rprop(lr=LR)),
}


def distance(tx: Any, algorithm: F.Algorithm) -> float:
    """After some steps of both."""
    params = jax.tree.map(lambda p: p.astype(float), optax_cases.PARAMS)
    theirs, state, ours, own = params, tx.init(params), params, algorithm.init(params)
    for _ in range(12):
        updates, state = tx.update(jax.grad(optax_cases.loss)(theirs), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        ours, own = algorithm.update(ours, jax.grad(optax_cases.loss)(ours), own)
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True))


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same(name: str) -> None:
    assert distance(*SAME[name]) < 1e-12


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_not(name: str) -> None:
    assert distance(*DIFFERENT[name]) > 1e-7


def test_nadam_is_adam_with_nesterov_momentum() -> None:
    params = optax_cases.PARAMS
    updates = [tx.update(params, tx.init(params))[0] for tx in (optax.nadam(LR), optax.adam(LR, nesterov=True))]
    chex.assert_trees_all_equal(*updates)


SCHEDULES = {
    "linear": (optax.linear_schedule(0.1, 0.02, 8), schedules.linear(0.1, 1.0, 0.02 / 0.1, 8)),
    "exponential": (optax.exponential_decay(0.1, 4, 0.5), schedules.exponential(0.1, 0.5 ** (1 / 4))),
    "staircase": (optax.exponential_decay(0.1, 4, 0.5, staircase=True), schedules.step(0.1, 4, 0.5)),
    "polynomial": (optax.polynomial_schedule(0.1, 0.0, 2.0, 8), schedules.polynomial(0.1, 8, 2.0)),
    "piecewise": (optax.piecewise_constant_schedule(0.1, {3: 0.5, 6: 0.5}), schedules.multi_step(0.1, [3, 6], 0.5)),
    "join": (
        optax.join_schedules([optax.constant_schedule(0.1), optax.exponential_decay(0.2, 1, 0.5)], [3]),
        schedules.sequential([lambda count: 0.1 + 0.0 * count, schedules.exponential(0.2, 0.5)], [3]),
    ),
    "cosine": (optax.cosine_decay_schedule(0.1, 11, 0.1), schedules.cosine_annealing(0.1, 11, 0.1 * 0.1)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_are_the_same(name: str) -> None:
    theirs, ours = ([float(schedule(jnp.asarray(k))) for k in range(12)] for schedule in SCHEDULES[name])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
