"""Schedulers that follow a cosine."""

import math

from optimjax import schedules
from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.base import LRScheduler, Rate, check_number, unless_it_fails

__all__ = ["CosineAnnealingLR", "CosineAnnealingWarmRestarts"]


class CosineAnnealingLR(LRScheduler):
    r"""Half a cosine from the initial learning rate down to ``eta_min`` in ``T_max`` epochs, and up again after.

    .. math:: \eta_t = \eta_\min + (\eta_0 - \eta_\min) (1 + \cos(\pi t / T_\max)) / 2

    computed by PyTorch's recursion, so that other schedulers and hand edits of the rate carry on.

    A group that is added on the way down comes to ``eta_min`` with the others, one that is added at the bottom begins
    there; from then on it goes between ``eta_min`` and its own rate. On the way up its rate grows by the same factors
    as theirs, in PyTorch, too, and far above what it was: add it with the ``lr`` and ``initial_lr`` of another one.

    Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017 (arXiv:1608.03983).

    Args:
      optimizer: the optimizer whose groups are written.
      T_max: epochs from the largest to the smallest rate, above 0.
      eta_min: the smallest rate, absolute.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: ``T_max`` is not positive.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    >>> for epoch in range(2):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> [round(rate, 6) for rate in scheduler.get_last_lr()]
    [0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: float,  # noqa: N803
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        check_number("T_max", self.T_max, 0, open_=True)

    def get_lr(self) -> list[Rate]:
        """The next rates from the present ones."""
        self._warn_outside_step()
        epoch, half = self.last_epoch, self.T_max
        if self._is_initial:
            return self._rates()
        if self._step_count == 1 and epoch > 0:
            return self._get_closed_form_lr()
        if (epoch - 1 - half) % (2 * half) == 0:  # the present rate is eta_min, from which the ratio would not rise
            rates = self._rates()
            known = len(self._last_lr)
            bottom = rates[:known] + [self.eta_min] * len(rates[known:])  # groups that are new have not come down to it
            return [
                rate + (base - self.eta_min) * (1 - math.cos(math.pi / half)) / 2
                for rate, base in zip(bottom, self.base_lrs, strict=True)
            ]
        ratio = (1 + math.cos(math.pi * epoch / half)) / (1 + math.cos(math.pi * (epoch - 1) / half))
        return [ratio * (rate - self.eta_min) + self.eta_min for rate in self._rates()]

    def _get_closed_form_lr(self) -> list[Rate]:
        return [schedules.cosine_annealing(base, self.T_max, self.eta_min)(self.last_epoch) for base in self.base_lrs]


class CosineAnnealingWarmRestarts(LRScheduler):
    r"""Half cosines down to ``eta_min``, each beginning at the initial rate; each ``T_mult`` times as long as the last.

    .. math:: \eta_t = \eta_\min + (\eta_0 - \eta_\min) (1 + \cos(\pi T_{cur} / T_i)) / 2

    Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017 (arXiv:1608.03983).

    Args:
      optimizer: the optimizer whose groups are written.
      T_0: epochs of the first cycle.
      T_mult: how many times longer each next cycle is, at least 1.
      eta_min: the smallest rate, absolute.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: ``T_0`` or ``T_mult`` is not an integer or too small, ``eta_min`` is not a number.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2, T_mult=2)
    >>> rates = [scheduler.get_last_lr()[0]]
    >>> for epoch in range(4):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    ...     rates.append(round(scheduler.get_last_lr()[0], 3))
    >>> rates
    [1.0, 0.5, 1.0, 0.854, 0.5]
    """

    _state = ("T_i", "T_cur")

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,  # noqa: N803
        T_mult: int = 1,  # noqa: N803
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        self.T_0 = T_0
        self.T_i = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        if not isinstance(self.eta_min, (float, int)):
            raise ValueError(f"Expected float or int eta_min, but got {self.eta_min} of type {type(self.eta_min)}")
        schedules.cosine_annealing_warm_restarts(1.0, self.T_0, self.T_mult)
        check_number("T_i", self.T_i, 0, open_=True)

    def get_lr(self) -> list[Rate]:
        """The rates at this place of the cycle."""
        self._warn_outside_step()
        return [schedules.cosine_annealing(base, self.T_i, self.eta_min)(self.T_cur) for base in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Set the learning rates of the next epoch.

        Args:
          epoch: jump to this epoch instead; a fraction is a place within an epoch.

        Raises:
          ValueError: a negative epoch.
        """
        with unless_it_fails(self):
            if epoch is None and self.last_epoch < 0:
                epoch = 0
            if epoch is None:
                epoch = self.last_epoch + 1
                self.T_cur = self.T_cur + 1
                if self.T_cur >= self.T_i:
                    self.T_cur = self.T_cur % self.T_i
                    self.T_i = self.T_i * self.T_mult
            else:
                self._jump(epoch)
            self._advance(math.floor(epoch))

    def _jump(self, epoch: float) -> None:
        if epoch < 0:
            raise ValueError(f"Expected non-negative epoch, but got {epoch}")
        if epoch < self.T_0:
            self.T_i = self.T_0
            self.T_cur = epoch
        elif self.T_mult == 1:
            self.T_cur = epoch % self.T_0
        else:
            cycle = int(math.log(epoch / self.T_0 * (self.T_mult - 1) + 1, self.T_mult))
            self.T_cur = epoch - self.T_0 * (self.T_mult**cycle - 1) / (self.T_mult - 1)
            self.T_i = self.T_0 * self.T_mult**cycle

    def _restart(self) -> None:
        self._jump(0)
        super()._restart()
