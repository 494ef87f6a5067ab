"""Clipping gradients: pure functions over trees, and PyTorch's functions over ``Parameter.grad``."""

import functools
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.parameter import Parameter
from optimjax.sparse import Entries, coalesced, is_sparse, over_values
from optimjax.tree import dotted, is_inexact_array, kind_of

__all__ = ["clip_grad_norm", "clip_grad_norm_", "clip_grad_value", "clip_grad_value_"]


def clip_grad_norm(grads: Any, max_norm: Any, norm_type: float = 2.0) -> tuple[Any, Array]:
    """Scale gradients down together so that the norm of all of them is at most ``max_norm``.

    As in PyTorch they are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1. The norm is taken in
    float32 at least, whatever the dtype of the gradients, and its derivative by an element that is zero is zero.

    Args:
      grads: a tree of real or complex floating arrays, dense or sparse (``BCOO``, whose duplicates count as their sum);
        ``None`` in place of a gradient is left out.
      max_norm: a number or scalar array, at least 0.
      norm_type: the order of the norm, positive; may be ``inf`` (or ``"inf"``).

    Returns:
      The scaled gradients, with their dtypes, and the norm before, a real scalar.

    Raises:
      ValueError: ``norm_type`` is not positive.
      TypeError: ``max_norm`` is no number, or a gradient no floating array; the message names its path. Boxes are
        for :func:`clip_grad_norm_`.

    See `torch.nn.utils.clip_grad_norm_
    <https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html>`_.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> grads, norm = optim.clip_grad_norm({"w": jnp.array([3.0, 4.0])}, max_norm=1.0)
    >>> print(norm, grads["w"].round(3))
    5.0 [0.6 0.8]
    """
    _check_number("max_norm", max_norm)
    order = _order(norm_type)
    leaves = _gradients(grads, "clip_grad_norm")
    total = _root([_powers(grad, order) for grad in leaves], order) if leaves else jnp.zeros(())
    return jax.tree.map(lambda grad: _scaled(grad, max_norm, total), grads, is_leaf=is_sparse), total


def clip_grad_value(grads: Any, clip_value: Any) -> Any:
    """Clamp every gradient to ``[-clip_value, clip_value]``, real and imaginary parts by themselves.

    Args:
      grads: a tree of gradients, as :func:`clip_grad_norm` takes; duplicates of a sparse one are summed before.
      clip_value: a number or scalar array, at least 0.

    Raises:
      TypeError: ``clip_value`` is no number, or a gradient no floating array; the message names its path. Boxes are
        for :func:`clip_grad_value_`.

    See `torch.nn.utils.clip_grad_value_
    <https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_value_.html>`_.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> print(optim.clip_grad_value({"w": jnp.array([3.0, -0.5])}, 1.0)["w"])
    [ 1.  -0.5]
    """
    _check_number("clip_value", clip_value)
    _gradients(grads, "clip_grad_value")
    return jax.tree.map(lambda grad: _clamped(grad, clip_value), grads, is_leaf=is_sparse)


