"""Timing by turns: what is compared runs alternately in one process, so that a noisy machine is noisy for all."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["Timings", "interleaved", "timed"]

AT_LEAST = 5  # turns, however long they take


@dataclass(frozen=True)
class Timings:
    """How long each contender took, turn by turn.

    Attributes:
      seconds: of each contender, by name, one for each turn.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Of a contender's seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The median over the turns of one contender's time in another's of the same turn."""
        return statistics.median(self._ratios(name, other))

    def quartiles(self, name: str, other: str) -> tuple[float, float]:
        """Between which half of these ratios are."""
        low, _, high = statistics.quantiles(self._ratios(name, other), n=4, method="inclusive")
        return low, high

    def _ratios(self, name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]


def timed(run: Callable[[], Any]) -> float:
    """Seconds until what a call returns is there; JAX returns before."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    warm_up: int = 3,
) -> Timings:
    """Time the contenders by turns.

    Args:
      runs: what is timed, by name; each returns the arrays to wait for.
      rounds: how many turns, at least 2.
      seconds: instead, for how long; five turns at least.
      warm_up: turns before that which are not counted: they compile, and fill caches.

    >>> timings = interleaved({"short": lambda: sum(range(10)), "long": lambda: sum(range(100_000))}, rounds=5)
    >>> timings.ratio("short", "long") < 0.5
    True
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names, turn, end = list(runs), 0, None
    while True:
        if turn == warm_up and seconds is not None:
            end = time.perf_counter() + seconds
        counted = turn - warm_up
        if counted == rounds or (end is not None and counted >= AT_LEAST and time.perf_counter() > end):
            return Timings(taken)
        first = turn % len(names)  # another one begins each turn, because what ran before has filled the caches
        for name in names[first:] + names[:first]:
            spent = timed(runs[name])
            if counted >= 0:
                taken[name].append(spent)
        turn += 1
