"""The arithmetic that the schedulers and the schedules share: the class and the function of a name use the same lines.

A count is a Python number or an array of NumPy, answered in double precision, or an array of JAX.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "annealing",
    "cyclic_scale",
    "functions_of",
    "improvement",
    "one_cycle_ends",
    "one_cycle_steps",
    "phases",
    "real",
    "reduced",
    "triangle",
    "watch",
    "worst",
]

Value = Any  # a number, an array or a tracer


class _Math:
    """The functions of NumPy that schedules use, for one Python number, in double precision and as PyTorch has them."""

    cos = math.cos
    floor = math.floor
    minimum = min
    maximum = max

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        return yes if condition else no

    @staticmethod
    def searchsorted(values: Any, count: Any, side: Literal["right"]) -> int:
        return bisect_right(values, count)

    @staticmethod
    def asarray(values: Any) -> Any:
        return values.tolist()


def functions_of(count: Any) -> Any:
    """Where the mathematical functions of a count come from."""
    if isinstance(count, jax.Array):
        return jnp
    return np if isinstance(count, np.ndarray) else _Math


def real(number: Any) -> Any:
    """An array of JAX in its default precision, since JAX may be told not to promote integers; any other as it is."""
    return number.astype(jnp.result_type(float)) if isinstance(number, jax.Array) else number


def triangle(value: Value, peak: Value, count: Any, total: float, ratio: float, scale: Any, by: str) -> Any:
    """The value at a count of cycles of length ``total``, of which ``ratio`` goes towards ``peak``."""
    xp, count = functions_of(count), real(count)
    cycle = xp.floor(1 + count / total)
    x = 1.0 + count / total - cycle
    height = xp.where(x <= ratio, x / ratio, (x - 1) / (ratio - 1) if ratio < 1 else 0.0)
    return value + (peak - value) * height * scale(cycle if by == "cycle" else count)


def cyclic_scale(
    mode: str, gamma: float, scale_fn: Callable[[Any], Any] | None, scale_mode: str
) -> tuple[Callable[[Any], Any], str]:
    """How high the cycles of ``CyclicLR`` are: a factor, by the number of the cycle (from 1) or by the count."""
    if scale_fn is not None:
        return scale_fn, scale_mode
    scales: dict[str, tuple[Callable[[Any], Any], str]] = {
        "triangular": (lambda cycle: 1.0, "cycle"),
        "triangular2": (lambda cycle: 1 / 2.0 ** (cycle - 1), "cycle"),
        "exp_range": (lambda count: gamma**count, "iterations"),
    }
    if mode not in scales:
        raise ValueError(f"mode is invalid and scale_fn is None: mode must be one of {', '.join(scales)}, got {mode!r}")
    return scales[mode]


def phases(count: Any, ends: Sequence[float], values: Sequence[Any], anneal: Callable[[Any, Any, Any], Any]) -> Any:
    """The value at a count of phases that end at ``ends``, each between two of ``values``, one more than ``ends``."""
    result = None
    for start, end, first, last in reversed(list(zip([0.0, *ends], ends, values, values[1:], strict=False))):
        share = (count - start) / (end - start) if end != start else 1.0
        piece = anneal(first, last, share)
        result = piece if result is None else functions_of(count).where(count <= end, piece, result)
    return result


def one_cycle_steps(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    """The number of steps of ``OneCycleLR``, given in one of two ways."""
    if total_steps is None and (epochs is None or steps_per_epoch is None):
        raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch)")
    given = (
        {"epochs": epochs, "steps_per_epoch": steps_per_epoch} if total_steps is None else {"total_steps": total_steps}
    )
    for name, number in given.items():
        if not isinstance(number, int) or number <= 0:
            raise ValueError(f"Expected positive integer {name}, but got {number}")
    return math.prod(number for number in given.values() if number is not None)


def one_cycle_ends(total_steps: int, pct_start: float, three_phase: bool) -> list[float]:
    """The counts at which the phases of ``OneCycleLR`` end."""
    if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
        raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}")
    ends = [float(pct_start * total_steps) - 1, total_steps - 1]
    return [ends[0], float(2 * pct_start * total_steps) - 2, ends[1]] if three_phase else ends


def annealing(strategy: str) -> Callable[[Any, Any, Any], Any]:
    """``(start, end, share) -> value`` between two values."""
    if strategy == "cos":
        return lambda start, end, pct: end + (start - end) / 2.0 * (functions_of(pct).cos(math.pi * pct) + 1)
    if strategy == "linear":
        return lambda start, end, pct: (end - start) * pct + start
    raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {strategy}")


def watch(metric: Any, best: Any, bad: Any, waiting: Any, better: Any, patience: int, cooldown: int) -> Any:
    """Count one metric of a plateau: ``(cut, best, num_bad_epochs, cooldown_counter)``; ``cut`` says whether to cut."""
    xp = functions_of(best)
    improved = better(metric, best)
    bad = xp.where(improved | (waiting > 0), 0, bad + 1)
    waiting = xp.maximum(waiting - 1, 0)
    cut = bad > patience
    return cut, xp.where(improved, metric, best), xp.where(cut, 0, bad), xp.where(cut, cooldown, waiting)


def reduced(value: Any, factor: float, lowest: Any, eps: float) -> Any:
    """A value after a cut of a plateau; a cut by less than ``eps`` is left out."""
    xp = functions_of(value)
    new = xp.maximum(value * factor, lowest)
    return xp.where(value - new > eps, new, value)


def worst(mode: str) -> float:
    """What every metric is better than."""
    return math.inf if mode == "min" else -math.inf


def improvement(mode: str, threshold: float, threshold_mode: str) -> Callable[[Any, Any], Any]:
    """``(metric, best) -> bool``: whether a metric is better than the best so far by more than the threshold."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode {mode} is unknown!")
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"threshold mode {threshold_mode} is unknown!")
    if threshold_mode == "rel":
        return {
            "min": lambda metric, best: metric < best * (1.0 - threshold),
            "max": lambda metric, best: metric > best * (threshold + 1.0),
        }[mode]
    return {
        "min": lambda metric, best: metric < best - threshold,
        "max": lambda metric, best: metric > best + threshold,
    }[mode]
