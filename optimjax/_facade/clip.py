"""Clipping gradients: pure functions over trees, and PyTorch's functions over ``Parameter.grad``.

All gradients of a call go through one compiled program. Ever new selections of gradients must not compile without end,
so only the first :data:`SELECTIONS` of them have a program each; later ones share programs that take a few gradients of
one shape.
"""

import functools
import math
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax._core.numerics import at_least_float32, widened
from optimjax._core.sparse import Entries, coalesced, is_sparse, over_values
from optimjax._core.tree import dotted, is_inexact_array, kind_of
from optimjax._facade.optimizer import Optimizer
from optimjax._params.parameter import Parameter

__all__ = ["clip_grad_norm", "clip_grad_norm_", "clip_grad_value", "clip_grad_value_"]

SELECTIONS = 64  # of gradients, that have a compiled program of their own
PORTION = 64  # gradients of one shape that a shared program takes at most


def clip_grad_norm(grads: Any, max_norm: Any, norm_type: float = 2.0) -> tuple[Any, Array]:
    """Scale gradients down together so that the norm of all of them is at most ``max_norm``.

    As in PyTorch they are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1. The norm is taken in
    float32 at least, whatever the dtype of the gradients, and its derivative by an element that is zero is zero.

    Args:
      grads: a tree of real or complex floating arrays, dense or sparse (``BCOO``, whose duplicates count as their sum);
        ``None`` in place of a gradient is left out.
      max_norm: a number or real scalar array, at least 0. Changing it compiles nothing.
      norm_type: the order of the norm, positive; may be ``inf`` (or ``"inf"``).

    Returns:
      The scaled gradients, with their dtypes, and the norm before, a real scalar.

    Raises:
      ValueError: ``norm_type`` is not positive, or ``max_norm`` too large for a float.
      TypeError: ``max_norm`` is not a real number, or a gradient not a floating array; the message names its path.
        Parameters are for :func:`clip_grad_norm_`.

    See `torch.nn.utils.clip_grad_norm_
    <https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html>`_.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> grads, norm = optim.clip_grad_norm({"w": jnp.array([3.0, 4.0])}, max_norm=1.0)
    >>> print(norm, grads["w"].round(3))
    5.0 [0.6 0.8]
    """
    limit, order = _limit("max_norm", max_norm), _order(norm_type)
    leaves, treedef = _gradients(grads, "clip_grad_norm")
    clipped, total = _norm_clipped(leaves, limit, order)
    return treedef.unflatten(clipped), total


def clip_grad_value(grads: Any, clip_value: Any) -> Any:
    """Clamp every gradient to ``[-clip_value, clip_value]``, real and imaginary parts separately.

    Args:
      grads: a tree of gradients, as :func:`clip_grad_norm` takes; duplicates of a sparse one are summed first.
      clip_value: a number or real scalar array, at least 0. Changing it compiles nothing.

    Raises:
      TypeError: ``clip_value`` is not a real number, or a gradient not a floating array; the message names its path.
        Parameters are for :func:`clip_grad_value_`.
      ValueError: ``clip_value`` is too large for a float.

    See `torch.nn.utils.clip_grad_value_
    <https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_value_.html>`_.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> print(optim.clip_grad_value({"w": jnp.array([3.0, -0.5])}, 1.0)["w"])
    [ 1.  -0.5]
    """
    limit = _limit("clip_value", clip_value)
    leaves, treedef = _gradients(grads, "clip_grad_value")
    return treedef.unflatten(_value_clipped(leaves, limit))


