"""Differentiate a loss function with respect to parameters, in one compiled program."""

from collections.abc import Callable
from typing import Any

import jax

from optimjax._engine.bucket import StepStructure, update_each
from optimjax._engine.loss_call import CallStructure

__all__ = ["update_from_loss", "value_and_grad"]


def _evaluate(loss_fn: Callable[..., Any], call: CallStructure, has_aux: bool, differentiated: Any, traced: Any) -> Any:
    def compute(differentiated: Any) -> Any:
        arguments, modules = call.arguments(differentiated, traced)
        result = loss_fn(*arguments)
        count = len(result) if isinstance(result, (tuple, list)) else 1
        if has_aux and count != 2:
            raise TypeError(f"with has_aux=True the loss function must return (loss, aux), two results, got {count}")
        loss, aux = result if has_aux else (result, None)
        if not hasattr(loss, "dtype") and not isinstance(loss, (int, float)):
            raise TypeError(
                f"the loss function must return a scalar, got a {type(loss).__name__}; what else it returns "
                "is for backward(..., has_aux=True)"
            )
        # Within a derivative, what depends on a parameter is a tracer of the same kind.
        if not isinstance(loss, type(differentiated[0])):
            raise RuntimeError(
                "the loss depends on none of the parameters, so nothing would be trained: compute it from what the "
                "function is given, not from a model or arrays outside of it"
            )
        return loss, (aux, *call.after(modules, differentiated, traced))

    (loss, (aux, params, changed)), grads = jax.value_and_grad(compute, has_aux=True)(differentiated)
    # Compared out here, because inside of a derivative an array that went through nnx.jit is another tracer.
    written = {index: value for index, value in params.items() if value is not differentiated[index]}
    return loss, aux, changed, written, grads


def value_and_grad(
    loss_fn: Callable[..., Any],
    call: CallStructure,
    has_aux: bool,
    differentiated: Any,
    traced: Any,
    accumulated: Any,
) -> Any:
    """``(loss, aux, changed, written, gradients)``: see :meth:`optimjax._engine.loss_call.LossCall.write_back`.

    The gradients are added to those accumulated so far (``None``: none yet). ``written`` has those parameters only that
    the loss writes into, which tracing tells: where there are none, it costs nothing.
    """
    loss, aux, changed, written, grads = _evaluate(loss_fn, call, has_aux, differentiated, traced)
    with jax.numpy_dtype_promotion("standard"):  # a gradient that the user has set may be of another precision
        total = [grad if old is None else old + grad for grad, old in zip(grads, accumulated, strict=True)]
    return loss, aux, changed, written, total


def update_from_loss(
    loss_fn: Callable[..., Any],
    call: CallStructure,
    step: StepStructure,
    slots: list[Any],
    differentiated: Any,
    traced: Any,
    rows: list[Any],
) -> Any:
    """Value, gradient and update in one program.

    Args:
      loss_fn: the loss function.
      call: of it.
      step: the structure of the buckets, and which of the parameters are in each.
      slots: of each bucket.
      differentiated: the arrays of parameters.
      traced: the other arrays of the call.
      rows: of each bucket, its scalars.

    Returns:
      The slots of each bucket, the parameters of each bucket, the loss, and what it has changed in modules. The slots
      come first, see :func:`optimjax._engine.bucket.update_each`.
    """
    loss, _, changed, written, grads = _evaluate(loss_fn, call, False, differentiated, traced)
    params = [written.get(index, param) for index, param in enumerate(differentiated)]
    updated = [
        update_each(bucket, kept, [params[i] for i in positions], [grads[i] for i in positions], row)
        for bucket, positions, kept, row in zip(step.buckets, step.positions, slots, rows, strict=True)
    ]
    return [new for new, _ in updated], [new for _, new in updated], loss, changed
