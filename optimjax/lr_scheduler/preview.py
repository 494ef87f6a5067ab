"""The rates that a scheduler will give, without taking its steps."""

import warnings
from collections.abc import Sequence
from typing import Any, SupportsFloat

import numpy as np

from optimjax.lr_scheduler.base import LRScheduler, Snapshot

__all__ = ["preview"]


def preview(scheduler: LRScheduler, steps: int, metrics: Sequence[SupportsFloat] | None = None) -> np.ndarray:
    """The learning rates of the next ``steps`` epochs, beginning with the present one; nothing is changed.

    Args:
      scheduler: of any kind. Functions that it calls are called.
      steps: number of rows, at least 0.
      metrics: what a ``ReduceLROnPlateau`` shall see, one for each step between two rows.

    Returns:
      float64 ``[steps, groups]``.

    Raises:
      TypeError: the scheduler takes a metric and there is none.

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
    before = Snapshot(scheduler)
    metric = iter(metrics) if metrics is not None else None
    each: Any = scheduler
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about optimizer.step(), which is not called here
            for row in range(steps):
                rates[row] = [float(rate) for rate in scheduler._rates()]
                if row + 1 < steps:
                    each.step(*([next(metric)] if metric is not None else []))
    finally:
        before.restore()
    return rates
