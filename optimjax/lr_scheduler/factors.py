"""Schedulers that multiply the learning rate by a factor."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optimjax import schedules
from optimjax._core.containers import plain
from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.base import LRScheduler, Rate, attributes_of, building, check_number, extended, times
from optimjax.lr_scheduler.entries import entry_error

__all__ = [
    "ConstantLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "PolynomialLR",
    "StepLR",
]


class LambdaLR(LRScheduler):
    """The initial learning rate times a function of the epoch.

    Args:
      optimizer: the optimizer whose groups are written.
      lr_lambda: ``epoch -> factor``, or a list of such functions, one for each group.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: a list whose length is not the number of groups.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=0.5)
    >>> warm_up = optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, (epoch + 1) / 4))
    >>> rates = []
    >>> for epoch in range(5):
    ...     rates.append(optimizer.param_groups[0]["lr"])
    ...     optimizer.step([jnp.ones(2)])
    ...     warm_up.step()
    >>> rates
    [0.125, 0.25, 0.375, 0.5, 0.5]
    """

    _state = ("lr_lambdas",)

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        with building(optimizer):
            given = list(lr_lambda) if isinstance(lr_lambda, (list, tuple)) else None
            groups = len(optimizer.param_groups)
            if given is not None and len(given) != groups:
                raise ValueError(f"Expected {groups} lr_lambdas, but got {len(given)}")
            self.lr_lambdas: list[Any] = [lr_lambda] * groups if given is None else given
            for function in self.lr_lambdas:
                if not callable(function):
                    raise TypeError(f"lr_lambda should be a function, but got {type(function).__name__}: {function!r}")
            super().__init__(optimizer, last_epoch, key=key)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`LRScheduler.state_dict`; of the functions only callable objects are saved, by their attributes.

        Loading puts these into the present objects.
        """
        return super().state_dict() | {"lr_lambdas": [attributes_of(function) for function in self.lr_lambdas]}

    def _entry(self, name: str, value: Any) -> Any:
        if name != "lr_lambdas":
            return super()._entry(name, value)
        value, groups = plain(value), len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= groups:
            raise entry_error(name, value, f"a list with None or a dict for each of {groups} groups")
        for index, attributes in enumerate(value):
            if attributes is not None and not isinstance(attributes, Mapping):
                raise entry_error(f"{name}[{index}]", attributes, "None, or a dict of attributes")
        return value

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["lr_lambdas"]
        self._extend(len(saved))
        super()._load({name: value for name, value in state_dict.items() if name != "lr_lambdas"})
        for function, attributes in zip(self.lr_lambdas, saved, strict=False):
            if attributes:
                vars(function).update(attributes)

    def get_lr(self) -> list[Rate]:
        """Initial rates times factors."""
        self._warn_outside_step()
        return [
            times(base, factor(self.last_epoch)) for factor, base in zip(self.lr_lambdas, self.base_lrs, strict=True)
        ]

    def _adopt_groups(self) -> None:
        super()._adopt_groups()
        self._extend(len(self.base_lrs))

    def _extend(self, groups: int) -> None:
        """A group that was added later follows the function, if there is one for all groups."""
        self.lr_lambdas = extended("scheduler.lr_lambdas", self.lr_lambdas, groups)


class MultiplicativeLR(LambdaLR):
    """The present learning rate times a function of the epoch.

    Args:
      optimizer: the optimizer whose groups are written.
      lr_lambda: ``epoch -> factor``, or a list of such functions, one for each group; not called for epoch 0.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: a list whose length is not the number of groups.
      TypeError: not a function.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.5)
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.125]
    """

    def get_lr(self) -> list[Rate]:
        """The present rates times factors."""
        self._warn_outside_step()
        if self._is_initial:
            return self._rates()
        return [
            times(rate, factor(self.last_epoch)) for factor, rate in zip(self.lr_lambdas, self._rates(), strict=True)
        ]


