"""Schedules: pure functions ``count -> value``, for use inside ``jit``, ``scan`` and ``vmap``.

A schedule may stand for any numeric hyperparameter of the functional core; update k (from 0) uses ``schedule(k)``.
Each is the closed form of the scheduler of that name in :mod:`optimjax.lr_scheduler`, with the value that it has after
as many steps.

The first argument is the base value (PyTorch's ``lr`` of the group), a number or an array; the others are PyTorch's.
A count is an integer of at least 0: a Python number or an array of NumPy is answered in double precision, an array of
JAX, of any shape, in JAX's default precision.

>>> import jax.numpy as jnp, optimjax as optim
>>> from optimjax import functional as F, schedules
>>> adam = F.adam(lr=schedules.cosine_annealing(1e-3, T_max=100))
>>> sgd = F.sgd(lr=0.1, momentum=schedules.linear(0.9, start_factor=0.5, total_iters=10))
"""

import functools
import itertools
import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.formulas import (
    annealing,
    cyclic_scale,
    functions_of,
    improvement,
    one_cycle_ends,
    one_cycle_steps,
    phases,
    real,
    reduced,
    triangle,
    watch,
    worst,
)
from optimjax._core.states import registered

__all__ = [
    "Plateau",
    "PlateauState",
    "Schedule",
    "constant",
    "cosine_annealing",
    "cosine_annealing_warm_restarts",
    "cyclic",
    "exponential",
    "lambda_",
    "linear",
    "multi_step",
    "multiplicative",
    "one_cycle",
    "polynomial",
    "product",
    "reduce_on_plateau",
    "sequential",
    "step",
    "warmup",
]

Value = Any  # a number, an array or a tracer
Schedule = Callable[[Any], Any]
P = ParamSpec("P")


def _passed(milestones: Any, count: Any) -> Any:
    """How many of the milestones, which ascend, lie at the count or before it; compared in one dtype."""
    if isinstance(count, jax.Array):
        count = real(count) if jnp.issubdtype(milestones.dtype, jnp.floating) else count
        milestones = jnp.asarray(milestones, count.dtype)
    return functions_of(count).searchsorted(milestones, count, side="right")


class _Made:
    """A schedule that shows what it was made from, and is copied and pickled by it."""

    def __init__(self, make: Any, schedule: Schedule, args: Any, kwargs: Any):
        self._make, self._schedule, self._args, self._kwargs = make, schedule, args, kwargs

    def __call__(self, count: Any) -> Any:
        return self._schedule(count)

    def __repr__(self) -> str:
        arguments = [*map(repr, self._args), *(f"{name}={value!r}" for name, value in self._kwargs.items())]
        return f"{self._make.__name__}({', '.join(arguments)})"

    def __reduce__(self) -> Any:
        return functools.partial(self._make, *self._args, **self._kwargs), ()


