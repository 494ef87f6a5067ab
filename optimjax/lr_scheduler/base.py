"""What all schedulers share: taking steps, writing groups, resuming."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from optimjax.optimizer import Optimizer

__all__ = [
    "LRScheduler",
    "Rate",
    "Snapshot",
    "building",
    "extended",
    "nested",
    "per_group",
    "unless_it_fails",
    "warn_of_epoch",
    "write",
]

Rate = Any  # a float, or a scalar array where the group has one


class LRScheduler:
    """Base class of the schedulers, as ``torch.optim.lr_scheduler.LRScheduler``.

    A subclass implements :meth:`get_lr`. Building a scheduler takes its first step, which sets the learning rates of
    epoch 0; call :meth:`step` after each epoch (or batch), after ``optimizer.step()``.

    Args:
      optimizer: the optimizer whose groups are written.
      last_epoch: index of the last epoch done; -1 starts. Otherwise every group must have its ``initial_lr``.
      key: which number of the groups is scheduled; ``"lr"`` unless another one is meant (``"weight_decay"``). What is
        said of learning rates holds for it.

    Raises:
      TypeError: not an optimizer, or a key that is no number.
      KeyError: resuming with ``last_epoch`` where a group has no ``initial_lr``.
    """

    # As in PyTorch's state dicts.
    _get_lr_called_within_step: bool = False
    _is_initial: bool = False

    key: str = "lr"
    takes_metric: bool = False  # whether `step` is given one

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, *, key: str = "lr"):
        with building(optimizer):
            self._schedule(optimizer, key)
            if last_epoch != -1:
                for index, group in enumerate(optimizer.param_groups):
                    if self._initial not in group:
                        raise KeyError(
                            f"param {self._initial!r} is not specified in param_groups[{index}] when resuming "
                            "scheduler with last_epoch >= 0: load the optimizer's state first, or start with "
                            "last_epoch=-1"
                        )
            self.last_epoch = last_epoch
            self.base_lrs: list[Rate] = []
            if not optimizer._scheduled:  # steps before the first scheduler do not count for the warning of `step`
                optimizer._scheduled, optimizer._step_called = True, False
            self._initial_step()

    def _schedule(self, optimizer: Optimizer, key: str) -> None:
        self.optimizer = optimizer
        for index, group in enumerate(optimizer.param_groups):
            if key not in optimizer.hyperparameters.numeric or isinstance(group[key], (tuple, list)):
                raise TypeError(f"key must name a number of the groups, got {key!r} in param_groups[{index}]")
        if key != self.key:  # else the state dict is PyTorch's
            self.key = key

    @property
    def _initial(self) -> str:
        """Where PyTorch keeps the base rate in a group."""
        return f"initial_{self.key}"

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        self.step()
        self._is_initial = False

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as plain Python values where the learning rates are."""
        return {name: _copied(value) for name, value in vars(self).items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Values of the groups that building a scheduler has overwritten, and nobody has touched since, become those that
        the optimizer had loaded before, or, if it has loaded nothing, the rates of the saved run.
        """
        vars(self).update({name: _copied(value) for name, value in state_dict.items()})
        loaded = self.optimizer._loaded or [{self.key: rate} for rate in self._last_lr]
        for group, built, saved in zip(self.optimizer.param_groups, self.optimizer._built, loaded, strict=False):
            for name, value in built.items():
                if name in saved and (group.get(name) is value or group.get(name) == value):
                    built[name] = group[name] = saved[name]

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
            warn_of_epoch()
        with unless_it_fails(self):
            self._step_count += 1
            self._advance(epoch)

    def _advance(self, epoch: int | None = None) -> None:
        """Count, and write the rates: the next ones, or those of an epoch by the closed form where there is one."""
        self._adopt_groups()
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._get_lr_called_within_step = True
        closed_form = getattr(self, "_get_closed_form_lr", None)
        rates = self.get_lr() if epoch is None or closed_form is None else closed_form()
        self._get_lr_called_within_step = False
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            write(group, self.key, rate)
        self._last_lr = self._rates()

    def _restart(self) -> None:
        """Begin at epoch 0, when it is this scheduler's turn in a sequence."""
        self._advance(0)

    def _adopt_groups(self) -> None:
        """Groups that have come since the last step are scheduled from the rate that they have."""
        new = self.optimizer.param_groups[len(self.base_lrs) :]
        self.base_lrs = [*self.base_lrs, *(group.setdefault(self._initial, group[self.key]) for group in new)]

    def _rates(self) -> list[Rate]:
        return [group[self.key] for group in self.optimizer.param_groups]

    def _warn_outside_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use `get_last_lr()`.",
                UserWarning,
                stacklevel=3,
            )


