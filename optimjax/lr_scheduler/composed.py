"""Schedulers made of schedulers."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsFloat

from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.base import LRScheduler, Rate, building, nested, unless_it_fails, without_warnings
from optimjax.lr_scheduler.entries import entry_error, is_number

__all__ = ["ChainedScheduler", "SequentialLR"]


class _Composed(LRScheduler):
    """What the two have in common: the schedulers inside, and their state dicts."""

    takes_metric = True
    _schedulers: list[LRScheduler]
    _state = ("_schedulers",)

    def _take(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None, wanted: str) -> None:
        name = type(self).__name__
        if len(schedulers) < 1:
            raise ValueError(f"{name} expects at least one scheduler{wanted}, but got no scheduler.")
        for index, scheduler in enumerate(schedulers):
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(f"{name} at index {index} should have `optimizer` as its attribute, got {scheduler!r}")
            optimizer = scheduler.optimizer if optimizer is None else optimizer
            if scheduler.optimizer is not optimizer:
                raise ValueError(
                    f"{name} expects all schedulers to belong to the same optimizer, but got scheduler "
                    f"{type(scheduler).__name__} at index {index} has {scheduler.optimizer}, which is different from "
                    f"{type(optimizer).__name__}."
                )
        self._schedulers = list(schedulers)
        self._schedule(self._schedulers[0].optimizer, self._schedulers[0].key)

    def _step_inner(self, scheduler: Any, metrics: SupportsFloat | None) -> None:
        if scheduler.takes_metric:
            scheduler.step(metrics)
        else:
            scheduler.step()

    def _initial_step(self) -> None:
        if any(leaf.takes_metric for leaf in self._leaves()):
            self._begin()
        else:  # PyTorch's, which is a whole step
            super()._initial_step()

    def _restart(self) -> None:
        """What PyTorch refuses: a sequence or a chain whose turn comes begins as one that is built then."""
        self._reset_rates()
        self._begin()

    def _reset_rates(self) -> None:
        for leaf in self._leaves():
            leaf._reset_rates()

    def _leaves(self) -> list[LRScheduler]:
        return [each for each in nested(self) if not isinstance(each, _Composed)]

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`LRScheduler.state_dict`, with those of the schedulers inside."""
        inner = [scheduler.state_dict() for scheduler in self._schedulers]
        return super().state_dict() | {"_schedulers": inner}

    def _entry(self, name: str, value: Any) -> Any:
        if name != "_schedulers":
            return super()._entry(name, value)
        count = len(self._schedulers)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise entry_error(name, value, f"a list with the state dicts of {count} schedulers")
        return value

    def _load(self, state_dict: dict[str, Any]) -> None:
        for index, (scheduler, saved) in enumerate(zip(self._schedulers, state_dict["_schedulers"], strict=True)):
            try:
                scheduler.load_state_dict(saved)
            except ValueError as error:
                raise ValueError(f"_schedulers[{index}]: {error}") from error
        super()._load({name: value for name, value in state_dict.items() if name != "_schedulers"})


