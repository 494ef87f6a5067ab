"""Clipping gradients: pure functions over trees, and PyTorch's functions over ``Parameter.grad``."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.parameter import Parameter
from optimjax.sparse import Entries, coalesced, is_sparse, over_values

__all__ = ["clip_grad_norm", "clip_grad_norm_", "clip_grad_value", "clip_grad_value_"]


def clip_grad_norm(grads: Any, max_norm: Any, norm_type: float = 2.0) -> tuple[Any, Array]:
    """Scale gradients down together so that the norm of all of them is at most ``max_norm``.

    As in PyTorch they are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1. The norm is taken in
    float32 at least, whatever the dtype of the gradients.

    Args:
      grads: a tree of real or complex floating arrays, dense or sparse (``BCOO``, whose duplicates count as their sum);
        ``None`` in place of a gradient is left out.
      max_norm: a number or scalar array, at least 0.
      norm_type: the order of the norm, positive; may be ``inf``.

    Returns:
      The scaled gradients, with their dtypes, and the norm before, a real scalar.

    Raises:
      ValueError: ``norm_type`` is not positive.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> grads, norm = optim.clip_grad_norm({"w": jnp.array([3.0, 4.0])}, max_norm=1.0)
    >>> print(norm, grads["w"].round(3))
    5.0 [0.6 0.8]
    """
    if not norm_type > 0:
        raise ValueError(f"Invalid norm_type: {norm_type}: it must be positive")
    values = [Entries(grad).values if is_sparse(grad) else grad for grad in jax.tree.leaves(grads, is_leaf=is_sparse)]
    leaves = [jnp.abs(value).astype(_wide(value)).ravel() for value in values]
    if norm_type == float("inf"):
        total = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in leaves])) if leaves else jnp.zeros(())
    else:
        norms = [jnp.linalg.norm(leaf, norm_type) for leaf in leaves]
        total = jnp.linalg.norm(jnp.stack(norms), norm_type) if leaves else jnp.zeros(())
    scale = jnp.minimum(max_norm / (total + 1e-6), 1.0)

    def scaled(grad: Array) -> Array:
        return (grad * scale.astype(_wide(grad))).astype(grad.dtype)

    return jax.tree.map(lambda grad: over_values(scaled, grad), grads, is_leaf=is_sparse), total


def clip_grad_value(grads: Any, clip_value: Any) -> Any:
    """Clamp every gradient to ``[-clip_value, clip_value]``, real and imaginary parts by themselves.

    Duplicates of a sparse gradient (``BCOO``) are summed before.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> print(optim.clip_grad_value({"w": jnp.array([3.0, -0.5])}, 1.0)["w"])
    [ 1.  -0.5]
    """

    def clamp(grad: Array) -> Array:
        if jnp.iscomplexobj(grad):
            return jax.lax.complex(clamp(jnp.real(grad)), clamp(jnp.imag(grad)))
        return jnp.clip(grad, -clip_value, clip_value).astype(grad.dtype)

    return jax.tree.map(lambda grad: over_values(clamp, coalesced(grad)), grads, is_leaf=is_sparse)


def clip_grad_norm_(
    parameters: Iterable[Parameter] | Parameter | Optimizer,
    max_norm: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Array:
    """:func:`clip_grad_norm` on ``Parameter.grad``; returns the norm before.

    Args:
      parameters: boxes, or an optimizer, whose every gradient is taken.
      max_norm: a number or scalar array, at least 0.
      norm_type: the order of the norm, positive; may be ``inf``.
      error_if_nonfinite: raise where the norm is NaN or infinite, before anything changes.

    Raises:
      RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

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


def clip_grad_value_(parameters: Iterable[Parameter] | Parameter | Optimizer, clip_value: Any) -> None:
    """:func:`clip_grad_value` on ``Parameter.grad``."""
    boxes = _boxes(parameters)
    for box, grad in zip(boxes, clip_grad_value([box.grad for box in boxes], clip_value), strict=True):
        box.grad = grad


def _boxes(parameters: Iterable[Parameter] | Parameter | Optimizer) -> list[Parameter]:
    if isinstance(parameters, Optimizer):
        parameters = [box for group in parameters.param_groups for box in group["params"]]
    boxes = [parameters] if isinstance(parameters, Parameter) else list(parameters)
    return [box for box in boxes if box.grad is not None]


def _wide(grad: Any) -> Any:
    """The real dtype to compute in."""
    return jnp.promote_types(jnp.real(grad).dtype, jnp.float32)
