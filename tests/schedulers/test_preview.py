"""A preview returns the rates that are to come, and changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_cases import METRICS, build, every_case, follow, groups_of, make, takes_metric

import optimjax as optim


@every_case
def test_a_preview_is_what_comes_and_changes_nothing(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 3)
    before = groups_of(optimizer), scheduler.state_dict()
    metrics = METRICS[3:] if takes_metric(scheduler) else None
    rates = optim.lr_scheduler.preview(scheduler, 60, metrics)
    assert rates.shape == (60, 3)
    assert rates.dtype == np.float64
    assert (groups_of(optimizer), scheduler.state_dict()) == before
    assert rates.tolist() == follow(optimizer, scheduler, 60, first=3)


def test_preview_of_another_number_and_of_arrays() -> None:
    optimizer = build([jnp.full((1,), 0.5)])
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    np.testing.assert_array_equal(optim.lr_scheduler.preview(scheduler, 3), [[0.5], [0.25], [0.125]])
    optimizer.param_groups[0]["weight_decay"] = 1.0
    decay = optim.lr_scheduler.ChainedScheduler([optim.lr_scheduler.ExponentialLR(optimizer, 0.1, key="weight_decay")])
    np.testing.assert_allclose(optim.lr_scheduler.preview(decay, 2), [[1.0], [0.1]])
    assert optim.lr_scheduler.preview(scheduler, 0).shape == (0, 1)


def test_preview_where_it_cannot_be() -> None:
    optimizer = build()
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    chained = optim.lr_scheduler.ChainedScheduler([optim.lr_scheduler.StepLR(optimizer, 3), plateau])
    for scheduler in (plateau, chained):
        before = scheduler.state_dict()
        with pytest.raises(TypeError, match="ReduceLROnPlateau needs the metric of the epoch"):
            optim.lr_scheduler.preview(scheduler, 3)
        with pytest.raises(ValueError, match="expected a metric for each of 4 steps, got 3"):
            optim.lr_scheduler.preview(scheduler, 5, [1.0, 2.0, 3.0])
        assert scheduler.state_dict() == before
    with pytest.raises(ValueError, match="Tried to step 6 times"):
        optim.lr_scheduler.preview(optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5), 8)
    # One that looks at no metric does not take it for an epoch.
    step = optim.lr_scheduler.StepLR(build([1.0]), 1, gamma=0.5)
    assert optim.lr_scheduler.preview(step, 3, [7.0, 7.0]).ravel().tolist() == [1.0, 0.5, 0.25]
