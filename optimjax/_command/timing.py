"""Timing by turns: what is compared runs alternately in one process, so that a noisy machine is noisy for all."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["Timings", "interleaved", "timed"]

AT_LEAST = 5  # turns, also where they take longer than they should
PATIENCE = 3  # unless it is so many times longer: then two


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
      seconds: instead, for how long; five turns at least, unless they take three times as long, then two.
      warm_up: turns before that which are not counted: they compile, and fill caches. A slow one is the last of them.

    >>> timings = interleaved({"short": lambda: sum(range(10)), "long": lambda: sum(range(100_000))}, rounds=5)
    >>> timings.ratio("short", "long") < 0.5
    True
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names, turn, begin = list(runs), 0, time.perf_counter()
    while warm_up or not _is_enough(len(taken[names[0]]), time.perf_counter() - begin, rounds, seconds):
        first = turn % len(names)  # another one begins each turn, because what ran before has filled the caches
        for name in names[first:] + names[:first]:
            spent = timed(runs[name])
            if not warm_up:
                taken[name].append(spent)
        turn += 1
        if warm_up:
            late = seconds is not None and time.perf_counter() - begin > seconds
            warm_up, begin = 0 if late else warm_up - 1, time.perf_counter()
    return Timings(taken)


def _is_enough(turns: int, spent: float, rounds: int | None, seconds: float | None) -> bool:
    if seconds is None:
        return turns == rounds
    return spent > seconds and turns >= (AT_LEAST if spent < PATIENCE * seconds else 2)
