"""Learning rate schedulers that write the groups of an optimizer, with PyTorch's names, signatures and values.

Values are computed on the host in double precision by PyTorch's own (mostly recursive) formulas, so they agree float
for float; a step of the optimizer afterwards compiles nothing.

Differs from PyTorch:

1. ``load_state_dict`` undoes what building the scheduler did to the learning rates, so that a run resumes exactly
   whether the scheduler was built before or after the optimizer's state was loaded.
2. A group added to the optimizer later is scheduled from the learning rate that it was added with.
"""

import copy
import math
import types
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimjax.optimizer import Optimizer

__all__ = ["CosineAnnealingLR", "ExponentialLR", "LRScheduler", "LambdaLR", "MultiStepLR", "StepLR"]

Rate = Any  # a float, or a scalar array where the group has one


class LRScheduler:
    """Base class of the schedulers, as ``torch.optim.lr_scheduler.LRScheduler``.

    A subclass implements :meth:`get_lr`. Building a scheduler takes its first step, which sets the learning rates of
    epoch 0; call :meth:`step` after each epoch (or batch), after ``optimizer.step()``.

    Args:
      optimizer: the optimizer whose groups are written.
      last_epoch: index of the last epoch done; -1 starts. Otherwise every group must have its ``initial_lr``.

    Raises:
      TypeError: not an optimizer.
      KeyError: resuming with ``last_epoch`` where a group has no ``initial_lr``.
    """

    # As in PyTorch's state dicts.
    _get_lr_called_within_step: bool = False
    _is_initial: bool = False

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        if last_epoch != -1:
            for index, group in enumerate(optimizer.param_groups):
                if "initial_lr" not in group:
                    raise KeyError(
                        f"param 'initial_lr' is not specified in param_groups[{index}] when resuming scheduler with "
                        f"last_epoch >= 0: load the optimizer's state first, or start with last_epoch=-1"
                    )
        self.last_epoch = last_epoch
        self.base_lrs: list[Rate] = []
        if not optimizer._scheduled:  # steps before the first scheduler do not count for the warning below
            optimizer._scheduled, optimizer._step_called = True, False
        self._step_count = 0
        self._is_initial = True
        self.step()
        self._is_initial = False
        optimizer._built_rates = self._rates()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as plain Python values where the learning rates are."""
        return {key: _snapshot(value) for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Learning rates that building a scheduler has overwritten, and nobody has touched since, become those that the
        optimizer had loaded before, or, if it has loaded nothing, those of the saved run.
        """
        vars(self).update({key: _snapshot(value) for key, value in state_dict.items()})
        built = self.optimizer._built_rates
        rates = self.optimizer._loaded_rates or self._last_lr
        for group, old, rate in zip(self.optimizer.param_groups, built or (), rates, strict=False):
            if group["lr"] is old or group["lr"] == old:
                self._write(group, rate)
        if built is not None:
            self.optimizer._built_rates = self._rates()

    def get_last_lr(self) -> list[Rate]:
        """The learning rates that the last step set, one for each group."""
        return self._last_lr

    def get_lr(self) -> list[Rate]:
        """The learning rates of ``last_epoch``, one for each group, from those of the epoch before."""
        raise NotImplementedError(f"{type(self).__name__} must implement get_lr()")

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates of the next epoch.

        Args:
          epoch: jump to this epoch instead. Deprecated, as in PyTorch.
        """
        if self._step_count == 1 and not self.optimizer._step_called:
            warnings.warn(
                "Detected call of `lr_scheduler.step()` before `optimizer.step()`. Call them in the opposite order: "
                "`optimizer.step()` before `lr_scheduler.step()`. Otherwise the first value of the learning rate "
                "schedule is skipped.",
                UserWarning,
                stacklevel=2,
            )
        if epoch is not None:
            warnings.warn(
                "The epoch parameter in `scheduler.step()` is deprecated. Please use `scheduler.step()` to step the "
                "scheduler. If epoch is given, the closed form is used instead of the chainable one, where available.",
                UserWarning,
                stacklevel=2,
            )
        before = self.last_epoch, self._step_count
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        self._step_count += 1
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._get_lr_called_within_step = True
        try:
            closed_form = getattr(self, "_get_closed_form_lr", None)
            rates = self.get_lr() if epoch is None or closed_form is None else closed_form()
        except BaseException:
            self.last_epoch, self._step_count = before
            raise
        finally:
            self._get_lr_called_within_step = False
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            self._write(group, rate)
        self._last_lr = self._rates()

    def _rates(self) -> list[Rate]:
        return [group["lr"] for group in self.optimizer.param_groups]

    @staticmethod
    def _write(group: dict[str, Any], rate: Rate) -> None:
        old = group["lr"]
        group["lr"] = jnp.asarray(rate, old.dtype) if isinstance(old, jax.Array) else rate

    def _warn_outside_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use `get_last_lr()`.",
                UserWarning,
                stacklevel=3,
            )


def _snapshot(value: Any) -> Any:
    """A state dict and a scheduler must not share what either may change."""
    return copy.copy(value) if isinstance(value, (list, dict)) else value


class LambdaLR(LRScheduler):
    """The initial learning rate times a function of the epoch.

    Args:
      optimizer: the optimizer whose groups are written.
      lr_lambda: ``epoch -> factor``, or a list of such functions, one for each group.
      last_epoch: index of the last epoch done; -1 starts.

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

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ):
        groups = optimizer.param_groups
        if isinstance(lr_lambda, (list, tuple)):
            if len(lr_lambda) != len(groups):
                raise ValueError(f"Expected {len(groups)} lr_lambdas, but got {len(lr_lambda)}")
            self.lr_lambdas = list(lr_lambda)
        else:
            self.lr_lambdas: list[Any] = [lr_lambda] * len(groups)
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`LRScheduler.state_dict`; of the functions only callable objects are saved, by their attributes."""
        saved = [None if isinstance(f, types.FunctionType) else dict(vars(f)) for f in self.lr_lambdas]
        return super().state_dict() | {"lr_lambdas": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`LRScheduler.load_state_dict`; saved attributes go into the present callable objects."""
        saved = state_dict["lr_lambdas"]
        self._extend(len(saved))
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "lr_lambdas"})
        for function, attributes in zip(self.lr_lambdas, saved, strict=True):
            if attributes is not None:
                vars(function).update(attributes)

    def get_lr(self) -> list[Rate]:
        """Initial rates times factors."""
        self._warn_outside_step()
        self._extend(len(self.base_lrs))
        return [base * factor(self.last_epoch) for factor, base in zip(self.lr_lambdas, self.base_lrs, strict=True)]

    def _extend(self, groups: int) -> None:
        """A group that was added later follows the function, if there is one for all groups."""
        if len(self.lr_lambdas) < groups:
            if any(function is not self.lr_lambdas[0] for function in self.lr_lambdas):
                raise ValueError(
                    f"Expected {groups} lr_lambdas, but got {len(self.lr_lambdas)}: a group was added to the "
                    "optimizer; append its function to scheduler.lr_lambdas"
                )
            self.lr_lambdas += [self.lr_lambdas[0]] * (groups - len(self.lr_lambdas))


