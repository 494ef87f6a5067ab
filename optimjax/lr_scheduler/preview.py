"""The rates that a scheduler will give, without taking its steps."""

from collections.abc import Sequence
from typing import Any, SupportsFloat

import numpy as np

from optimjax._core.definition import as_number
from optimjax.lr_scheduler.base import LRScheduler, Snapshot, nested, without_warnings

__all__ = ["preview"]


def preview(scheduler: LRScheduler, steps: int, metrics: Sequence[SupportsFloat] | None = None) -> np.ndarray:
    """The learning rates of the next ``steps`` epochs, beginning with the present one; nothing is changed.

    Args:
      scheduler: of any kind. Functions that it calls are called.
      steps: number of rows, at least 0.
      metrics: what a ``ReduceLROnPlateau`` shall see, one for each step between two rows; others look at none.

    Returns:
      float64 ``[steps, groups]``.

    Raises:
      TypeError: a ``ReduceLROnPlateau`` has no metric.
      ValueError: there are fewer metrics than steps between rows, or more steps than a ``OneCycleLR`` has.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    >>> optim.lr_scheduler.preview(scheduler, 3)
    array([[1.  ],
           [0.5 ],
           [0.25]])
    """
    groups = scheduler.optimizer.param_groups
    rates = np.empty((steps, len(groups)))
    if metrics is not None and len(metrics) < steps - 1:
        raise ValueError(f"expected a metric for each of {steps - 1} steps, got {len(metrics)}")
    before = Snapshot(scheduler.optimizer, nested(scheduler))
    each: Any = scheduler
    try:
        with without_warnings():
            for row in range(steps):
                rates[row] = [as_number(rate) for rate in scheduler._rates()]
                if row + 1 < steps:
                    each.step(*([None if metrics is None else metrics[row]] if scheduler.takes_metric else []))
    finally:
        before.restore()
    return rates
