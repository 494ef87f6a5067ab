"""What all schedulers share: taking steps, writing groups, resuming."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optimjax import schedules
from optimjax._core.containers import copied, plain
from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.entries import by_group, checked, is_number, like, shown

__all__ = [
    "LRScheduler",
    "Rate",
    "Snapshot",
    "attributes_of",
    "building",
    "check_number",
    "extended",
    "nested",
    "per_group",
    "times",
    "unless_it_fails",
    "warn_of_epoch",
    "without_warnings",
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
        said of learning rates holds for it; ``initial_weight_decay`` then is what ``initial_lr`` is for the rate.

    Raises:
      TypeError: not an optimizer, or a key that is not a number in its groups.
      KeyError: resuming with ``last_epoch`` where a group has no ``initial_lr``.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> class InverseSquareRoot(optim.lr_scheduler.LRScheduler):
    ...     def get_lr(self):
    ...         return [base / (1 + self.last_epoch) ** 0.5 for base in self.base_lrs]
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = InverseSquareRoot(optimizer)
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.5]
    """

    # As in PyTorch's state dicts.
    _get_lr_called_within_step: bool = False
    _is_initial: bool = False

    key: str = "lr"
    takes_metric: bool = False  # whether `step` is given one

    # Names of attributes besides those of the constructor's arguments; each class lists those that it adds.
    _state: ClassVar[tuple[str, ...]] = ("base_lrs", "last_epoch", "_last_lr", "_step_count")  # always in a state dict
    _optional_state: ClassVar[tuple[str, ...]] = ("key", "_get_lr_called_within_step", "_is_initial")
    _by_group: ClassVar[frozenset[str]] = frozenset({"base_lrs", "_last_lr"})  # lists with a value for each group

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, *, key: str = "lr"):
        with building(optimizer):
            self._check_arguments()
            self._schedule(optimizer, key)
            if last_epoch != -1:
                for index, group in enumerate(optimizer.param_groups):
                    if self._initial not in group:
                        raise KeyError(
                            f"param {self._initial!r} is not specified in param_groups[{index}] when resuming "
                            "scheduler with last_epoch >= 0: load the optimizer's state first, or start with "
                            "last_epoch=-1"
                        )
            self.base_lrs: list[Rate] = []
            self._adopt_groups()
            self.last_epoch = last_epoch
            if not optimizer._record.attached:  # steps before the first scheduler do not count for `step`'s warning
                optimizer._record = replace(optimizer._record, attached=True, stepped=False)
            self._initial_step()

    def _check_arguments(self) -> None:
        """Raise for an argument out of range, given to the constructor or loaded."""

    def _arguments_elsewhere(self) -> dict[str, Any]:
        """For showing: arguments that are not attributes of their name."""
        return {}

    def _schedule(self, optimizer: Optimizer, key: str) -> None:
        self.optimizer = optimizer
        hyperparameters = optimizer.definition.hyperparameters
        structural = hyperparameters.kinds.keys() - set(hyperparameters.numeric)
        for index, group in enumerate(optimizer.param_groups):
            if key in structural or not is_number(group.get(key)):
                raise TypeError(
                    f"key must name a number of the groups, got {key!r}, which is {group.get(key)!r} in "
                    f"param_groups[{index}]"
                )
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
        return copied({name: value for name, value in vars(self).items() if name != "optimizer"})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, of this library or of PyTorch.

        It undoes what building did to the groups, so that those that the optimizer had loaded before are there again;
        if it has loaded nothing, the rates become those of the saved run. What was edited since building stays.

        Raises:
          ValueError: it is not a dict, it lacks an entry or has one that this scheduler does not keep, or a value of
            another kind, length or range, or it is of another ``key``; the message names the entry. Nothing has changed
            then. Attributes that a subclass has added may be missing, new, and of any kind.
        """
        with unless_it_fails(self):
            self._load(checked(self, state_dict))
            self._check_arguments()

    def _entry(self, name: str, value: Any) -> Any:
        """The value of an entry of a state dict, as a plain one of the kind that is there now; or ``ValueError``."""
        present = vars(self).get(name)
        if name in self._by_group and isinstance(present, list):
            return by_group(present, plain(value), name, len(self.optimizer.param_groups))
        return like(present, plain(value), name)

    def _load(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
        optimizer = self.optimizer
        record = optimizer._record
        noted = [dict(built) for built in record.built]
        for group, built, rate in zip(optimizer.param_groups, noted, self._last_lr, strict=False):
            for name, (before, after) in built.items():
                if group.get(name) is after:
                    value = before if record.loaded else rate if name == self.key else after
                    write(group, name, value)
                    built[name] = value, group[name]
        optimizer._record = replace(record, built=noted)

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
        if self._step_count == 1 and not self.optimizer._record.stepped:
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
        """Begin at epoch 0 from the base rates, when it is this scheduler's turn in a sequence."""
        self._advance(0)

    def _reset_rates(self) -> None:
        for group in self.optimizer.param_groups:
            write(group, self.key, group.setdefault(self._initial, group[self.key]))

    def _begin(self) -> None:
        """Begin at epoch 0 from the present rates, as when it was built."""
        self.last_epoch = -1
        self._initial_step()

    def _adopt_groups(self) -> None:
        """Groups that have come since the last step are scheduled from the rate that they have."""
        new = self.optimizer.param_groups[len(self.base_lrs) :]
        self.base_lrs = [*self.base_lrs, *(group.setdefault(self._initial, group[self.key]) for group in new)]

    def _rates(self) -> list[Rate]:
        return [group[self.key] for group in self.optimizer.param_groups]

    def __repr__(self) -> str:
        return shown(self)

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
    """Set a value of a group; where it has an array there, as an array of that dtype and shape."""
    old = group.get(name)
    group[name] = jnp.full_like(old, value) if isinstance(old, jax.Array) else value