def clip_grad_norm_(
    parameters: Iterable[Parameter] | Parameter | Optimizer,
    max_norm: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Array:
    """:func:`clip_grad_norm` on ``Parameter.grad``; returns the norm before.

    Args:
      parameters: boxes, or an optimizer, whose every gradient is taken.
      max_norm: a number or scalar array, at least 0.
      norm_type: the order of the norm, positive; may be ``inf`` (or ``"inf"``).
      error_if_nonfinite: raise where the norm is NaN or infinite, before anything changes.
      foreach: accepted as in PyTorch; changes nothing.

    Raises:
      RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
      ValueError, TypeError: as :func:`clip_grad_norm`; ``parameters`` are no boxes.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> w = optim.Parameter(jnp.zeros(2))
    >>> w.grad = jnp.array([3.0, 4.0])
    >>> print(optim.clip_grad_norm_([w], max_norm=1.0), w.grad.round(3))
    5.0 [0.6 0.8]
    """
    boxes = _boxes(parameters)
    grads, total = clip_grad_norm([box.grad for box in boxes], max_norm, norm_type)
    if error_if_nonfinite and not bool(jnp.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite ({total}), so it "
            "cannot be clipped. To scale the gradients by this norm anyway, set `error_if_nonfinite=False`"
        )
    for box, grad in zip(boxes, grads, strict=True):
        box.grad = grad
    return total


def clip_grad_value_(
    parameters: Iterable[Parameter] | Parameter | Optimizer, clip_value: Any, foreach: bool | None = None
) -> None:
    """:func:`clip_grad_value` on ``Parameter.grad``.

    Args:
      parameters: boxes, or an optimizer, whose every gradient is taken.
      clip_value: a number or scalar array, at least 0.
      foreach: accepted as in PyTorch; changes nothing.

    Raises:
      TypeError: ``clip_value`` is no number, ``parameters`` are no boxes.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> w = optim.Parameter(jnp.zeros(2))
    >>> w.grad = jnp.array([3.0, -0.5])
    >>> optim.clip_grad_value_([w], 1.0)
    >>> print(w.grad)
    [ 1.  -0.5]
    """
    boxes = _boxes(parameters)
    for box, grad in zip(boxes, clip_grad_value([box.grad for box in boxes], clip_value), strict=True):
        box.grad = grad


# --- Compiled once for each kind of gradient, so that new patterns of present ones compile nothing ------------------


@functools.partial(jax.jit, static_argnames="order")
def _powers(grad: Any, order: float) -> Array:
    """The sum of the absolute values to the power of the order; of infinite order their maximum."""
    values = Entries(grad).values if is_sparse(grad) else grad
    wide = _wide(values)
    if order == float("inf"):
        return jnp.max(_flat_at_zero(lambda x: jnp.abs(x).astype(wide), values), initial=0)
    power = int(order) if order.is_integer() else order  # whole powers are products
    return jnp.sum(_flat_at_zero(lambda x: jnp.abs(x).astype(wide) ** power, values))


@functools.partial(jax.jit, static_argnames="order")
def _root(powers: list[Array], order: float) -> Array:
    """The norm of all gradients as one vector."""
    if order == float("inf"):
        return jnp.max(jnp.stack(powers))
    total = functools.reduce(jnp.add, powers)
    return _flat_at_zero(lambda x: jnp.sqrt(x) if order == 2 else x ** (1 / order), total)


def _flat_at_zero(function: Callable[[Array], Array], x: Array) -> Array:
    """A function that is 0 at 0, with the derivative 0 there, where its own may be infinite or that of one side."""
    some = x != 0
    return jnp.where(some, function(jnp.where(some, x, 1)), 0)


@jax.jit
def _scaled(grad: Any, max_norm: Any, norm: Array) -> Any:
    # Within bounds it is 1. As min(max_norm / limit, 1) it would have no derivative for max_norm=inf.
    limit = norm + 1e-6
    scale = jnp.minimum(max_norm, limit) / limit
    return over_values(lambda grad: (grad * scale.astype(_wide(grad))).astype(grad.dtype), grad)


@jax.jit
def _clamped(grad: Any, limit: Any) -> Any:
    def clamp(grad: Array) -> Array:
        if jnp.iscomplexobj(grad):
            return jax.lax.complex(clamp(jnp.real(grad)), clamp(jnp.imag(grad)))
        return jnp.clip(grad, -limit, limit).astype(grad.dtype)

    return over_values(clamp, coalesced(grad))


def _wide(grad: Any) -> Any:
    """The real dtype to compute in."""
    return jnp.promote_types(jnp.real(grad).dtype, jnp.float32)


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


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)) or np.shape(value):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}")


def _boxes(parameters: Any) -> list[Parameter]:
    """Those with a gradient."""
    if isinstance(parameters, Optimizer):
        parameters._check_trace()
        boxes = [box for group in parameters.param_groups for box in group["params"]]
    elif isinstance(parameters, Parameter):
        boxes = [parameters]
    elif isinstance(parameters, Iterable):
        boxes = list(parameters)
    else:
        boxes = [parameters]  # to be refused
    for box in boxes:
        if not isinstance(box, Parameter):
            raise TypeError(
                f"parameters must be Parameters or an optimizer, but one of them is a {type(box).__name__}: give "
                "optim.parameters(module); trees of gradients are for clip_grad_norm and clip_grad_value"
            )
    if not boxes and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return [box for box in boxes if box.grad is not None]


def _gradients(grads: Any, caller: str) -> list[Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: is_sparse(x) or isinstance(x, Parameter))
    for path, grad in paths:
        if is_inexact_array(grad.data if is_sparse(grad) else grad):
            continue
        name = dotted(path) or "grads"
        if isinstance(grad, (Parameter, Optimizer)):
            raise TypeError(
                f"{name!r} is a {type(grad).__name__}: {caller} takes trees of gradients; "
                f"{caller}_ is for parameters and optimizers"
            )
        raise TypeError(f"gradient {name!r} must be a floating array, got {kind_of(grad)}: {grad!r}")
    return [grad for _, grad in paths]
