"""Schedulers that go up and down, and cycle the momentum the other way."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

from optimjax._core import formulas
from optimjax._core.containers import plain
from optimjax._facade.optimizer import Optimizer
from optimjax.lr_scheduler.base import (
    LRScheduler,
    Rate,
    attributes_of,
    building,
    check_number,
    extended,
    per_group,
    write,
)
from optimjax.lr_scheduler.entries import entry_error

__all__ = ["CyclicLR", "OneCycleLR"]

PerGroup = float | list[float]
PHASE = {"end_step", "start_lr", "end_lr", "start_momentum", "end_momentum"}  # what a phase of OneCycleLR has


def _uses_beta1(optimizer: Optimizer, key: str) -> bool:
    """Whether it is the first of ``betas`` that is cycled, not ``momentum``."""
    if key == "momentum":
        raise ValueError("key='momentum' needs cycle_momentum=False: both schedule the momentum")
    if not any("momentum" in group or "betas" in group for group in optimizer.param_groups):
        raise ValueError("optimizer must support momentum or beta1 with `cycle_momentum` option enabled")
    return "betas" in optimizer.defaults


def _write_momentum(group: dict[str, Any], value: Any) -> None:
    """Write what a group has of the two; one whose algorithm has neither stays as it is."""
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    elif "momentum" in group:
        write(group, "momentum", value)


class CyclicLR(LRScheduler):
    """Straight from ``base_lr`` up to ``max_lr`` and down again, over and over; call :meth:`step` after each batch.

    Smith, "Cyclical learning rates for training neural networks", WACV 2017 (arXiv:1506.01186).

    Args:
      optimizer: the optimizer whose groups are written.
      base_lr: the lowest rate, one or a list with one for each group.
      max_lr: the highest rate of the first cycle, one or a list.
      step_size_up: batches of the way up, above 0.
      step_size_down: batches of the way down, at least 0; as many unless given.
      mode: ``"triangular"``: all cycles are equal; ``"triangular2"``: each is half as high as the last;
        ``"exp_range"``: the height is multiplied by ``gamma`` every batch.
      gamma: see ``mode``.
      scale_fn: in place of ``mode``: the height, by the number of the cycle (from 1) or of the batch.
      scale_mode: ``"cycle"`` or ``"iterations"``: what ``scale_fn`` is called with.
      cycle_momentum: whether ``momentum``, or the first of ``betas``, goes down as the rate goes up.
      base_momentum: its lowest value, one or a list.
      max_momentum: its highest value, one or a list.
      last_epoch: index of the last batch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: an unknown mode, a number of batches out of range, a list of another length than the groups, no
        momentum to cycle, or one that ``key`` names already.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=0.1, momentum=0.9)
    >>> scheduler = optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.5, step_size_up=2)
    >>> for batch in range(2):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr(), optimizer.param_groups[0]["momentum"]
    ([0.5], 0.8)
    """

    _state = ("total_size", "step_ratio", "scale_mode", "max_lrs", "_scale_fn_custom")
    _optional_state = ("use_beta1", "base_momentums", "max_momentums")
    _by_group = LRScheduler._by_group | {"max_lrs", "base_momentums", "max_momentums"}

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: PerGroup,
        max_lr: PerGroup,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Literal["cycle", "iterations"] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: PerGroup = 0.8,
        max_momentum: PerGroup = 0.9,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        with building(optimizer):
            self._schedule(optimizer, key)
            base_lrs = per_group("base_lr", base_lr, optimizer)
            if last_epoch == -1:
                for group, rate in zip(optimizer.param_groups, base_lrs, strict=True):
                    write(group, key, rate)
            self.max_lrs = per_group("max_lr", max_lr, optimizer)
            check_number("step_size_up", step_size_up, 0, open_=True)
            up = float(step_size_up)
            if step_size_down is not None:
                check_number("step_size_down", step_size_down, 0)
            self.total_size = up + (float(step_size_down) if step_size_down is not None else up)
            self.step_ratio = up / self.total_size
            self.mode = mode
            self.gamma = gamma
            self._scale_fn_custom = scale_fn
            _, self.scale_mode = formulas.cyclic_scale(mode, gamma, scale_fn, scale_mode)
            self.cycle_momentum = cycle_momentum
            if cycle_momentum:
                self.use_beta1 = _uses_beta1(optimizer, key)
                self.base_momentums = per_group("base_momentum", base_momentum, optimizer)
                self.max_momentums = per_group("max_momentum", max_momentum, optimizer)
                if last_epoch == -1:
                    for index, group in enumerate(optimizer.param_groups):
                        _write_momentum(group, self.max_momentums[index])
                        group["max_momentum"] = self.max_momentums[index]
                        group["base_momentum"] = self.base_momentums[index]
            super().__init__(optimizer, last_epoch, key=key)
            self.base_lrs = base_lrs

    def _check_arguments(self) -> None:
        formulas.cyclic_scale(self.mode, self.gamma, self._scale_fn_custom, self.scale_mode)
        check_number("total_size", self.total_size, 0, open_=True)
        check_number("step_ratio", self.step_ratio, 0, open_=True)

    def _arguments_elsewhere(self) -> dict[str, Any]:
        up = self.total_size * self.step_ratio
        scale = {} if self._scale_fn_custom is None else {"scale_fn": self._scale_fn_custom}
        return {"step_size_up": up, "step_size_down": self.total_size - up, **scale}

    def get_lr(self) -> list[Rate]:
        """The rates at this place of the cycle; writes the momentum."""
        self._warn_outside_step()
        if self.cycle_momentum:
            pairs = zip(self.max_momentums, self.base_momentums, strict=True)
            for group, (high, low) in zip(self.optimizer.param_groups, pairs, strict=True):
                _write_momentum(group, self._between(high, low))
        return [self._between(low, high) for low, high in zip(self.base_lrs, self.max_lrs, strict=True)]

    def _between(self, value: Rate, peak: Rate) -> Rate:
        return formulas.triangle(
            value, peak, self.last_epoch, self.total_size, self.step_ratio, self.scale_fn, self.scale_mode
        )

    def scale_fn(self, x: float) -> float:
        """How high a cycle is: by its number (from 1), or by that of the batch, as ``scale_mode`` says."""
        scale, _ = formulas.cyclic_scale(self.mode, self.gamma, self._scale_fn_custom, self.scale_mode)
        return scale(x)

    def _adopt_groups(self) -> None:
        super()._adopt_groups()
        groups = len(self.base_lrs)
        self.max_lrs = extended("scheduler.max_lrs", self.max_lrs, groups)
        if self.cycle_momentum:
            self.max_momentums = extended("scheduler.max_momentums", self.max_momentums, groups)
            self.base_momentums = extended("scheduler.base_momentums", self.base_momentums, groups)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`LRScheduler.state_dict`; of ``scale_fn`` only a callable object is saved, by its attributes.

        Loading puts these into the present object.
        """
        return super().state_dict() | {"_scale_fn_custom": attributes_of(self._scale_fn_custom)}

    def _entry(self, name: str, value: Any) -> Any:
        if name != "_scale_fn_custom":
            return super()._entry(name, value)
        if value is None or (isinstance(value, Mapping) and hasattr(self._scale_fn_custom, "__dict__")):
            return plain(value)
        raise entry_error(name, value, f"the attributes of {self._scale_fn_custom!r}")

    def _load(self, state_dict: dict[str, Any]) -> None:
        super()._load({name: value for name, value in state_dict.items() if name != "_scale_fn_custom"})
        if attributes := state_dict["_scale_fn_custom"]:
            vars(self._scale_fn_custom).update(attributes)


