"""What an optimizer has seen of its gradients, and counts that nobody waits for."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax._core.guard import counted
from optimjax._core.tracing import holds_tracer
from optimjax._storage.placement import whole

__all__ = ["Tally", "Watch"]

AHEAD = 8  # steps that may run while the next one is planned, and may be skipped: most that a device needs to be busy


class Tally(NamedTuple):
    """How many steps were skipped.

    Whether a step counts is known when it has run. The next ones do not wait for that: they are given the numbers for
    each outcome, and choose on the device.

    Attributes:
      known: of the steps that have ended.
      pending: of each later step, whether it counts: a scalar array.
    """

    known: int = 0
    pending: tuple[Array, ...] = ()

    def settled(self, most: int = AHEAD) -> "Tally":
        """The same without waiting, except for steps that ``most`` others have come after."""
        known, pending = self
        while pending and not isinstance(pending[0], Tracer) and (len(pending) > most or _has_run(pending[0])):
            known, pending = known + (not bool(pending[0])), pending[1:]
        return Tally(known, pending)

    def after(self, counts: Array | None) -> "Tally":
        """The tally after one more step, which counts or not; ``None`` if it does in any case."""
        return self if counts is None else Tally(self.known, (*self.pending, counts))

    @property
    def total(self) -> Any:
        """The number; it waits for the last step. While JAX traces, an array."""
        known, pending = self.settled(0)
        return known + _skipped(pending) if pending else known

    @property
    def array(self) -> Array:
        """The number as an int32 scalar, which is not waited for."""
        return jnp.int32(self.known) + _skipped(self.pending)

    def chosen(self, rows_at: Callable[[int], Any], skips: bool, like: Any) -> Any:
        """The scalars of a step as one array, where ``rows_at`` lists them for a number of skipped steps.

        An optimizer that ``skips`` has them on the device always, where its parameters are (``like`` is one): in
        another place they would be compiled for once more.
        """
        if not self.pending and not skips:
            return _array(rows_at(self.known))
        outcomes = [rows_at(self.known + more) for more in range(len(self.pending) + 1)]
        missing = max(AHEAD - len(self.pending), 0)  # filled up, so that one program does for any number
        outcomes += outcomes[-1:] * missing
        where = whole(like)
        rows = _choose(_array(outcomes), (*self.pending, *[_true_at(where)] * missing))
        return rows if where is None else jax.device_put(rows, where)


class Watch:
    """What an optimizer has seen of its gradients.

    Attributes:
      norm: of the gradients of the last step, all together, a scalar array; ``None`` where none was measured.
      tally: of the steps that were skipped.
    """

    def __init__(self) -> None:
        self.norm: Array | None = None
        self.tally = Tally()


def _skipped(pending: tuple[Any, ...]) -> Array:
    return functools.reduce(counted, pending, jnp.int32(0))


def _has_run(counts: Any) -> bool:
    return counts.is_ready()


@functools.lru_cache(maxsize=8)
def _true_at(where: Any) -> Any:
    """On the devices of the parameters, because a program is compiled for where its arguments are."""
    return np.True_ if where is None else jax.device_put(np.True_, where)


def _array(rows: list[Any]) -> Any:
    return rows if holds_tracer(rows) else np.array(rows)  # traced by the facade inside a `jit`


@jax.jit
def _choose(outcomes: Any, pending: tuple[Any, ...]) -> Array:
    return jnp.asarray(outcomes)[_skipped(pending)]