def clip_grad_norm_(
    parameters: Iterable[Parameter] | Parameter | Optimizer,
    max_norm: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Array:
    """:func:`clip_grad_norm` on ``Parameter.grad``; returns the norm before.

    Args:
      parameters: parameters, or an optimizer, whose every gradient is taken.
      max_norm: a number or real scalar array, at least 0. Changing it compiles nothing.
      norm_type: the order of the norm, positive; may be ``inf`` (or ``"inf"``).
      error_if_nonfinite: raise if the norm is NaN or infinite, before anything changes. This waits for the norm.
      foreach: accepted as in PyTorch; changes nothing.

    Raises:
      RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
      ValueError, TypeError: as :func:`clip_grad_norm`; ``parameters`` holds something else than parameters.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> w = optim.Parameter(jnp.zeros(2))
    >>> w.grad = jnp.array([3.0, 4.0])
    >>> print(optim.clip_grad_norm_([w], max_norm=1.0), w.grad.round(3))
    5.0 [0.6 0.8]
    """
    limit, order = _limit("max_norm", max_norm), _order(norm_type)
    present = _with_gradient(parameters)
    clipped, total = _norm_clipped([parameter.grad for parameter in present], limit, order)
    if error_if_nonfinite and not math.isfinite(float(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite ({total}), so it "
            "cannot be clipped. To scale the gradients by this norm anyway, set `error_if_nonfinite=False`"
        )
    _set_gradients(present, clipped)
    return total


def clip_grad_value_(
    parameters: Iterable[Parameter] | Parameter | Optimizer, clip_value: Any, foreach: bool | None = None
) -> None:
    """:func:`clip_grad_value` on ``Parameter.grad``.

    Args:
      parameters: parameters, or an optimizer, whose every gradient is taken.
      clip_value: a number or real scalar array, at least 0. Changing it compiles nothing.
      foreach: accepted as in PyTorch; changes nothing.

    Raises:
      TypeError: ``clip_value`` is not a real number, ``parameters`` holds something else than parameters.
      ValueError: ``clip_value`` is too large for a float.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> w = optim.Parameter(jnp.zeros(2))
    >>> w.grad = jnp.array([3.0, -0.5])
    >>> optim.clip_grad_value_([w], 1.0)
    >>> print(w.grad)
    [ 1.  -0.5]
    """
    limit = _limit("clip_value", clip_value)
    present = _with_gradient(parameters)
    _set_gradients(present, _value_clipped([parameter.grad for parameter in present], limit))


# --- One program, or a few ------------------------------------------------------------------------------------------


def _norm_clipped(grads: list[Any], limit: Any, order: float) -> tuple[list[Any], Array]:
    if not grads:
        return [], jnp.zeros(())
    if _has_program(grads, limit):
        return _norm_clipped_together(grads, limit, order)
    portions = _portions(grads)
    power: Any = np.zeros((), np.result_type(*(_real(grad) for grad in grads)))
    for positions in portions:
        power = _accumulated(power, [grads[i] for i in positions], order)
    total = _root(power, order)
    return _in_portions(portions, lambda portion: _scaled(portion, limit, total), grads), total


def _value_clipped(grads: list[Any], limit: Any) -> list[Any]:
    if not grads:
        return []
    if _has_program(grads, limit):
        return _clamped(grads, limit)
    return _in_portions(_portions(grads), lambda portion: _clamped(portion, limit), grads)


_seen: set[Any] = set()  # the selections of gradients that have a program of their own


def _has_program(grads: list[Any], limit: Any) -> bool:
    """Whether these gradients go into one program: always while JAX traces, which compiles what is around."""
    leaves = jax.tree.leaves(grads)
    if any(isinstance(leaf, Tracer) for leaf in (limit, *leaves)):
        return True
    selection = tuple(map(_kind, leaves))
    if len(_seen) < SELECTIONS:
        _seen.add(selection)
    return selection in _seen


def _kind(leaf: Any) -> Any:
    return leaf.aval if isinstance(leaf, jax.Array) else (leaf.shape, leaf.dtype)


def _portions(grads: Sequence[Any]) -> list[list[int]]:
    """Positions of gradients that compile alike, 64, 32, ..., 2 or 1 at a time: seven programs for a shape."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for position, grad in enumerate(grads):
        alike[jax.tree.structure(grad), *map(_kind, jax.tree.leaves(grad))].append(position)
    result, size = [], PORTION
    while size:
        for positions in alike.values():
            while len(positions) >= size:
                result.append(positions[:size])
                del positions[:size]
        size //= 2
    return result


def _in_portions(portions: list[list[int]], function: Callable[[list[Any]], list[Any]], grads: list[Any]) -> list[Any]:
    result = list(grads)
    for positions in portions:
        for position, grad in zip(positions, function([grads[i] for i in positions]), strict=True):
            result[position] = grad
    return result


def _sum_of_powers(grads: Sequence[Any], order: float) -> Array:
    """The sum of absolute values to the power of the order; of infinite order their maximum."""
    powers = [_powers(grad, order) for grad in grads]
    dtype = np.result_type(*(power.dtype for power in powers))
    return functools.reduce(_plus(order), (power.astype(dtype) for power in powers))


def _plus(order: float) -> Callable[[Array, Array], Array]:
    return jnp.maximum if order == float("inf") else jnp.add


def _powers(grad: Any, order: float) -> Array:
    values = widened(Entries(grad).values if is_sparse(grad) else grad)
    if order == float("inf"):
        return jnp.max(_absolute(values), initial=0)
    power = int(order) if order.is_integer() else order  # whole powers are products
    if order < 1:
        return jnp.sum(_flat_at_zero(lambda x: _absolute(x) ** power, values))
    return jnp.sum(_absolute(values) ** power)


def _absolute(x: Array) -> Array:
    """Absolute values with derivative 0 at 0. To choose elements here would make sums ten times slower on a CPU."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * jnp.sign(x)


def _root_of(power: Array, order: float) -> Array:
    """The norm of all gradients as one vector."""
    if order == float("inf"):
        return power
    return _flat_at_zero(lambda x: jnp.sqrt(x) if order == 2 else x ** (1 / order), power)


def _flat_at_zero(function: Callable[[Array], Array], x: Array) -> Array:
    """A function that is 0 at 0, with the derivative 0 there, where its own is infinite."""
    some = x != 0
    return jnp.where(some, function(jnp.where(some, x, 1)), 0)


def _times(scale: Array, grad: Array) -> Array:
    wide = widened(grad)
    scale = scale.astype(_real(grad))
    if jnp.iscomplexobj(grad):
        return jax.lax.complex(jnp.real(wide) * scale, jnp.imag(wide) * scale)
    return (wide * scale).astype(grad.dtype)


def _scaled_by(grads: Sequence[Any], limit: Array, norm: Array) -> list[Any]:
    # Within bounds it is 1. As min(max_norm / enough, 1) it would have no derivative for max_norm=inf.
    enough = norm + 1e-6
    scale = jnp.minimum(limit.astype(norm.dtype), enough) / enough
    return [over_values(functools.partial(_times, scale), grad) for grad in grads]


@functools.partial(jax.jit, static_argnames="order")
def _norm_clipped_together(grads: list[Any], limit: Array, order: float) -> tuple[list[Any], Array]:
    total = _root_of(_sum_of_powers(grads, order), order)
    return _scaled_by(grads, limit, total), total


@functools.partial(jax.jit, static_argnames="order")
def _accumulated(power: Array, grads: list[Any], order: float) -> Array:
    return _plus(order)(power, _sum_of_powers(grads, order).astype(power.dtype))


_root = functools.partial(jax.jit, static_argnames="order")(_root_of)
_scaled = jax.jit(_scaled_by)


@jax.jit
def _clamped(grads: list[Any], limit: Array) -> list[Any]:
    def clamp(grad: Array) -> Array:
        if jnp.iscomplexobj(grad):
            return jax.lax.complex(clamp(jnp.real(grad)), clamp(jnp.imag(grad)))
        wide = widened(grad)
        bound = limit.astype(wide.dtype)
        return jnp.clip(wide, -bound, bound).astype(grad.dtype)

    return [over_values(clamp, coalesced(grad)) for grad in grads]


def _real(grad: Any) -> Any:
    """The real dtype to compute in."""
    return at_least_float32(jnp.finfo(grad.dtype).dtype)


# --- What is handed in ----------------------------------------------------------------------------------------------


def _order(norm_type: Any) -> float:
    if not isinstance(norm_type, (int, float, str, np.generic)):
        raise TypeError(f"norm_type must be a positive number, got {norm_type!r}")
    try:
        order = float(norm_type)
    except ValueError:
        order = float("nan")
    if not order > 0:
        raise ValueError(f"Invalid norm_type: {norm_type!r}: it must be a positive number")
    return order


def _limit(name: str, value: Any) -> Any:
    """The limit as one kind of scalar, since each kind would compile a program of its own."""
    number = isinstance(value, (int, float)) or (
        isinstance(value, (np.generic, np.ndarray, jax.Array))
        and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool)
        and not jnp.issubdtype(value.dtype, jnp.complexfloating)
    )
    if not number or np.shape(value):
        raise TypeError(f"{name} must be a number or a scalar array, and real, got {value!r}")
    if isinstance(value, jax.Array):
        wanted = value.dtype == jnp.result_type(float) and not value.weak_type
        if isinstance(value, Tracer) or wanted or not value.is_fully_addressable:
            return value
    try:
        return np.float64(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits into a float, got {value!r}") from None


def _with_gradient(parameters: Any) -> list[Parameter]:
    """Those of the parameters that have a gradient."""
    if isinstance(parameters, Optimizer):
        parameters._check_trace()
        given = [parameter for group in parameters.param_groups for parameter in group["params"]]
    elif isinstance(parameters, Iterable) and not isinstance(parameters, (Parameter, Mapping)):
        given = list(parameters)
    else:
        given: list[Any] = [parameters]  # one parameter; anything else is refused below
    for parameter in given:
        if not isinstance(parameter, Parameter):
            raise TypeError(
                f"parameters must be Parameters or an optimizer, but this is a {kind_of(parameter)}: give "
                "optim.parameters(module); trees of gradients are for clip_grad_norm and clip_grad_value"
            )
    if not given and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return [parameter for parameter in given if parameter.grad is not None]


def _set_gradients(parameters: Sequence[Parameter], grads: Sequence[Any]) -> None:
    """Set them without checks, which they have passed before; an interrupt must not leave some unclipped."""
    try:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter._grad = grad
    except BaseException:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter._grad = grad
        raise


def _gradients(grads: Any, caller: str) -> tuple[list[Any], Any]:
    """The gradients of a tree, and its structure."""
    leaves, treedef = jax.tree.flatten(grads, is_leaf=_is_leaf)
    if all(map(_is_gradient, leaves)):
        return leaves, treedef
    paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=_is_leaf)
    path, grad = next((path, leaf) for path, leaf in paths if not _is_gradient(leaf))
    name = dotted(path) or "grads"
    if isinstance(grad, (Parameter, Optimizer)):
        raise TypeError(
            f"{name!r} is a {type(grad).__name__}: {caller} takes trees of gradients; "
            f"{caller}_ is for parameters and optimizers"
        )
    raise TypeError(f"gradient {name!r} must be a floating array, got {kind_of(grad)}: {grad!r}")


def _is_leaf(x: Any) -> bool:
    return is_sparse(x) or isinstance(x, Parameter)


def _is_gradient(leaf: Any) -> bool:
    return is_inexact_array(leaf.data if is_sparse(leaf) else leaf)