def _shown(make: Callable[P, Schedule]) -> Callable[P, Schedule]:
    """The schedules made by a function show how they were made."""

    @functools.wraps(make)
    def shown(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        return _Made(shown, make(*args, **kwargs), args, kwargs)

    return shown


def _check_positive(name: str, number: float) -> None:
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {number}")


@_shown
def constant(value: Value, factor: float = 1.0 / 3, total_iters: int = 5) -> Schedule:
    """``value * factor`` for ``total_iters`` counts, then ``value``, as ``ConstantLR``.

    >>> [round(constant(0.4, factor=0.5, total_iters=2)(count), 3) for count in range(4)]
    [0.2, 0.2, 0.4, 0.4]

    Raises:
      ValueError: the factor is not between 0 and 1.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"Constant multiplicative factor expected to be between 0 and 1, got {factor}")
    value = real(value)
    return lambda count: value * (factor + functions_of(count).where(count >= total_iters, 1 - factor, 0.0))


@_shown
def linear(value: Value, start_factor: float = 1.0 / 3, end_factor: float = 1.0, total_iters: int = 5) -> Schedule:
    """From ``value * start_factor`` straight to ``value * end_factor`` in ``total_iters`` counts, as ``LinearLR``.

    >>> [round(linear(0.4, start_factor=0.5, total_iters=2)(count), 3) for count in range(4)]
    [0.2, 0.3, 0.4, 0.4]

    Raises:
      ValueError: ``start_factor`` is not in (0, 1], or ``end_factor`` not in [0, 1].
    """
    if not 0 < start_factor <= 1:
        raise ValueError(
            "Starting multiplicative factor expected to be greater than 0 and less or equal to 1, "
            f"got start_factor={start_factor}"
        )
    if not 0 <= end_factor <= 1:
        raise ValueError(f"Ending multiplicative factor expected to be between 0 and 1, got end_factor={end_factor}")
    # With total_iters=0 it stays at the first value, as PyTorch's does.
    value, rise, whole = real(value), end_factor - start_factor, total_iters or 1
    return lambda count: value * (start_factor + rise * functions_of(count).minimum(total_iters, real(count)) / whole)


@_shown
def step(value: Value, step_size: int, gamma: float = 0.1) -> Schedule:
    """Times ``gamma`` every ``step_size`` counts, as ``StepLR``.

    >>> [step(1.0, step_size=2, gamma=0.5)(count) for count in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]

    Raises:
      ValueError: ``step_size`` is not positive.
    """
    _check_positive("step_size", step_size)
    value = real(value)
    return lambda count: value * gamma ** real(count // step_size)


@_shown
def multi_step(value: Value, milestones: Iterable[int], gamma: float = 0.1) -> Schedule:
    """Times ``gamma`` at each milestone, as ``MultiStepLR``; a repeated milestone applies twice.

    >>> [multi_step(1.0, milestones=[1, 3], gamma=0.5)(count) for count in range(5)]
    [1.0, 0.5, 0.5, 0.25, 0.25]
    """
    value, ordered = real(value), np.sort(np.asarray(list(milestones)))
    return lambda count: value * gamma ** real(_passed(ordered, count))


@_shown
def exponential(value: Value, gamma: float) -> Schedule:
    """Times ``gamma`` at every count, as ``ExponentialLR``.

    >>> [exponential(1.0, gamma=0.5)(count) for count in range(3)]
    [1.0, 0.5, 0.25]
    """
    value = real(value)
    return lambda count: value * gamma ** real(count)


@_shown
def polynomial(value: Value, total_iters: int = 5, power: float = 1.0) -> Schedule:
    """From ``value`` to 0 in ``total_iters`` counts, as a power of the share that is left, as ``PolynomialLR``.

    >>> [polynomial(1.0, total_iters=4, power=2.0)(count) for count in range(6)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    # With total_iters=0 it stays at the first value, as PyTorch's does.
    value, whole = real(value), float(total_iters or 1)

    def schedule(count: Any) -> Any:
        xp = functions_of(count)
        left = 1.0 - xp.minimum(total_iters, real(count)) / whole
        return value * xp.maximum(left, 0.0) ** power  # compiled, a division may come to more than 1

    return schedule


@_shown
def cosine_annealing(value: Value, T_max: float, eta_min: float = 0.0) -> Schedule:  # noqa: N803
    """Half a cosine from ``value`` to ``eta_min`` in ``T_max`` counts, and up again after, as ``CosineAnnealingLR``.

    >>> [round(cosine_annealing(1.0, T_max=4)(count), 3) for count in (0, 2, 4, 6)]
    [1.0, 0.5, 0.0, 0.5]

    Raises:
      ValueError: ``T_max`` is not positive.
    """
    _check_positive("T_max", T_max)
    value = real(value)
    return lambda count: eta_min + (value - eta_min) * (1 + functions_of(count).cos(math.pi * real(count) / T_max)) / 2


@_shown
def cosine_annealing_warm_restarts(value: Value, T_0: int, T_mult: int = 1, eta_min: float = 0.0) -> Schedule:  # noqa: N803
    """Half cosines from ``value`` to ``eta_min``; the first takes ``T_0`` counts, each next ``T_mult`` times as many.

    As ``CosineAnnealingWarmRestarts``.

    >>> [round(cosine_annealing_warm_restarts(1.0, T_0=2, T_mult=2)(count), 3) for count in range(6)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146]

    Raises:
      ValueError: ``T_0`` is not a positive integer, or ``T_mult`` is not an integer of at least 1.
    """
    if not isinstance(T_0, int) or T_0 <= 0:
        raise ValueError(f"Expected positive integer T_0, but got {T_0}")
    if not isinstance(T_mult, int) or T_mult < 1:
        raise ValueError(f"Expected integer T_mult >= 1, but got {T_mult}")
    # Where each cycle begins and how long it is, as exact integers: a logarithm would miss some by one.
    starts, lengths = [0], [T_0]
    while T_mult > 1 and starts[-1] + lengths[-1] < 2**31:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * T_mult)
    value, starts, lengths = real(value), np.asarray(starts, np.int32), np.asarray(lengths, float)

    def schedule(count: Any) -> Any:
        xp = functions_of(count)
        if T_mult == 1:
            since, length = count % T_0, T_0
        else:
            cycle = _passed(starts, count) - 1
            since, length = real(count) - real(xp.asarray(starts))[cycle], xp.asarray(lengths)[cycle]
        return eta_min + (value - eta_min) * (1 + xp.cos(math.pi * real(since) / length)) / 2

    return schedule


@_shown
def cyclic(
    value: Value,
    max_lr: Value,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: float = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
) -> Schedule:
    """Straight from ``value`` up to ``max_lr`` and down again, over and over, as ``CyclicLR``.

    With ``value`` above ``max_lr`` it goes down and up, as the momentum of ``CyclicLR`` does.

    >>> [round(cyclic(0.1, 0.5, step_size_up=2)(count), 3) for count in range(5)]
    [0.1, 0.3, 0.5, 0.3, 0.1]

    Raises:
      ValueError: an unknown mode without a ``scale_fn``, or ``step_size_up`` is not positive.
    """
    scale, by = cyclic_scale(mode, gamma, scale_fn, scale_mode)
    _check_positive("step_size_up", step_size_up)
    up = float(step_size_up)
    total = up + (float(step_size_down) if step_size_down is not None else up)
    value, peak = real(value), real(max_lr)
    return lambda count: triangle(value, peak, count, total, up / total, scale, by)


@_shown
def one_cycle(
    value: Value,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Up from ``value / div_factor`` to ``value``, and down to that divided by ``final_div_factor``, as ``OneCycleLR``.

    ``value`` is PyTorch's ``max_lr``. Beyond ``total_steps``, where the scheduler raises, it stays at the last value.

    The momentum that ``OneCycleLR`` cycles alongside the rate is the cycle around the base momentum with
    ``div_factor=base_momentum / max_momentum`` and ``final_div_factor=1``.

    >>> rate = one_cycle(1.0, total_steps=10)
    >>> [round(rate(count), 3) for count in (0, 2, 9)]
    [0.04, 1.0, 0.0]
    >>> momentum = one_cycle(0.85, total_steps=10, div_factor=0.85 / 0.95, final_div_factor=1)
    >>> [round(momentum(count), 3) for count in (0, 2, 9)]
    [0.95, 0.85, 0.95]

    Raises:
      ValueError: no number of steps, or a value out of range.
    """
    total = one_cycle_steps(total_steps, epochs, steps_per_epoch)
    ends = one_cycle_ends(total, pct_start, three_phase)
    anneal = annealing(anneal_strategy)
    value = real(value)
    initial = value / div_factor
    values = [initial, value, *([initial] if three_phase else []), initial / final_div_factor]

    def schedule(count: Any) -> Any:
        # The scheduler may be stepped once too often, to `total`; PyTorch's value there lies beyond the last one.
        return phases(functions_of(count).where(count > total, total - 1, real(count)), ends, values, anneal)

    return schedule


@_shown
def lambda_(value: Value, lr_lambda: Callable[[Any], Any]) -> Schedule:
    """``value`` times a function of the count, as ``LambdaLR``.

    >>> lambda_(0.5, lambda count: 0.5**count)(1)
    0.25
    """
    value = real(value)
    return lambda count: value * lr_lambda(count)


@_shown
def multiplicative(value: Value, lr_lambda: Callable[[Any], Any]) -> Schedule:
    """``value`` times the function of every count from 1 on, as ``MultiplicativeLR``; it takes ``count`` calls.

    >>> multiplicative(1.0, lambda count: 1 / count)(3)
    0.16666666666666666
    """

    def schedule(count: Any) -> Any:
        if isinstance(count, jax.Array):
            if count.ndim:
                return jax.vmap(schedule)(count)
            start = jnp.asarray(value, jnp.result_type(float))
            return jax.lax.fori_loop(1, count + 1, lambda index, result: result * lr_lambda(index), start)
        factors = map(lr_lambda, range(1, int(np.max(count)) + 1))
        values = list(itertools.accumulate(factors, operator.mul, initial=value))
        return np.asarray(values)[count] if isinstance(count, np.ndarray) else values[count]

    return schedule


@_shown
def sequential(schedules: Sequence[Schedule], milestones: Sequence[int]) -> Schedule:
    """One schedule after the other, each from its own count 0 on, as ``SequentialLR``.

    >>> both = sequential([linear(1.0, 0.5, total_iters=2), exponential(1.0, 0.5)], milestones=[2])
    >>> [round(both(count), 3) for count in range(5)]
    [0.5, 0.75, 1.0, 0.5, 0.25]

    Raises:
      ValueError: the number of milestones is not one less than that of the schedules, or they do not ascend.
    """
    schedules, milestones = list(schedules), list(milestones)
    if not schedules or len(milestones) != len(schedules) - 1:
        raise ValueError(
            "sequential expects one schedule more than milestones, "
            f"got {len(schedules)} schedules and {len(milestones)} milestones"
        )
    if milestones != sorted(milestones):
        raise ValueError(f"milestones must ascend, got {milestones}")

    def schedule(count: Any) -> Any:
        xp = functions_of(count)
        if xp not in (jnp, np):  # a Python number
            index = bisect_right(milestones, count)
            return schedules[index](count - [0, *milestones][index])
        result = schedules[0](count)
        for start, later in zip(milestones, schedules[1:], strict=True):
            result = xp.where(count >= start, later(xp.maximum(count - start, 0)), result)
        return result

    return schedule


@_shown
def product(*schedules: Schedule) -> Schedule:
    """All schedules multiplied, as ``ChainedScheduler`` does with the factors of its schedulers.

    Give the base value to one of them and 1 to the others.

    >>> product(constant(0.4, factor=0.5, total_iters=2), exponential(1.0, gamma=0.5))(1)
    0.1
    """
    return lambda count: math.prod(schedule(count) for schedule in schedules)


@_shown
def warmup(schedule: Schedule, total_iters: int, *, delay: bool = True) -> Schedule:
    """Rise in ``total_iters`` equal steps to the first value of a schedule, which then begins.

    Count k (from 0) of the warm-up gives ``(k + 1) / total_iters`` of it.

    Args:
      schedule: what is joined.
      total_iters: length of the warm-up.
      delay: whether the schedule begins after the warm-up; otherwise it runs alongside, scaled.

    >>> rate = warmup(cosine_annealing(1.0, T_max=4), 2)
    >>> [round(rate(count), 3) for count in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]

    A schedule with the base value 1 is a factor, so the facade takes it, too:

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=0.1)
    >>> scheduler = optim.lr_scheduler.LambdaLR(optimizer, warmup(cosine_annealing(1.0, T_max=90), 10))

    Raises:
      ValueError: ``total_iters`` is not positive.
    """
    _check_positive("total_iters", total_iters)

    def joined(count: Any) -> Any:
        xp = functions_of(count)
        share = xp.minimum((real(count) + 1) / float(total_iters), 1.0)
        return schedule(xp.maximum(count - total_iters, 0) if delay else count) * share

    return joined


@registered
class PlateauState(NamedTuple):
    """What :func:`reduce_on_plateau` carries from metric to metric."""

    value: Array  # of the shape of the first one, in JAX's default precision
    best: Array  # [] in JAX's default precision
    num_bad_epochs: Array  # [] int32
    cooldown_counter: Array  # [] int32


class Plateau(NamedTuple):
    """``init() -> state`` and ``update(metric, state) -> (value, state)``."""

    init: Callable[[], PlateauState]
    update: Callable[[Any, PlateauState], tuple[Array, PlateauState]]


def reduce_on_plateau(
    value: Value,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
) -> Plateau:
    """Cut ``value`` after more than ``patience`` metrics without an improvement, as ``ReduceLROnPlateau``.

    It is not a function of the count but a pair, as an algorithm is: ``update(metric, state)`` returns the value to go
    on with, to be given to the functional core for one call: ``adam.update(params, grads, state, lr=value)``.

    >>> plateau = reduce_on_plateau(1.0, factor=0.5, patience=1)
    >>> state = plateau.init()
    >>> for metric in (3.0, 2.0, 2.0, 2.0):
    ...     value, state = jax.jit(plateau.update)(metric, state)
    >>> print(value)
    0.5

    Raises:
      ValueError: the factor is not below 1, or an unknown mode.
    """
    if factor >= 1.0:
        raise ValueError(f"Factor should be < 1.0, got {factor}")
    better = improvement(mode, threshold, threshold_mode)

    def init() -> PlateauState:
        kind = jnp.result_type(float)
        counts = (jnp.zeros((), jnp.int32) for _ in range(2))  # not one for both: a state may be donated
        return PlateauState(jnp.asarray(value, kind), jnp.asarray(worst(mode), kind), *counts)

    def update(metric: Any, state: PlateauState) -> tuple[Array, PlateauState]:
        metric = jnp.asarray(metric, state.best.dtype)
        cut, *counted = watch(metric, *state[1:], better, patience, cooldown)
        new = jnp.where(cut, reduced(state.value, factor, min_lr, eps), state.value)
        return new, PlateauState(new, *counted)

    return Plateau(init, update)