def times(rate: Rate, factor: Any) -> Rate:
    """A rate times what a function of the user's returned; a rate in an array keeps its dtype."""
    if isinstance(rate, jax.Array) and hasattr(factor, "dtype"):
        factor = jnp.asarray(factor, rate.dtype)
    return rate * factor


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
    """The values of all groups after some were added: these follow the others, where all have the same.

    Raises:
      ValueError: the others differ. The message calls the values ``name``.
    """
    if len(values) < groups and any(value != values[0] for value in values):
        raise ValueError(
            f"Expected {groups} {name}, but got {len(values)}: a group was added to the optimizer, and the others "
            "differ; add its own"
        )
    return values + values[:1] * (groups - len(values))


# --- Nothing half-changed -------------------------------------------------------------------------------------------


class Snapshot:
    """All that building, stepping and loading schedulers changes, to be restored.

    Args:
      optimizer: whose groups are written, and which notes what schedulers do to them.
      schedulers: those that change, with the objects that they call.
    """

    def __init__(self, optimizer: Optimizer, schedulers: Iterable["LRScheduler"] = ()):
        changing = [*optimizer.param_groups]
        for scheduler in schedulers:
            changing += [vars(scheduler), *(vars(function) for function in _functions(scheduler))]
        self._kept = [(present, dict(present)) for present in changing]
        self._optimizer = optimizer
        self._record = optimizer._record

    def restore(self) -> None:
        """Put everything back."""
        for present, kept in self._kept:
            present.clear()
            present.update(kept)
        self._optimizer._record = self._record


def _functions(scheduler: "LRScheduler") -> Iterator[Any]:
    """The functions that a scheduler calls and that have attributes, which loading replaces."""
    present = vars(scheduler)
    functions = present.get("lr_lambdas", ()), (present.get("_scale_fn_custom"),)
    return (each for several in functions for each in several if hasattr(each, "__dict__"))


def nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those inside it."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from nested(inner)


@contextmanager
def unless_it_fails(scheduler: Any) -> Iterator[None]:
    """An error leaves schedulers, groups and what the optimizer has noted as they were."""
    before = Snapshot(scheduler.optimizer, nested(scheduler))
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def without_warnings() -> Iterator[None]:
    """Steps without ``optimizer.step()`` before them, which are not those of a training loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def building(optimizer: Any, schedulers: Iterable["LRScheduler"] = ()) -> Iterator[None]:
    """While a scheduler is built, of these others: the optimizer notes what is overwritten; an error changes nothing.

    Raises:
      TypeError: not an optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    snapshot = Snapshot(optimizer, schedulers)
    before = [dict(group) for group in optimizer.param_groups]
    noted = [dict(built) for built in optimizer._record.built]
    earlier = noted + [{} for _ in before[len(noted) :]]
    try:
        yield
        for group, old, built in zip(optimizer.param_groups, before, earlier, strict=True):
            for name, value in old.items():
                # Of schedulers built one after the other, the first has found what was there before.
                first, last = built.get(name, (None, None))
                built[name] = first if last is value else value, group[name]
        optimizer._record = replace(optimizer._record, built=earlier)
    except BaseException:
        snapshot.restore()
        raise


def check_number(name: str, value: Any, least: float, *, open_: bool = False) -> None:
    """Raise unless an argument is a number of at least ``least``, or above it.

    Raises:
      TypeError: it is not a number.
      ValueError: it is too small.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (value > least if open_ else value >= least):
        raise ValueError(f"{name} must be {'above' if open_ else 'at least'} {least}, got {value}")


def attributes_of(function: Any) -> dict[str, Any] | None:
    """What is saved of a callable: the attributes of an object, nothing of a function, jitted or not, or a schedule."""
    is_function = hasattr(function, "__qualname__") or type(function).__module__ == schedules.__name__
    return None if function is None or is_function else dict(vars(function))
