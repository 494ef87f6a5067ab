"""Unconstrained problems of the CUTEst collection, written out in JAX, with their usual starting points.

Least values are those that the sources document, to six digits. Most of the problems are from Moré, Garbow, Hillstrom,
"Testing unconstrained optimization software", ACM Transactions on Mathematical Software 7 (1981), numbered MGH 1 to 35;
DIXMAANA and DIXMAANL are from Dixon, Maany, "A family of test problems with sparse Hessians for unconstrained
optimization" (1988), and the others are written as the SIF files of CUTEst have them. Some have fewer variables than
CUTEst's usual size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["PROBLEMS", "Problem"]


class Problem(NamedTuple):
    """A function to be minimized.

    ``start`` is where one begins, ``[n]``, ``least`` the documented value at the minimum.
    """

    name: str
    kind: str
    function: Callable[[Any], Any]
    start: np.ndarray
    least: float


def squares(residuals: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The sum of the squares of residuals, which may be several arrays."""

    def function(x: Any) -> Any:
        found = residuals(x)
        return sum(jnp.sum(jnp.square(each)) for each in (found if isinstance(found, tuple) else (found,)))

    return function


def counted(count: int) -> np.ndarray:
    """The numbers 1 to ``count``."""
    return np.arange(1.0, count + 1)


def column(text: str) -> np.ndarray:
    return np.array(text.split(), float)


# --- Few variables ----------------------------------------------------------------------------------------------------


def rosenbrock(x: Any) -> Any:  # MGH 1 and 21
    return 10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]


def powell_badly_scaled(x: Any) -> Any:  # MGH 3
    return 1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001


def brown_badly_scaled(x: Any) -> Any:  # MGH 4
    return x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2


