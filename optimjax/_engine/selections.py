"""Programs over gradients, of which ever new selections must not compile without end.

Only the first :data:`SELECTIONS` of them have a program each; later ones share programs that take a few gradients of
one shape.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.norms import all_finite, measured, plus, real_dtype, root_of, sum_of_powers
from optimjax._core.tracing import holds_tracer
from optimjax._core.tree import by_key

__all__ = ["has_program", "in_portions", "measure", "norm_in_portions", "portions"]

SELECTIONS = 64  # of gradients, that have a compiled program of their own
PORTION = 64  # gradients of one shape that a shared program takes at most
_seen: set[Any] = set()  # the selections of gradients that have a program of their own


def has_program(grads: list[Any], limit: Any) -> bool:
    """Whether these gradients go into one program: always while JAX traces, which compiles what is around."""
    if holds_tracer((limit, grads)):
        return True
    selection = tuple(map(_kind, jax.tree.leaves(grads)))
    if len(_seen) < SELECTIONS:
        _seen.add(selection)
    return selection in _seen


def _kind(leaf: Any) -> Any:
    return leaf.aval if isinstance(leaf, jax.Array) else (leaf.shape, leaf.dtype)


def portions(grads: Sequence[Any]) -> list[list[int]]:
    """Positions of gradients that compile alike, 64, 32, ..., 2 or 1 at a time: seven programs for a shape."""
    alike = by_key([(jax.tree.structure(grad), *map(_kind, jax.tree.leaves(grad))) for grad in grads])
    result, size = [], PORTION
    while size:
        for positions in alike.values():
            while len(positions) >= size:
                result.append(positions[:size])
                del positions[:size]
        size //= 2
    return result


def in_portions(portions: list[list[int]], function: Callable[[list[Any]], list[Any]], grads: list[Any]) -> list[Any]:
    """What a function makes of the gradients, given a portion at a time."""
    result = list(grads)
    for positions in portions:
        for position, grad in zip(positions, function([grads[i] for i in positions]), strict=True):
            result[position] = grad
    return result


def norm_in_portions(grads: Sequence[Any], parts: Sequence[Sequence[int]], order: float) -> Array:
    """The norm of all gradients, by shared programs."""
    power: Any = np.zeros((), np.result_type(*(real_dtype(grad) for grad in grads)))
    for positions in parts:
        power = _accumulated(power, [grads[i] for i in positions], order)
    return _root(power, order)


def measure(grads: Sequence[Any]) -> tuple[Array, Array]:
    """The norm of all gradients, and whether all are finite: see :func:`optimjax._core.norms.measured`."""
    if not grads or has_program(list(grads), None):
        return _measured(list(grads))
    parts = portions(grads)
    norm = norm_in_portions(grads, parts, 2.0)
    return norm, functools.reduce(jnp.logical_and, [_finite([grads[i] for i in part], norm) for part in parts])


@functools.partial(jax.jit, static_argnames="order")
def _accumulated(power: Array, grads: list[Any], order: float) -> Array:
    return plus(order)(power, sum_of_powers(grads, order).astype(power.dtype))


_root = functools.partial(jax.jit, static_argnames="order")(root_of)
_measured, _finite = jax.jit(measured), jax.jit(all_finite)
