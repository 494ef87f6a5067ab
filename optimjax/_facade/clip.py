"""Clipping gradients: pure functions over trees, and PyTorch's functions over ``Parameter.grad``.

All gradients of a call go through one compiled program, or a few: see :mod:`optimjax._engine.selections`.
"""

import functools
import math
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.norms import root_of, scalar_limit, scaled_by, sum_of_powers
from optimjax._core.numerics import widened
from optimjax._core.sparse import coalesced, is_sparse, over_values
from optimjax._core.tree import dotted, is_inexact_array, kind_of
from optimjax._engine.selections import has_program, in_portions, norm_in_portions, portions
from optimjax._facade.optimizer import Optimizer
from optimjax._params.parameter import Parameter

__all__ = ["clip_grad_norm", "clip_grad_norm_", "clip_grad_value", "clip_grad_value_"]


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
    limit, order = scalar_limit("max_norm", max_norm), _order(norm_type)
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
    limit = scalar_limit("clip_value", clip_value)
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
    limit, order = scalar_limit("max_norm", max_norm), _order(norm_type)
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
    limit = scalar_limit("clip_value", clip_value)
    present = _with_gradient(parameters)
    _set_gradients(present, _value_clipped([parameter.grad for parameter in present], limit))


# --- One program, or a few ------------------------------------------------------------------------------------------


def _norm_clipped(grads: list[Any], limit: Any, order: float) -> tuple[list[Any], Array]:
    if not grads:
        return [], jnp.zeros(())
    if has_program(grads, limit):
        return _norm_clipped_together(grads, limit, order)
    parts = portions(grads)
    total = norm_in_portions(grads, parts, order)
    return in_portions(parts, lambda portion: _scaled(portion, limit, total), grads), total


def _value_clipped(grads: list[Any], limit: Any) -> list[Any]:
    if not grads:
        return []
    if has_program(grads, limit):
        return _clamped(grads, limit)
    return in_portions(portions(grads), lambda portion: _clamped(portion, limit), grads)


@functools.partial(jax.jit, static_argnames="order")
def _norm_clipped_together(grads: list[Any], limit: Array, order: float) -> tuple[list[Any], Array]:
    total = root_of(sum_of_powers(grads, order), order)
    return scaled_by(grads, limit, total), total


_scaled = jax.jit(scaled_by)


@jax.jit
def _clamped(grads: list[Any], limit: Array) -> list[Any]:
    def clamp(grad: Array) -> Array:
        if jnp.iscomplexobj(grad):
            return jax.lax.complex(clamp(jnp.real(grad)), clamp(jnp.imag(grad)))
        wide = widened(grad)
        bound = limit.astype(wide.dtype)
        return jnp.clip(wide, -bound, bound).astype(grad.dtype)

    return [over_values(clamp, coalesced(grad)) for grad in grads]


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