class OneCycleLR(LRScheduler):
    """Once up to ``max_lr`` and down to a small fraction of it; call :meth:`step` after each batch.

    Smith, Topin, "Super-convergence: very fast training of neural networks using large learning rates", 2018
    (arXiv:1708.07120).

    Args:
      optimizer: the optimizer whose groups are written.
      max_lr: the highest rate, one or a list with one for each group.
      total_steps: length of the cycle in batches; or
      epochs, steps_per_epoch: whose product it is.
      pct_start: share of the cycle that goes up.
      anneal_strategy: ``"cos"`` or ``"linear"``.
      cycle_momentum: whether ``momentum``, or the first of ``betas``, goes down as the rate goes up.
      base_momentum: its lowest value, one or a list.
      max_momentum: its highest value, one or a list.
      div_factor: the first rate is ``max_lr / div_factor``; above 0.
      final_div_factor: the last one is the first divided by this; above 0.
      three_phase: whether the rate comes back to the first one, symmetrically, before the last phase.
      last_epoch: index of the last batch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: no number of steps, a value out of range, no momentum to cycle or one that ``key`` names already, or
        (when stepped) more steps than there are.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Adam([jnp.ones(2)], lr=0.1)
    >>> scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    >>> for batch in range(2):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr(), optimizer.param_groups[0]["betas"]
    ([1.0], (0.85, 0.999))
    """

    _state = ("_schedule_phases",)
    _optional_state = ("_anneal_func_type", "use_beta1")

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: PerGroup,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: PerGroup = 0.85,
        max_momentum: PerGroup = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        with building(optimizer):
            self._schedule(optimizer, key)
            self.total_steps = formulas.one_cycle_steps(total_steps, epochs, steps_per_epoch)
            formulas.annealing(anneal_strategy)  # judges the argument
            # As in PyTorch's state dict: each phase names the entries of a group that it goes between.
            initial, maximum, minimum = f"initial_{key}", f"max_{key}", f"min_{key}"
            rates = [initial, maximum, *([initial] if three_phase else []), minimum]
            momenta = ["max_momentum", "base_momentum", "max_momentum", *(["max_momentum"] if three_phase else [])]
            ends = formulas.one_cycle_ends(self.total_steps, pct_start, three_phase)
            self._schedule_phases: list[dict[str, Any]] = [
                {"end_step": end, "start_lr": a, "end_lr": b, "start_momentum": c, "end_momentum": d}
                for end, (a, b), (c, d) in zip(ends, pairwise(rates), pairwise(momenta), strict=True)
            ]
            self._anneal_func_type = anneal_strategy
            check_number("div_factor", div_factor, 0, open_=True)
            check_number("final_div_factor", final_div_factor, 0, open_=True)
            max_lrs = per_group("max_lr", max_lr, optimizer)
            if last_epoch == -1:
                for group, highest in zip(optimizer.param_groups, max_lrs, strict=True):
                    group[initial] = highest / div_factor
                    group[maximum] = highest
                    group[minimum] = group[initial] / final_div_factor
            self.cycle_momentum = cycle_momentum
            if cycle_momentum:
                self.use_beta1 = _uses_beta1(optimizer, key)
                bases = per_group("base_momentum", base_momentum, optimizer)
                maxima = per_group("max_momentum", max_momentum, optimizer)
                if last_epoch == -1:
                    for group, low, high in zip(optimizer.param_groups, bases, maxima, strict=True):
                        _write_momentum(group, high)
                        group["max_momentum"], group["base_momentum"] = high, low
            super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        formulas.one_cycle_steps(self.total_steps, None, None)
        formulas.annealing(self._anneal_func_type)
        if not self._schedule_phases:
            raise entry_error("_schedule_phases", [], "a list of phases")
        for index, phase in enumerate(self._schedule_phases):
            if not isinstance(phase, Mapping) or not phase.keys() >= PHASE:
                raise entry_error(f"_schedule_phases[{index}]", phase, f"a dict with {sorted(PHASE)}")

    def _arguments_elsewhere(self) -> dict[str, Any]:
        peaks = [group[f"max_{self.key}"] for group in self.optimizer.param_groups]
        return {"max_lr": peaks, "anneal_strategy": self._anneal_func_type}

    def get_lr(self) -> list[Rate]:
        """The rates at this place of the cycle; writes the momentum."""
        self._warn_outside_step()
        count = self.last_epoch
        if count > self.total_steps:
            raise ValueError(f"Tried to step {count} times. The specified number of total steps is {self.total_steps}")
        groups = self.optimizer.param_groups
        if self.cycle_momentum:
            for group in groups:
                _write_momentum(group, self._at(count, group, "momentum"))
        return [self._at(count, group, "lr") for group in groups]

    def _at(self, count: int, group: dict[str, Any], of: str) -> Rate:
        phases = self._schedule_phases
        ends = [phase["end_step"] for phase in phases]
        values = [group[phase[f"start_{of}"]] for phase in phases] + [group[phases[-1][f"end_{of}"]]]
        return formulas.phases(count, ends, values, formulas.annealing(self._anneal_func_type))

    def _adopt_groups(self) -> None:
        groups = self.optimizer.param_groups
        names = {phase[name] for phase in self._schedule_phases for name in ("start_lr", "end_lr")}
        names |= {"max_momentum", "base_momentum"} if self.cycle_momentum else set()
        for name in sorted(names):
            if known := [group[name] for group in groups if name in group]:
                values = extended(f"{name} of param_groups", known, len(groups))
                for group, value in zip(groups, values, strict=True):
                    group.setdefault(name, value)
        super()._adopt_groups()