def warn_of_epoch() -> None:
    """PyTorch's deprecation of ``step(epoch)``."""
    warnings.warn(
        "The epoch parameter in `scheduler.step()` is deprecated. Please use `scheduler.step()` to step the "
        "scheduler. If epoch is given, the closed form is used instead of the chainable one, where available.",
        UserWarning,
        stacklevel=3,
    )


def write(group: dict[str, Any], name: str, value: Any) -> None:
    """Set a value of a group; where it has an array there, of that dtype."""
    old = group.get(name)
    group[name] = jnp.asarray(value, old.dtype) if isinstance(old, jax.Array) else value


def per_group(name: str, given: Any, optimizer: Optimizer) -> list[Any]:
    """One value for each group, from one for all or a list.

    Raises:
      ValueError: a list whose length is not the number of groups.
    """
    if not isinstance(given, (list, tuple)):
        return [given] * len(optimizer.param_groups)
    if len(given) != len(optimizer.param_groups):
        raise ValueError(
            f"{name} must have the same length as optimizer.param_groups. "
            f"{name} has {len(given)} values, param_groups has {len(optimizer.param_groups)}."
        )
    return list(given)


def extended(name: str, values: list[Any], groups: int) -> list[Any]:
    """The values of all groups after some were added: they follow the others, where all have the same.

    Raises:
      ValueError: the groups have different values.
    """
    if len(values) < groups and any(value is not values[0] for value in values):
        raise ValueError(
            f"Expected {groups} {name}, but got {len(values)}: a group was added to the optimizer; append its value to "
            f"scheduler.{name}"
        )
    return values + values[:1] * (groups - len(values))


# --- Nothing half-changed -------------------------------------------------------------------------------------------


class Snapshot:
    """A scheduler, those inside it, and the groups it writes, to be restored."""

    def __init__(self, scheduler: Any):
        self._optimizer = scheduler.optimizer
        self._step_called = self._optimizer._step_called
        self._kept = [(vars(each), dict(vars(each))) for each in nested(scheduler)]
        self._kept += [(group, dict(group)) for group in self._optimizer.param_groups]

    def restore(self) -> None:
        """Put everything back."""
        self._optimizer._step_called = self._step_called
        for present, kept in self._kept:
            present.clear()
            present.update(kept)


def nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those inside it."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from nested(inner)


@contextmanager
def unless_it_fails(scheduler: Any) -> Iterator[None]:
    """An error leaves schedulers and groups as they were."""
    before = Snapshot(scheduler)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def building(optimizer: Any) -> Iterator[None]:
    """While a scheduler is built: the optimizer learns what is overwritten; an error leaves the groups as they were.

    Raises:
      TypeError: not an optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    before = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    except BaseException:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(old)
        raise
    optimizer._built += [{} for _ in before[len(optimizer._built) :]]
    for group, old, built in zip(optimizer.param_groups, before, optimizer._built, strict=True):
        built.update((name, value) for name, value in group.items() if name not in old or old[name] is not value)


def _copied(value: Any) -> Any:
    """A state dict and a scheduler must not share what either may change."""
    return copy.copy(value) if isinstance(value, (list, dict)) else value
