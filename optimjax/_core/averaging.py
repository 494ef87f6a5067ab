"""Averages of weights as pure functions, for use inside ``jit``: the functional twin of :mod:`optimjax.swa_utils`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from optimjax._core.numerics import at_least_float32
from optimjax._core.states import registered
from optimjax._core.tree import flatten_params

__all__ = ["Averaging", "AveragingState", "Exponential", "Uniform", "average", "ema", "swa"]


def _like(number: Any, array: Any) -> Any:
    """A number in the dtype of an array, for promotion may be forbidden; a Python number goes with any."""
    return number.astype(jnp.result_type(array)) if isinstance(number, Array) else number


@dataclass(frozen=True)
class Exponential:
    """``decay * average + (1 - decay) * current``."""

    decay: Any

    def __call__(self, averaged: Any, current: Any, num_averaged: Any) -> Any:
        """The next average."""
        return averaged + _like(1 - self.decay, averaged) * (current - averaged)


@dataclass(frozen=True)
class Uniform:
    """The mean of all that have been averaged."""

    def __call__(self, averaged: Any, current: Any, num_averaged: Any) -> Any:
        """The next average."""
        return averaged + (current - averaged) / _like(num_averaged + 1, averaged)


@registered
class AveragingState(NamedTuple):
    """How many weights were averaged (an int32 scalar), and a tree like the parameters."""

    n_averaged: Array
    average: Any


class Averaging(NamedTuple):
    """A running average of parameters: three pure functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(params, state) -> state``, after each step (or epoch) of the optimizer. The first one takes the
        parameters over.
      params: ``params(state) -> params``: the averaged weights, in the dtypes of the parameters given to ``init``.
    """

    init: Callable[[Any], AveragingState]
    update: Callable[[Any, AveragingState], AveragingState]
    params: Callable[[AveragingState], Any]


def ema(decay: Any = 0.999) -> Averaging:
    """An exponential moving average of parameters, as ``AveragedModel`` with ``get_ema_avg_fn``.

    Args:
      decay: share of the average that is kept, from 0 to 1; a number, an array, a tracer, or a schedule
        ``count -> decay`` of the number of averages taken so far.

    Raises:
      ValueError: the decay is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from optimjax import functional as F
    >>> sgd, mean = F.sgd(lr=0.5), F.ema(decay=0.5)
    >>> params = jnp.array([1.0])
    >>> state, average = sgd.init(params), mean.init(params)
    >>> for _ in range(2):
    ...     params, state = sgd.update(params, jnp.ones(1), state)
    ...     average = jax.jit(mean.update)(params, average)
    >>> print(params, mean.params(average))
    [0.] [0.25]
    """
    if not callable(decay):
        check_decay(decay)
    return _averaging(lambda count: Exponential(decay(count) if callable(decay) else decay))


def swa() -> Averaging:
    """The mean of all parameters met, as ``AveragedModel`` (stochastic weight averaging).

    >>> import jax.numpy as jnp
    >>> from optimjax import functional as F
    >>> mean = F.swa()
    >>> state = mean.init(jnp.zeros(1))
    >>> for value in (1.0, 2.0, 6.0):
    ...     state = mean.update(jnp.array([value]), state)
    >>> print(mean.params(state))
    [3.]
    """
    return _averaging(lambda count: Uniform())


def check_decay(decay: Any) -> None:
    """Raise where a decay is out of range; a tracer passes.

    Raises:
      ValueError: not between 0 and 1.
    """
    if not isinstance(decay, Tracer) and not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")


def _averaging(rule: Callable[[Any], Any]) -> Averaging:
    def init(params: Any) -> AveragingState:
        leaves, treedef = flatten_params(params)
        return AveragingState(jnp.zeros((), jnp.int32), treedef.unflatten(map(jnp.copy, leaves)))

    def update(params: Any, state: AveragingState) -> AveragingState:
        count = state.n_averaged
        following = rule(count)

        def one(averaged: Array, current: Array) -> Array:
            current = current.astype(averaged.dtype)
            return jnp.where(count == 0, current, average(following, averaged, current, count))

        return AveragingState(count + 1, jax.tree.map(one, state.average, params))

    return Averaging(init, update, lambda state: state.average)


def average(function: Callable[..., Any], averaged: Array, current: Array, num_averaged: Any) -> Array:
    """The next average of one array: in float32 at least, in the dtype of the average."""
    wide = at_least_float32(averaged.dtype)
    return function(averaged.astype(wide), current.astype(wide), num_averaged).astype(averaged.dtype)