class SequentialLR(_Composed):
    """One scheduler after the other, each from the base learning rate on.

    A sequence or a chain in the first place is one step ahead, as in PyTorch (pytorch#196243). Where schedulers have
    different keys, :meth:`get_last_lr` reports the first one's.

    Args:
      optimizer: the optimizer whose groups are written.
      schedulers: in their order, all built for this optimizer; also ``ReduceLROnPlateau``, and sequences and chains.
      milestones: the epochs at which the next one begins, ascending. At 0 the first one has no turn.
      last_epoch: index of the last epoch done; -1 starts. Otherwise every group must have its ``initial_lr``; the
        schedulers inside are brought to their epochs, whatever ``last_epoch`` they were built with.

    Raises:
      ValueError: no scheduler, a wrong number of milestones, milestones that do not ascend, another optimizer, or
        ``last_epoch`` where a ``ReduceLROnPlateau`` is inside, whose metrics only its state dict knows.
      TypeError: not a scheduler.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> from optimjax.lr_scheduler import ConstantLR, ExponentialLR, SequentialLR
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> warm_up = ConstantLR(optimizer, factor=0.5, total_iters=2)
    >>> scheduler = SequentialLR(optimizer, [warm_up, ExponentialLR(optimizer, gamma=0.5)], milestones=[2])
    >>> rates = [scheduler.get_last_lr()[0]]
    >>> for epoch in range(4):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    ...     rates.append(scheduler.get_last_lr()[0])
    >>> rates
    [0.5, 0.5, 1.0, 0.5, 0.25]
    >>> print(scheduler)
    SequentialLR(
        ConstantLR(factor=0.5, total_iters=2),
        ExponentialLR(gamma=0.5),
        milestones=[2],
    ) at epoch 4: lr [0.25]
    """

    _state = ("_milestones",)

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[LRScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ):
        self._take(schedulers, optimizer, "")
        self._milestones = list(milestones)
        self._check_arguments()
        if last_epoch >= 0 and any(leaf.takes_metric for leaf in self._leaves()):
            raise ValueError(
                f"last_epoch={last_epoch} cannot be resumed, because a ReduceLROnPlateau would need the metrics of the "
                "epochs done: start with last_epoch=-1 and load the state dict"
            )
        with building(optimizer, nested(self)):
            self.last_epoch = 0
            # The schedulers have each taken a first step: undo these, and let the first one take it again.
            self._reset_rates()
            for leaf in self._leaves():
                leaf.last_epoch = -1 if last_epoch >= 0 and leaf in self._schedulers else leaf.last_epoch - 1
            with without_warnings():
                self._first._initial_step()
                for _ in range(last_epoch + 1):
                    self._take_turn(None)
            self._last_lr = self._rates()

    def _check_arguments(self) -> None:
        milestones, schedulers = self._milestones, self._schedulers
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(
                "Sequential Schedulers expects number of schedulers provided to be one more than the number of "
                f"milestone points, but got number of schedulers {len(schedulers)} and the number of milestones to be "
                f"equal to {len(milestones)}"
            )
        if not all(map(is_number, milestones)) or not all(a <= b for a, b in pairwise([-math.inf, *milestones])):
            raise ValueError(f"milestones must be numbers that ascend, got {milestones}")

    @property
    def _first(self) -> LRScheduler:
        return self._schedulers[bisect_right(self._milestones, 0)]

    def step(self, metrics: SupportsFloat | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Set the learning rates of the next epoch.

        Args:
          metrics: for a ``ReduceLROnPlateau`` whose turn it is.
        """
        with unless_it_fails(self):
            self._take_turn(metrics)
            self._last_lr = self._rates()

    def _take_turn(self, metrics: SupportsFloat | None) -> None:
        self.last_epoch += 1
        index = bisect_right(self._milestones, self.last_epoch)
        scheduler = self._schedulers[index]
        if index > 0 and self._milestones[index - 1] == self.last_epoch:
            scheduler._restart()
        else:
            self._step_inner(scheduler, metrics)

    def _begin(self) -> None:
        self.last_epoch = 0
        self._first._begin()
        self._last_lr = self._rates()


class ChainedScheduler(_Composed):
    """Steps several schedulers together; each works on what those before it have left.

    Where they have different keys, :meth:`get_last_lr` reports the first one's.

    Args:
      schedulers: in their order, all built for the same optimizer; also ``ReduceLROnPlateau``, and sequences and
        chains.
      optimizer: that optimizer; the first scheduler's unless given.

    Raises:
      ValueError: no scheduler, or another optimizer.
      TypeError: not a scheduler.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> from optimjax.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> constant = ConstantLR(optimizer, factor=0.5, total_iters=2)
    >>> scheduler = ChainedScheduler([constant, ExponentialLR(optimizer, gamma=0.5)])
    >>> rates = [scheduler.get_last_lr()[0]]
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    ...     rates.append(scheduler.get_last_lr()[0])
    >>> rates
    [0.5, 0.25, 0.25, 0.125]
    """

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None):
        self._take(schedulers, optimizer, " to be chained")
        self._last_lr: list[Rate] = self._rates()

    def step(self, metrics: SupportsFloat | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Set the learning rates of the next epoch.

        Args:
          metrics: for the ``ReduceLROnPlateau`` among them.
        """
        with unless_it_fails(self):
            for scheduler in self._schedulers:
                self._step_inner(scheduler, metrics)
            self._last_lr = self._rates()

    def _begin(self) -> None:
        for scheduler in self._schedulers:
            scheduler._begin()
        self._last_lr = self._rates()
