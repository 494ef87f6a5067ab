"""The learning rate range test: which rates train, which diverge."""

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np

from optimjax._core.containers import copied
from optimjax._engine.loss_call import LossArguments
from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.base import write

__all__ = ["find_lr"]


def find_lr(
    optimizer: Optimizer,
    loss_fn: Callable[..., Any],
    batches: Iterable[Any],
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    stop: float = 4.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Train with a learning rate that rises from step to step, note the losses, and put everything back.

    Plot the losses over the rates, on a logarithmic axis: a good rate is somewhat smaller than the one at which the
    loss falls fastest.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017 (arXiv:1506.01186).

    Args:
      optimizer: it steps, all groups with the same rate, with its hooks. Afterwards parameters, gradients, state,
        groups, and other variables of modules (batch statistics, random state) are what they were.
      loss_fn: as in ``optimizer.step(loss_fn, *batch)``.
      batches: gone through again and again. Each is a tuple (or list) of what ``loss_fn`` takes after the parameters,
        or the one such thing.
      start: the first rate, above 0.
      end: the last rate, above 0. From step to step the rate is multiplied by the same factor.
      steps: number of rates, at least 2.
      stop: ends early with a loss that is more than so many times as large as the smallest one, or not finite.

    Returns:
      Rates and losses, each float64 ``[n]`` with n at most ``steps``. Each loss is the one before the update.

    Raises:
      ValueError: a rate or the number of steps out of range, or fewer batches than steps where they cannot be gone
        through again.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.1)
    >>> def loss_fn(params, x):
    ...     return (params["w"] * x) ** 2
    >>> rates, losses = optim.lr_scheduler.find_lr(optimizer, loss_fn, [1.0, 2.0], start=1e-3, steps=5)
    >>> print(rates[:4], optimizer.params["w"], optimizer.param_groups[0]["lr"])
    [0.001 0.01  0.1   1.   ] 1.0 0.1
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"start and end must be positive, got {start} and {end}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has no lr in its groups")
    rates = np.geomspace(start, end, steps)
    losses: list[float] = []
    before = _Before(optimizer)
    try:
        optimizer.donate = False  # or the parameters that are to be put back would be gone
        for rate, batch in zip(rates, _again_and_again(batches), strict=False):
            args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            before.note_variables(
                optimizer._stepper.variables(optimizer.param_groups, optimizer._handed, loss_fn, LossArguments(args))
            )
            for group in optimizer.param_groups:
                write(group, "lr", float(rate))
            losses.append(float(optimizer.step(loss_fn, *args)))
            if not math.isfinite(losses[-1]) or losses[-1] > stop * abs(min(losses)):
                break
        else:
            if len(losses) < steps:
                raise ValueError(f"expected {steps} batches, or such that can be gone through again, got {len(losses)}")
    finally:
        before.restore()
    return rates[: len(losses)], np.array(losses)


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    seen = True
    while seen:
        seen = False
        for batch in batches:
            seen = True
            yield batch


class _Before:
    """All that steps may change, to be put back."""

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._dicts = [(each, dict(each)) for each in (vars(optimizer), *optimizer.param_groups)]
        self._before = [(p, p.value, p.grad) for p in optimizer._parameters()]
        # Containers are copied: an optimizer with a step of its own may keep lists, and change them.
        self._state = {
            key: (entry, copied(entry)) for key, entry in optimizer.state.items() if isinstance(entry, MutableMapping)
        }
        self._variables: dict[int, tuple[Any, Any]] = {}

    def note_variables(self, variables: Iterable[Any]) -> None:
        """What a loss function may change in modules."""
        for variable in variables:
            self._variables.setdefault(id(variable), (variable, variable.get_value()))

    def restore(self) -> None:
        for present, kept in self._dicts:
            present.clear()
            present.update(kept)
        for parameter, value, grad in self._before:
            parameter._write(value)
            parameter.grad = grad
        state = self._optimizer.state
        for parameter, _, _ in self._before:
            state.pop(parameter, None)
        for key, (entry, values) in self._state.items():
            entry.clear()
            entry.update(values)
            state[key] = entry
        for variable, value in self._variables.values():
            variable.set_value(value)
