"""The scheduler that looks at a metric."""

from typing import Literal, SupportsFloat

from optimjax._core import formulas
from optimjax._core.definition import as_number
from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.base import LRScheduler, building, unless_it_fails, warn_of_epoch, write

__all__ = ["ReduceLROnPlateau"]


class ReduceLROnPlateau(LRScheduler):
    """Cuts the learning rate when a metric has not improved for more than ``patience`` epochs.

    Args:
      optimizer: the optimizer whose groups are written.
      mode: whether the metric shall become small (``"min"``) or large (``"max"``).
      factor: of each cut, below 1.
      patience: epochs without an improvement that are let pass.
      threshold: what counts as an improvement.
      threshold_mode: whether ``threshold`` is a share of the best metric (``"rel"``) or a difference (``"abs"``).
      cooldown: epochs after a cut in which nothing is counted.
      min_lr: no rate is cut below this, one or a list with one for each group.
      eps: a cut by less than this is left out.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: the factor is not below 1, an unknown mode, or a list of another length than the groups.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step(loss)
    >>> scheduler.get_last_lr()
    [0.5]
    """

    takes_metric = True
    _state = ("best", "num_bad_epochs", "cooldown_counter", "mode_worse", "min_lrs")
    _optional_state = ("default_min_lr",)
    _by_group = LRScheduler._by_group | {"min_lrs"}

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = 1e-8,
        *,
        key: str = "lr",
    ):
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.eps = eps
        self._check_arguments()
        with building(optimizer):
            self._schedule(optimizer, key)
        groups = len(optimizer.param_groups)
        if isinstance(min_lr, (list, tuple)):
            if len(min_lr) != groups:
                raise ValueError(f"expected {groups} min_lrs, got {len(min_lr)}")
            self.default_min_lr = None
            self.min_lrs = list(min_lr)
        else:
            self.default_min_lr = min_lr
            self.min_lrs = [min_lr] * groups
        self.last_epoch = 0
        self.mode_worse = formulas.worst(mode)
        self._last_lr = self._rates()
        self._reset()

    def _check_arguments(self) -> None:
        if self.factor >= 1.0:
            raise ValueError(f"Factor should be < 1.0, got {self.factor}")
        formulas.improvement(self.mode, self.threshold, self.threshold_mode)

    def _reset(self) -> None:
        self.best = self.mode_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0

    @property
    def in_cooldown(self) -> bool:
        """Whether a cut was so recent that nothing is counted."""
        return self.cooldown_counter > 0

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look at the metric of an epoch.

        Args:
          metrics: a number.
          epoch: its index. Deprecated, as in PyTorch.

        Raises:
          TypeError: no metric; a sequence or a chain hands on its own.
          RuntimeError: a group was added, and ``min_lr`` was a list.
        """
        if metrics is None:
            raise TypeError("ReduceLROnPlateau needs the metric of the epoch: scheduler.step(loss)")
        if epoch is not None:
            warn_of_epoch()
        with unless_it_fails(self):
            self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
            better = formulas.improvement(self.mode, self.threshold, self.threshold_mode)
            counted = self.best, self.num_bad_epochs, self.cooldown_counter
            cut, *counted = formulas.watch(float(metrics), *counted, better, self.patience, self.cooldown)
            self.best, self.num_bad_epochs, self.cooldown_counter = counted
            if cut:
                self._cut()
            self._last_lr = self._rates()

    def _cut(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.min_lrs):
            if self.default_min_lr is None:
                raise RuntimeError(
                    f"The number of param groups in the `optimizer` ({len(groups)}) differs from when "
                    f"`ReduceLROnPlateau` was initialized ({len(self.min_lrs)}), usually due to a new param group "
                    "being added to the optimizer. Please modify the `min_lrs` field to match the length of the "
                    "`optimizer` param groups."
                )
            self.min_lrs = [self.default_min_lr] * len(groups)
        for group, lowest in zip(groups, self.min_lrs, strict=True):
            write(group, self.key, formulas.reduced(as_number(group[self.key]), self.factor, lowest, self.eps))

    def _initial_step(self) -> None:
        self.last_epoch = 0
        self._last_lr = self._rates()
        self._reset()

    def _restart(self) -> None:
        self._reset_rates()
        self._begin()
