"""Rates in arrays keep their dtype, scheduling compiles nothing, and scheduler and optimizer are copied together."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_cases import RATES, build, build_torch, every_case, follow, make, rates_of, takes_metric

import optimjax as optim


@pytest.mark.parametrize("shape", [(), (1,)])
@every_case
def test_rates_in_arrays_are_pytorchs(case: str, shape: Any, torch: Any, x64: None) -> None:
    """float64 tensors; only `LambdaLR` and what is nested differs, by the order of a product."""
    ours = build([jnp.full(shape, rate, jnp.float64) for rate in RATES])
    theirs = build_torch(torch, [torch.full(shape, rate, dtype=torch.float64) for rate in RATES])
    our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
    numbers = lambda optimizer: [(rate.shape, float(rate.reshape(()))) for rate in rates_of(optimizer)]  # noqa: E731
    assert follow(ours, our, 40, numbers) == follow(theirs, their, 40, numbers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_case
def test_a_rate_in_an_array_stays_an_array_of_its_dtype(case: str, dtype: Any) -> None:
    optimizer, plain = build([jnp.asarray(rate, dtype) for rate in RATES]), build()
    scheduler, reference = make(optim.lr_scheduler, case)(optimizer), make(optim.lr_scheduler, case)(plain)
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 0.2}[dtype]
    for ours, wanted in zip(follow(optimizer, scheduler, 12), follow(plain, reference, 12), strict=True):
        assert all(isinstance(rate, jax.Array) and rate.dtype == dtype and rate.shape == () for rate in ours)
        np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=tolerance, atol=1e-9)
    assert all(isinstance(rate, jax.Array) and rate.dtype == dtype for rate in scheduler.get_last_lr())


@every_case
def test_scheduling_never_recompiles_the_step(case: str, compilations: Any) -> None:
    optimizer = optim.Adam([{"params": [jnp.ones(3)]}, {"params": [jnp.ones(3)]}, {"params": [jnp.ones(2)]}], lr=0.1)
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    metric = [1.0] if takes_metric(scheduler) else []

    def epoch() -> None:
        optimizer.step([[jnp.ones(3)], [jnp.ones(3)], [jnp.ones(2)]])
        optimizer.step(sum_of_squares)
        scheduler.step(*metric)

    for _ in range(2):
        epoch()
    before = compilations()
    for _ in range(12):
        epoch()
    assert compilations() == before


def sum_of_squares(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_optimizer_and_scheduler_copied_together_stay_together() -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, "sequence of a chain")(optimizer)
    follow(optimizer, scheduler, 2)
    for twins in (copy.deepcopy((optimizer, scheduler)), pickle.loads(pickle.dumps((optimizer, scheduler)))):
        assert twins[1].optimizer is twins[0]
        expected = follow(*copy.deepcopy((optimizer, scheduler)), 60)
        assert follow(*twins, 60) == expected