class StepLR(LRScheduler):
    """Multiplies the learning rate by ``gamma`` every ``step_size`` epochs.

    Args:
      optimizer: the optimizer whose groups are written.
      step_size: epochs between two cuts, above 0.
      gamma: factor of each cut.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: ``step_size`` is not positive.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    >>> for epoch in range(4):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1, *, key: str = "lr"
    ):
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        check_number("step_size", self.step_size, 0, open_=True)

    def get_lr(self) -> list[Rate]:
        """The present rates, cut where it is time."""
        self._warn_outside_step()
        if self.last_epoch == 0 or self.last_epoch % self.step_size != 0:
            return self._rates()
        return [rate * self.gamma for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [schedules.step(base, self.step_size, self.gamma)(self.last_epoch) for base in self.base_lrs]


class MultiStepLR(LRScheduler):
    """Multiplies the learning rate by ``gamma`` at each milestone.

    Args:
      optimizer: the optimizer whose groups are written.
      milestones: epochs; a repeated one applies twice.
      gamma: factor of each cut.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    >>> for epoch in range(4):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        self.milestones = Counter(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch, key=key)

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["milestones"].items()
        try:
            milestones = {json.loads(epoch) if isinstance(epoch, str) else epoch: count for epoch, count in saved}
        except ValueError:
            raise entry_error("milestones", state_dict["milestones"], "a dict from epochs to counts") from None
        super()._load(state_dict | {"milestones": Counter(milestones)})

    def get_lr(self) -> list[Rate]:
        """The present rates, cut at a milestone."""
        self._warn_outside_step()
        if self.last_epoch not in self.milestones:
            return self._rates()
        return [rate * self.gamma ** self.milestones[self.last_epoch] for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        milestones = self.milestones.elements()
        closed = schedules.multi_step(1, milestones, self.gamma)(self.last_epoch)
        return [base * closed for base in self.base_lrs]


class ConstantLR(LRScheduler):
    """The learning rate times ``factor`` until epoch ``total_iters``, then whole.

    Args:
      optimizer: the optimizer whose groups are written.
      factor: from 0 to 1.
      total_iters: how many epochs it lasts, at least 0.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    >>> rates = [scheduler.get_last_lr()[0]]
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    ...     rates.append(scheduler.get_last_lr()[0])
    >>> rates
    [0.5, 0.5, 1.0, 1.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        schedules.constant(1.0, self.factor)
        check_number("total_iters", self.total_iters, 0)

    def get_lr(self) -> list[Rate]:
        """The present rates, cut at the first epoch and restored at the last."""
        self._warn_outside_step()
        if self.last_epoch == 0:
            return [rate * self.factor for rate in self._rates()]
        if self.last_epoch != self.total_iters:
            return self._rates()
        if self.factor == 0:  # nothing is left to be scaled up
            return self.base_lrs
        return [rate * (1.0 / self.factor) for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [schedules.constant(base, self.factor, self.total_iters)(self.last_epoch) for base in self.base_lrs]


class LinearLR(LRScheduler):
    """The learning rate times a factor that goes straight from ``start_factor`` to ``end_factor``.

    Args:
      optimizer: the optimizer whose groups are written.
      start_factor: above 0, at most 1.
      end_factor: from 0 to 1.
      total_iters: how many epochs it takes, at least 0.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    >>> rates = [scheduler.get_last_lr()[0]]
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    ...     rates.append(scheduler.get_last_lr()[0])
    >>> rates
    [0.5, 0.75, 1.0, 1.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        schedules.linear(1.0, self.start_factor, self.end_factor)
        check_number("total_iters", self.total_iters, 0)

    def get_lr(self) -> list[Rate]:
        """The next rates from the present ones."""
        self._warn_outside_step()
        if self.last_epoch == 0:
            return [rate * self.start_factor for rate in self._rates()]
        if self._is_initial or self.last_epoch > self.total_iters:
            return self._rates()
        rise = self.end_factor - self.start_factor
        factor = 1.0 + rise / (self.total_iters * self.start_factor + (self.last_epoch - 1) * rise)
        return [rate * factor for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        arguments = self.start_factor, self.end_factor, self.total_iters
        return [schedules.linear(base, *arguments)(self.last_epoch) for base in self.base_lrs]


class ExponentialLR(LRScheduler):
    """Multiplies the learning rate by ``gamma`` every epoch.

    Args:
      optimizer: the optimizer whose groups are written.
      gamma: factor of each epoch.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.125]
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1, *, key: str = "lr"):
        self.gamma = gamma
        super().__init__(optimizer, last_epoch, key=key)

    def get_lr(self) -> list[Rate]:
        """The present rates times gamma."""
        self._warn_outside_step()
        if self._is_initial:
            return self._rates()
        return [rate * self.gamma for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [schedules.exponential(base, self.gamma)(self.last_epoch) for base in self.base_lrs]


class PolynomialLR(LRScheduler):
    """The learning rate times a power of the share of epochs that is left, down to 0.

    Args:
      optimizer: the optimizer whose groups are written.
      total_iters: how many epochs it takes, at least 0.
      power: of the share; 1 goes straight down.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: ``total_iters`` is negative.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.PolynomialLR(optimizer, total_iters=4, power=2.0)
    >>> for epoch in range(2):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    def __init__(
        self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1, *, key: str = "lr"
    ):
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        check_number("total_iters", self.total_iters, 0)

    def get_lr(self) -> list[Rate]:
        """The next rates from the present ones."""
        self._warn_outside_step()
        if self._is_initial or self.last_epoch > self.total_iters:
            return self._rates()
        left, before = 1.0 - self.last_epoch / self.total_iters, 1.0 - (self.last_epoch - 1) / self.total_iters
        factor = (left / before) ** self.power
        return [rate * factor for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [schedules.polynomial(base, self.total_iters, self.power)(self.last_epoch) for base in self.base_lrs]