class StepLR(LRScheduler):
    """Multiplies the learning rate by ``gamma`` every ``step_size`` epochs.

    Args:
      optimizer: the optimizer whose groups are written.
      step_size: epochs between two cuts.
      gamma: factor of each cut.
      last_epoch: index of the last epoch done; -1 starts.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    >>> for epoch in range(4):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1):
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Rate]:
        """The present rates, cut where it is time."""
        self._warn_outside_step()
        if self.last_epoch == 0 or self.last_epoch % self.step_size != 0:
            return self._rates()
        return [rate * self.gamma for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [base * self.gamma ** (self.last_epoch // self.step_size) for base in self.base_lrs]


class MultiStepLR(LRScheduler):
    """Multiplies the learning rate by ``gamma`` at each milestone.

    Args:
      optimizer: the optimizer whose groups are written.
      milestones: epochs; one that is named twice cuts twice.
      gamma: factor of each cut.
      last_epoch: index of the last epoch done; -1 starts.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    >>> for epoch in range(4):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    def __init__(self, optimizer: Optimizer, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1):
        self.milestones = Counter(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`LRScheduler.load_state_dict`; JSON has turned the milestones into strings."""
        milestones = Counter({int(epoch): count for epoch, count in state_dict["milestones"].items()})
        super().load_state_dict(state_dict | {"milestones": milestones})

    def get_lr(self) -> list[Rate]:
        """The present rates, cut at a milestone."""
        self._warn_outside_step()
        if self.last_epoch not in self.milestones:
            return self._rates()
        return [rate * self.gamma ** self.milestones[self.last_epoch] for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        passed = bisect_right(sorted(self.milestones.elements()), self.last_epoch)
        return [base * self.gamma**passed for base in self.base_lrs]


class ExponentialLR(LRScheduler):
    """Multiplies the learning rate by ``gamma`` every epoch.

    Args:
      optimizer: the optimizer whose groups are written.
      gamma: factor of each epoch.
      last_epoch: index of the last epoch done; -1 starts.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.125]
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1):
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Rate]:
        """The present rates times gamma."""
        self._warn_outside_step()
        if self._is_initial:
            return self._rates()
        return [rate * self.gamma for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [base * self.gamma**self.last_epoch for base in self.base_lrs]


class CosineAnnealingLR(LRScheduler):
    r"""Half a cosine from the initial learning rate down to ``eta_min`` in ``T_max`` epochs, and up again after.

    .. math:: \eta_t = \eta_\min + (\eta_0 - \eta_\min) (1 + \cos(\pi t / T_\max)) / 2

    computed by PyTorch's recursion, so that other schedulers and hand edits of the rate carry on.

    Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017 (arXiv:1608.03983).

    Args:
      optimizer: the optimizer whose groups are written.
      T_max: epochs from the largest to the smallest rate.
      eta_min: the smallest rate, absolute.
      last_epoch: index of the last epoch done; -1 starts.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    >>> for epoch in range(2):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> [round(rate, 6) for rate in scheduler.get_last_lr()]
    [0.5]
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1):  # noqa: N803
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Rate]:
        """The next rates from the present ones."""
        self._warn_outside_step()
        epoch, half = self.last_epoch, self.T_max
        if self._is_initial:
            return self._rates()
        if self._step_count == 1 and epoch > 0:
            return self._get_closed_form_lr()
        if (epoch - 1 - half) % (2 * half) == 0:  # the present rate is eta_min, from which the ratio would not rise
            return [
                rate + (base - self.eta_min) * (1 - math.cos(math.pi / half)) / 2
                for rate, base in zip(self._rates(), self.base_lrs, strict=True)
            ]
        ratio = (1 + math.cos(math.pi * epoch / half)) / (1 + math.cos(math.pi * (epoch - 1) / half))
        return [ratio * (rate - self.eta_min) + self.eta_min for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [
            self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * self.last_epoch / self.T_max)) / 2
            for base in self.base_lrs
        ]
