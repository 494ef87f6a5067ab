r"""The line search of L-BFGS: a step length that satisfies the strong Wolfe conditions, as PyTorch finds it.

Along the line :math:`\theta + t d` let :math:`f(t)` be the loss. A step length is accepted where the loss has fallen
enough and the slope is flat enough:

.. math::
    f(t) \le f(0) + c_1 t f'(0), \qquad |f'(t)| \le -c_2 f'(0)

Two phases, as in Nocedal, Wright, "Numerical optimization" (2006), algorithms 3.5 and 3.6. **Bracketing** lengthens the
step until two points have an acceptable one between them. **Zooming** tries the minimum of the cubic through the two
and their slopes, and puts it in the place of one of them. PyTorch writes the phases as two loops; here they are one, so
that the loss stands in the compiled program once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Point", "strong_wolfe"]

C1, C2 = 1e-4, 0.9


class Point(NamedTuple):
    """A point on the line."""

    t: Array  # [], how far along
    loss: Array  # []
    slope: Array  # [], derivative of the loss along the line
    grad: Array  # [n]


class Search(NamedTuple):
    """What one trial hands to the next.

    While bracketing, ``bracket[0]`` is the last trial (at first the start of the line) and ``low`` is 0. While zooming
    the bracket holds two points, and ``low`` says which of them has the lower loss.
    """

    bracket: Point  # two points, stacked: each array with a leading axis of 2
    low: Array  # [] int32
    t: Array  # [], of the next trial
    evaluations: Array  # [] int32
    crowded: Array  # [] bool, whether the last trial of zooming was close to an end of the bracket
    zooming: Array  # [] bool
    done: Array  # [] bool


def strong_wolfe(
    evaluate: Callable[[Array, Any], tuple[Point, Any]],
    start: Point,
    t: Array,
    longest: Array,
    aux: Any,
    max_iter: Array,
    tolerance_change: Array,
    skip: Array,
) -> tuple[Point, Array, Any]:
    """Search from ``start`` for a point that satisfies the strong Wolfe conditions.

    A trial that is not finite ends the search with the best point of the bracket, or with ``start``.

    Args:
      evaluate: ``evaluate(t, aux) -> (Point, aux)``.
      start: the point at ``t = 0``, its slope negative.
      t: the first trial.
      longest: the largest absolute element of the direction; brackets are measured by it.
      aux: whatever evaluations hand on to each other, any pytree.
      max_iter: most trials after the first.
      tolerance_change: a bracket that is smaller ends the search.
      skip: whether not to search at all, and return ``start``.

    Returns:
      The point found, the number of evaluations, ``aux`` of the last one.
    """

    def try_next(carry: tuple[Search, Any]) -> tuple[Search, Any]:
        search, aux = carry
        new, aux = evaluate(search.t, aux)
        search = search._replace(evaluations=search.evaluations + 1)
        finite = jnp.isfinite(new.t) & jnp.isfinite(new.loss) & jnp.isfinite(new.slope)
        case = jnp.where(finite, search.zooming.astype(jnp.int32), 2)
        search = jax.lax.switch(case, (bracketing, zooming, give_up), search, new)
        return next_trial(search), aux

    def too_high(new: Point) -> Array:
        return new.loss > start.loss + C1 * new.t * start.slope

    def flat_enough(new: Point) -> Array:
        return jnp.abs(new.slope) <= -C2 * start.slope

    def bracketing(search: Search, new: Point) -> Search:
        last = at(search.bracket, 0)
        trials = search.evaluations - 1  # after the first
        exhausted = trials >= max_iter
        above = too_high(new) | ((trials > 1) & (new.loss >= last.loss))
        accepted = ~exhausted & ~above & flat_enough(new)
        extend = ~(exhausted | above | accepted | (new.slope >= 0))
        # Of a search that has run out of trials, PyTorch compares the last one with the start.
        other = choose(exhausted, start, choose(extend, new, last))
        bracket = jax.tree.map(lambda *points: jnp.stack(points), other, new)
        return search._replace(
            bracket=bracket,
            low=jnp.where(accepted, 1, lower(bracket)),
            t=interpolate(last, new, new.t + 0.01 * (new.t - last.t), new.t * 10),
            zooming=~extend,
            done=exhausted | accepted,
        )

    def zooming(search: Search, new: Point) -> Search:
        low, high = at(search.bracket, search.low), at(search.bracket, 1 - search.low)
        above = too_high(new) | (new.loss >= low.loss)
        accepted = ~above & flat_enough(new)
        crossed = new.slope * (high.t - low.t) >= 0  # the minimum is on the side of the low point
        high = choose(above, new, choose(~accepted & crossed, low, high))
        low = choose(above, low, new)
        bracket = jax.tree.map(
            lambda old, a, b: old.at[search.low].set(a).at[1 - search.low].set(b), search.bracket, low, high
        )
        return search._replace(
            bracket=bracket, low=jnp.where(above, lower(bracket), search.low), done=search.done | accepted
        )

    def give_up(search: Search, new: Point) -> Search:
        return search._replace(done=jnp.array(True))

    def next_trial(search: Search) -> Search:
        """Where to zoom next: at the minimum of the cubic, but not twice in a row close to an end."""
        first, second = at(search.bracket, 0), at(search.bracket, 1)
        left, right = jnp.minimum(first.t, second.t), jnp.maximum(first.t, second.t)
        t = interpolate(first, second, left, right)
        margin = 0.1 * (right - left)
        close = jnp.minimum(right - t, t - left) < margin
        push = close & (search.crowded | (t >= right) | (t <= left))
        pushed = jnp.where(jnp.abs(t - right) < jnp.abs(t - left), right - margin, left + margin)
        out_of_trials = search.evaluations - 1 >= max_iter
        small = jnp.abs(second.t - first.t) * longest < tolerance_change
        return search._replace(
            t=jnp.where(search.zooming, jnp.where(push, pushed, t), search.t),
            crowded=search.zooming & close & ~push,
            done=search.done | (search.zooming & (out_of_trials | small)),
        )

    search = Search(
        bracket=jax.tree.map(lambda x: jnp.stack([x, x]), start),
        low=jnp.int32(0),
        t=t,
        evaluations=jnp.int32(0),
        crowded=jnp.array(False),
        zooming=jnp.array(False),
        done=skip,
    )
    search, aux = jax.lax.while_loop(lambda carry: ~carry[0].done, try_next, (search, aux))
    return at(search.bracket, search.low), search.evaluations, aux


def interpolate(a: Point, b: Point, lowest: Array, highest: Array) -> Array:
    """Where the cubic with the loss and slope of two points has its minimum, within bounds."""
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    d2 = jnp.sqrt(jnp.maximum(square, 0))
    minimum = jnp.where(
        a.t <= b.t,
        b.t - (b.t - a.t) * ((b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)),
        a.t - (a.t - b.t) * ((a.slope + d2 - d1) / (a.slope - b.slope + 2 * d2)),
    )
    return jnp.where(square >= 0, jnp.clip(minimum, lowest, highest), (lowest + highest) / 2)


def at(points: Point, index: Any) -> Point:
    """One of stacked points."""
    return jax.tree.map(lambda x: x[index], points)


def lower(bracket: Point) -> Array:
    """Which of two stacked points has the lower loss; the first one where they are equal."""
    return (bracket.loss[0] > bracket.loss[1]).astype(jnp.int32)


def choose(condition: Array, yes: Point, no: Point) -> Point:
    """One point or the other."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
