"""A rule may update parameters of one shape together, and may refuse some parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax.rule import LearningRate, Rule


class Norms(NamedTuple):
    norm: Any


class Rate(NamedTuple):
    lr: Any


def _only_matrices(param: Any, flags: Any) -> None:
    if param.ndim != 2:
        raise ValueError(f"only matrices, got shape {param.shape}")


class Batched(optim.Optimizer):
    rule = Rule(
        slots=Norms,
        init=lambda param, hyper, flags: Norms(jnp.zeros((), param.dtype)),
        scalars=lambda step, hyper: Rate(hyper.lr),
        update=lambda params, grads, slots, scalars, flags: (
            [p - s.lr * (g @ g.T @ p) for p, g, s in zip(params, grads, scalars, strict=True)],
            [Norms(slot.norm + jnp.sum(g)) for slot, g in zip(slots, grads, strict=True)],
        ),
        check_param=_only_matrices,
        takes="alike",
    )

    def __init__(self, params: Any, lr: LearningRate = 1e-3):
        super().__init__(params, dict(lr=lr))


def test_a_batched_rule_updates_each_parameter_by_its_own() -> None:
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape)) for shape in [(2, 3), (4, 2), (2, 3), (2, 3)]]
    grads = [jnp.asarray(rng.normal(size=value.shape)) for value in params]
    expected = [p - lr * (g @ g.T @ p) for p, g, lr in zip(params, grads, (0.1, 0.1, 0.1, 0.2), strict=True)]

    optimizer = Batched([{"params": params[:3]}, {"params": params[3:], "lr": 0.2}], lr=0.1)
    optimizer.step([grads[:3], grads[3:]])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), [*optimizer.params[0], *optimizer.params[1]], expected
    )

    algorithm = optim.functional.factory(Batched)(lr=[0.1, 0.1, 0.1, 0.2])
    state = algorithm.init(params)
    updated, state = jax.jit(algorithm.update)(params, [*grads[:1], None, *grads[2:]], state)
    expected[1] = params[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updated, expected)
    assert [float(norm) for norm in state.norm] == pytest.approx(
        [float(jnp.sum(grads[0])), 0, *(float(jnp.sum(grad)) for grad in grads[2:])]
    )


def test_a_rule_that_refuses_a_parameter_names_it() -> None:
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    for make in (Batched, optim.functional.factory(Batched)().init):
        with pytest.raises(ValueError, match=r"only matrices, got shape \(2,\) \('bias'\)"):
            make(params)
