"""The one place where a rule's arithmetic is called.

Precision, complex numbers, ``maximize``, sparse gradients and the storage of slots are settled here for all algorithms.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.contract import Rule
from optimjax._core.flat import elementwise
from optimjax._core.guard import unless_skipped
from optimjax._core.numerics import at_least_float32
from optimjax._core.sparse import Entries, is_sparse
from optimjax._core.tree import by_key
from optimjax._storage.placement import automatic, explicit, resharded

__all__ = ["apply", "apply_each"]


def apply_each(
    rule: Rule,
    flags: Sequence[Any],
    params: Sequence[Array],
    grads: Sequence[Any],
    slots: Sequence[Any],
    scalars: Sequence[Any],
    counts: Array | None = None,
) -> list[tuple[Array, Any]]:
    """One update of each parameter: new parameters with their new slots; the old ones if the update does not count.

    ``counts`` is a scalar that tells; ``None`` if it does in any case.
    """
    each = flags, params, grads, slots, scalars
    if rule.takes in ("element", "array"):
        return [apply(rule, *one, counts) for one in zip(*each, strict=True)]
    # The type of an array is its shape and dtype, and its sharding where that is explicit.
    alike = [(jax.typeof(param), flag) for param, flag in zip(params, flags, strict=True)]
    results: list[Any] = [None] * len(params)
    for members in by_key(alike if rule.takes == "alike" else [None] * len(params)).values():
        shared, *columns = ([column[index] for index in members] for column in each)
        for index, *updated in zip(members, *apply(rule, tuple(shared), *columns, counts), strict=True):
            results[index] = tuple(updated)
    return results


@functools.partial(jax.jit, static_argnames=("rule", "flags"))
def apply(
    rule: Rule, flags: Any, param: Any, grad: Any, slots: Any, scalars: Any, counts: Array | None = None
) -> tuple[Any, Any]:
    """One update of one parameter, or of a list of them, as the rule takes them.

    Compiled, so that inside a larger program it is traced once for each shape. Arithmetic runs in float32 at least and
    results are cast last: a float16 parameter with zero gradients stays finite although 1e-8 is zero in float16.
    """
    if rule.takes in ("alike", "all"):
        each = (_widened(*one) for one in zip(flags, param, grad, slots, scalars, strict=True))
        *wide, flags = map(list, zip(*each, strict=True))
        if rule.takes == "alike":
            flags = flags[0]
    elif is_sparse(grad):
        to_entries = functools.partial(_apply_to_entries, rule, flags)
        return automatic(to_entries, (param, slots))(param, grad, slots, scalars, counts)
    elif rule.takes == "element" and jnp.iscomplexobj(param):
        return _apply_to_halves(rule, flags, param, grad, slots, scalars, counts)
    elif rule.takes == "element":
        return elementwise(_apply_alone, (rule, flags), param, grad, slots, (scalars, counts))
    else:
        return _apply_alone(rule, flags, param, grad, slots, (scalars, counts))
    return _updated(rule, flags, wide, (param, slots), counts)


def _apply_alone(rule: Rule, flags: Any, param: Array, grad: Array, slots: Any, numbers: Any) -> tuple[Any, Any]:
    """Update one real parameter; the numbers are its scalars, and whether the update counts."""
    scalars, counts = numbers
    *wide, flags = _widened(flags, param, grad, slots, scalars)
    return _updated(rule, flags, wide, (param, slots), counts)


def _updated(rule: Rule, flags: Any, wide: Sequence[Any], old: Any, counts: Array | None) -> tuple[Any, Any]:
    """What the rule makes of widened arrays, in place of the old parameter and slots."""
    return jax.tree.map(functools.partial(_restored, counts), tuple(rule.update(*wide, flags)), old)


def _widened(flags: Any, param: Array, grad: Array, slots: Any, scalars: Any) -> tuple[Any, ...]:
    """What ``update`` gets of a parameter: everything that is a floating number in one dtype; the flags last."""
    if jnp.iscomplexobj(param):  # halves that are updated apart would have the norms of halves
        raise RuntimeError("complex parameters need a rule with takes='element'")
    dtype = at_least_float32(param.dtype)

    def widen(x: Array) -> Array:
        # What has the parameter's shape lies as it does meanwhile, or operations could not combine them.
        x = resharded(x, explicit(param)) if x.shape == param.shape else x
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    grad = widen(grad).astype(dtype)
    if getattr(flags, "maximize", False):
        grad = -grad
    scalars = jax.tree.map(lambda scalar: jnp.asarray(scalar, dtype), scalars)
    return widen(param), grad, jax.tree.map(widen, slots), scalars, flags._replace(param_dtype=param.dtype)


def _restored(counts: Array | None, new: Any, old: Array) -> Array:
    """A result in the dtype of what it replaces and, where that is part of its type, with its sharding."""
    if np.shape(new) != old.shape:
        raise ValueError(f"update has returned an array of shape {np.shape(new)} for one of shape {old.shape}")
    return unless_skipped(counts, resharded(jnp.asarray(new).astype(old.dtype), explicit(old)), old)


def _apply_to_halves(
    rule: Rule, flags: Any, param: Array, grad: Array, slots: Any, scalars: Any, counts: Array | None
) -> tuple[Any, Any]:
    """Update the real and the imaginary part of a complex parameter side by side, as PyTorch sees it.

    `jax.grad` returns the conjugate of PyTorch's gradient. Slots that are real all the same (a count, a product of
    betas) serve both parts.
    """
    (real, real_slots), (imag, imag_slots) = (
        apply(
            rule,
            flags,
            part(param),
            part(jnp.conj(grad)),
            jax.tree.map(lambda slot, part=part: part(slot) if jnp.iscomplexobj(slot) else slot, slots),
            scalars,
            counts,
        )
        for part in (jnp.real, jnp.imag)
    )
    join = lambda old, re, im: jax.lax.complex(re, im) if jnp.iscomplexobj(old) else re  # noqa: E731
    return jax.tree.map(join, (param, slots), (real, real_slots), (imag, imag_slots))


def _apply_to_entries(
    rule: Rule, flags: Any, param: Array, grad: Any, slots: Any, scalars: Any, counts: Array | None
) -> tuple[Any, Any]:
    """Update the entries that a sparse gradient names. Nothing else is read: the cost grows with them alone.

    Slots of another shape than the parameter's, such as a count, are handed over whole.
    """
    entries = Entries(grad)
    taken = jax.tree.map(lambda slot: entries.take(slot) if slot.shape == param.shape else slot, slots)
    new, new_slots = apply(rule, flags, entries.take(param), entries.values, taken, scalars, counts)

    def put(old: Array, new: Array) -> Array:
        return entries.put(old, new) if old.shape == param.shape else new

    return put(param, new), jax.tree.map(put, slots, new_slots)