def beale(x: Any) -> Any:  # MGH 5
    return jnp.array([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** counted(3))


def jennrich_sampson(x: Any) -> Any:  # MGH 6
    i = counted(10)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def helix(x: Any) -> Any:  # MGH 7
    turns = jnp.arctan(x[1] / x[0]) / (2 * jnp.pi) + jnp.where(x[0] < 0, 0.5, 0)
    return 10 * (x[2] - 10 * turns), 10 * (jnp.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]


def bard(x: Any) -> Any:  # MGH 8
    y = column("0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39")
    u = counted(15)
    v = 16 - u
    return y - (x[0] + u / (v * x[1] + np.minimum(u, v) * x[2]))


def meyer(x: Any) -> Any:  # MGH 10
    y = column("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")
    return x[0] * jnp.exp(x[1] / (45 + 5 * counted(16) + x[2])) - y


def gulf(x: Any) -> Any:  # MGH 11
    t = counted(99) / 100
    y = 25 + (-50 * np.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x: Any) -> Any:  # MGH 12
    t = counted(10) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (np.exp(-t) - np.exp(-10 * t))


def powell_singular(x: Any) -> Any:  # MGH 13 and 22
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    return a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2


def woods(x: Any) -> Any:  # MGH 14
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    both = 10**0.5 * (b + d - 2), (b - d) / 10**0.5
    return 10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c, *both


def kowalik_osborne(x: Any) -> Any:  # MGH 15
    y = column("0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
    u = column("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Any) -> Any:  # MGH 16
    t = counted(20) / 5
    return (x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2


def osborne_a(x: Any) -> Any:  # MGH 17
    y = column(
        "0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628 0.603 0.580 "
        "0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420 0.414 0.411 0.406"
    )
    t = 10 * (counted(33) - 1)
    return y - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs(x: Any) -> Any:  # MGH 18
    t = counted(13) / 10
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


def osborne_b(x: Any) -> Any:  # MGH 19
    y = column(
        "1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616 0.606 0.602 "
        "0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495 0.500 0.423 0.395 0.375 "
        "0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 0.708 0.633 0.668 0.645 0.632 0.591 "
        "0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 0.428 0.292 0.162 0.098 0.054"
    )
    t = (counted(65) - 1) / 10
    peaks = (x[i] * jnp.exp(-((t - x[i + 7]) ** 2) * x[i + 4]) for i in (1, 2, 3))
    return y - (x[0] * jnp.exp(-t * x[4]) + sum(peaks))


def watson(x: Any) -> Any:  # MGH 20
    t, j = (counted(29) / 29)[:, None], np.arange(len(x))
    slope = (j[1:] * t ** (j[1:] - 1)) @ x[1:]
    return slope - (t**j @ x) ** 2 - 1, x[0], x[1] - x[0] ** 2 - 1


# --- Any number of variables ------------------------------------------------------------------------------------------


def penalty_1(x: Any) -> Any:  # MGH 23
    return 1e-5**0.5 * (x - 1), jnp.sum(x**2) - 0.25


def penalty_2(x: Any) -> Any:  # MGH 24
    n, e = len(x), jnp.exp(x / 10)
    y = np.exp(counted(n)[1:] / 10) + np.exp(counted(n)[:-1] / 10)
    chain = 1e-5**0.5 * (e[1:] + e[:-1] - y), 1e-5**0.5 * (e[1:] - np.exp(-0.1))
    return x[0] - 0.2, *chain, jnp.sum((n + 1 - counted(n)) * x**2) - 1


def variably_dimensioned(x: Any) -> Any:  # MGH 25
    weighted = jnp.sum(counted(len(x)) * (x - 1))
    return x - 1, weighted, weighted**2


def broyden_banded(x: Any) -> Any:  # MGH 31
    around = jnp.pad(x * (1 + x), (5, 1))
    band = sum(around[k : k + len(x)] for k in (0, 1, 2, 3, 4, 6))
    return x * (2 + 5 * x**2) + 1 - band


def chebyquad(x: Any) -> Any:  # MGH 35
    shifted, n = 2 * x - 1, len(x)
    before, now, means = jnp.ones_like(x), shifted, []
    for degree in range(1, n + 1):
        means.append(jnp.mean(now) + (1 / (degree**2 - 1) if degree % 2 == 0 else 0))
        before, now = now, 2 * shifted * now - before
    return jnp.stack(means)


def arwhead(x: Any) -> Any:
    return jnp.sum((x[:-1] ** 2 + x[-1] ** 2) ** 2 - 4 * x[:-1] + 3)


def dixmaan(beta: float, gamma: float, delta: float, power: int) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        n, third = len(x), len(x) // 3
        share = (counted(n) / n) ** power
        return (
            1
            + jnp.sum(share * x**2)
            + beta * jnp.sum(x[:-1] ** 2 * (x[1:] + x[1:] ** 2) ** 2)
            + gamma * jnp.sum(x[: 2 * third] ** 2 * x[third:] ** 4)
            + delta * jnp.sum(share[:third] * x[:third] * x[2 * third :])
        )

    return function


def dqdrtic(x: Any) -> Any:
    return x[:-2], 10 * x[1:-1], 10 * x[2:]


def fletchcr(x: Any) -> Any:
    return 10 * (x[1:] - x[:-1] + 1 - x[:-1] ** 2)


def genrose(x: Any) -> Any:
    return 1, 10 * (x[1:] - x[:-1] ** 2), x[1:] - 1


def liarwhd(x: Any) -> Any:
    return 2 * (x**2 - x[0]), x - 1


def nondia(x: Any) -> Any:
    return x[0] - 1, 10 * (x[0] - x[:-1] ** 2)


def tridia(x: Any) -> Any:
    return x[0] - 1, counted(len(x))[1:] ** 0.5 * (2 * x[1:] - x[:-1])


FIT, SCALE, LONG = "a fit to data", "badly scaled or singular", "a curved valley"
LARGE = "many variables"
PROBLEMS = [
    Problem("BARD", FIT, squares(bard), np.ones(3), 8.21487e-3),
    Problem("BIGGS6", FIT, squares(biggs), np.array([1.0, 2, 1, 1, 1, 1]), 5.65565e-3),
    Problem("BOX3", FIT, squares(box), np.array([0.0, 10, 20]), 0),
    Problem("BROWNDEN", FIT, squares(brown_dennis), np.array([25.0, 5, -5, -1]), 85822.2),
    Problem("GULF", FIT, squares(gulf), np.array([5, 2.5, 0.15]), 0),
    Problem("JENSMP", FIT, squares(jennrich_sampson), np.array([0.3, 0.4]), 124.362),
    Problem("KOWOSB", FIT, squares(kowalik_osborne), np.array([0.25, 0.39, 0.415, 0.39]), 3.07505e-4),
    Problem("MEYER3", FIT, squares(meyer), np.array([0.02, 4000, 250]), 87.9458),
    Problem("OSBORNEA", FIT, squares(osborne_a), np.array([0.5, 1.5, -1, 0.01, 0.02]), 5.46489e-5),
    Problem("OSBORNEB", FIT, squares(osborne_b), column("1.3 .65 .65 .7 .6 3 5 7 2 4.5 5.5"), 4.01377e-2),
    Problem("BEALE", LONG, squares(beale), np.ones(2), 0),
    Problem("FLETCHCR", LONG, squares(fletchcr), np.zeros(100), 0),
    Problem("GENROSE", LONG, squares(genrose), counted(100) / 101, 1),
    Problem("HELIX", LONG, squares(helix), np.array([-1.0, 0, 0]), 0),
    Problem("ROSENBR", LONG, squares(rosenbrock), np.array([-1.2, 1]), 0),
    Problem("WOODS", LONG, squares(woods), np.array([-3.0, -1, -3, -1]), 0),
    Problem("BROWNBS", SCALE, squares(brown_badly_scaled), np.ones(2), 0),
    Problem("POWELLBS", SCALE, squares(powell_badly_scaled), np.array([0.0, 1]), 0),
    Problem("POWELLSG", SCALE, squares(powell_singular), np.array([3.0, -1, 0, 1]), 0),
    Problem("WATSON", SCALE, squares(watson), np.zeros(12), 4.72238e-10),
    Problem("CHEBYQAD", SCALE, squares(chebyquad), counted(8) / 9, 3.51687e-3),
    Problem("PENALTY1", SCALE, squares(penalty_1), counted(10), 7.08765e-5),
    Problem("PENALTY2", SCALE, squares(penalty_2), np.full(10, 0.5), 2.93660e-4),
    Problem("VARDIM", SCALE, squares(variably_dimensioned), 1 - counted(100) / 100, 0),
    Problem("ARWHEAD", LARGE, arwhead, np.ones(1000), 0),
    Problem("BRYBND", LARGE, squares(broyden_banded), -np.ones(1000), 0),
    Problem("DIXMAANA", LARGE, dixmaan(0, 0.125, 0.125, 0), np.full(1500, 2.0), 1),
    Problem("DIXMAANL", LARGE, dixmaan(0.26, 0.26, 0.26, 2), np.full(1500, 2.0), 1),
    Problem("DQDRTIC", LARGE, squares(dqdrtic), np.full(1000, 3.0), 0),
    Problem("LIARWHD", LARGE, squares(liarwhd), np.full(1000, 4.0), 0),
    Problem("NONDIA", LARGE, squares(nondia), -np.ones(1000), 0),
    Problem("SROSENBR", LARGE, squares(rosenbrock), np.tile([-1.2, 1], 500), 0),
    Problem("TRIDIA", LARGE, squares(tridia), np.ones(1000), 0),
]
