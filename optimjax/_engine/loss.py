"""Differentiate a loss function with respect to parameters, in one compiled program."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optimjax._core.guard import Guard, unless_skipped
from optimjax._core.numerics import at_least_float32, widened
from optimjax._engine.bucket import StepStructure, update_each
from optimjax._engine.loss_call import CallStructure
from optimjax._storage.placement import divided

__all__ = ["Packed", "evaluate", "packed", "unpacked", "update_from_loss", "value_and_grad"]

# The loss, what it returns in addition, what it changes in modules, what it writes into parameters (by index: only
# those that it writes into, which tracing tells, so that it costs nothing where there are none), the gradients.
Evaluated = tuple[Any, Any, list[Array], dict[int, Array], list[Any]]


class Structure:
    """The structure of a tree, as the key of a dict: it is compared by identity, which runs no Python code."""

    def __init__(self, treedef: Any):
        self.treedef = treedef


Packed = dict[Structure, list[Any]]  # a tree of any nodes on its way out of a program, which returns plain ones


def packed(tree: Any) -> Packed:
    """The tree, packed."""
    leaves, treedef = jax.tree.flatten(tree)
    return {Structure(treedef): leaves}


def unpacked(tree: Packed) -> Any:
    """The tree."""
    ((structure, leaves),) = tree.items()
    return jax.tree.unflatten(structure.treedef, leaves)


def evaluate(loss_fn: Callable[..., Any], call: CallStructure, differentiated: Any, traced: Any) -> Evaluated:
    """Value and gradient of a loss, in as many parts as the call has micro-batches."""
    if call.micro_batches == 1:
        return _evaluate(loss_fn, call, differentiated, traced)
    return _in_micro_batches(loss_fn, call, list(differentiated), traced)


def _evaluate(loss_fn: Callable[..., Any], call: CallStructure, differentiated: Any, traced: Any) -> Evaluated:
    def compute(differentiated: Any) -> Any:
        args, kwargs, modules = call.arguments(differentiated, traced)
        result = loss_fn(*args, **kwargs)
        count = len(result) if isinstance(result, (tuple, list)) else 1
        if call.has_aux and count != 2:
            raise TypeError(f"with has_aux=True the loss function must return (loss, aux), two results, got {count}")
        loss, aux = result if call.has_aux else (result, None)
        if not hasattr(loss, "dtype") and not isinstance(loss, (int, float)):
            raise TypeError(
                f"the loss function must return a scalar, got a {type(loss).__name__}; what else it returns "
                "is for has_aux=True"
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


def _in_micro_batches(
    loss_fn: Callable[..., Any], call: CallStructure, differentiated: list[Array], traced: Any
) -> Evaluated:
    """The mean of losses and of gradients over the parts of the batch, one after the other.

    What a part changes in modules and parameters, the next one begins with. Sums are kept in float32 at least.
    """
    parts = {
        index: divided(traced[index], call.micro_batches, call.pin(index))
        for index in call.divided
        if jnp.ndim(traced[index]) or jnp.issubdtype(traced[index].dtype, jax.dtypes.prng_key)
    }
    changing = call.changing

    def one(written: Mapping[int, Array], changed: list[Array], part: Mapping[int, Array]) -> Evaluated:
        params = [written.get(index, param) for index, param in enumerate(differentiated)]
        arrays = list(traced)
        for index, array in (*zip(changing, changed, strict=True), *part.items()):
            arrays[index] = array
        loss, aux, after, new, grads = _evaluate(loss_fn, call, params, arrays)
        _check_kept(changed, after)
        return loss, aux, after, {**written, **new}, grads

    def next_one(carry: Any, part: Any) -> Any:
        loss, written, changed, grads = carry
        value, aux, changed, written, found = one(written, changed, part)
        return (loss + widened(value), written, changed, jax.tree.map(lambda a, b: a + widened(b), grads, found)), aux

    # A part that is only traced tells the kind of the loss, and which parameters are written into.
    first = jax.tree.map(lambda array: array[0], parts)
    at_first = [traced[index] for index in changing]
    kind, _, _, some, _ = jax.eval_shape(one, {}, at_first, first)
    written = {index: differentiated[index] for index in some}
    sums = [jnp.zeros_like(widened(param)) for param in differentiated]
    start = jnp.zeros((), at_least_float32(kind.dtype)), written, at_first, sums
    (loss, written, changed, grads), aux = jax.lax.scan(next_one, start, parts)
    mean = [grad / call.micro_batches for grad in grads]
    return (loss / call.micro_batches).astype(kind.dtype), aux, changed, written, mean


def _check_kept(before: list[Array], after: list[Array]) -> None:
    for old, new in zip(before, after, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                f"the loss function puts {new.dtype}{list(new.shape)} into a variable of a module that has "
                f"{old.dtype}{list(old.shape)}: with micro_batches the next part begins with it, so it must stay alike"
            )


def value_and_grad(
    loss_fn: Callable[..., Any], call: CallStructure, differentiated: Any, traced: Any, accumulated: Any
) -> Evaluated:
    """As :func:`evaluate`; the gradients are added to those accumulated so far (``None``: none yet)."""
    loss, aux, changed, written, grads = evaluate(loss_fn, call, differentiated, traced)
    with jax.numpy_dtype_promotion("standard"):  # a gradient that the user has set may be of another precision
        total = [grad if old is None else old + grad for grad, old in zip(grads, accumulated, strict=True)]
    return loss, aux, changed, written, total


def update_from_loss(
    loss_fn: Callable[..., Any],
    call: CallStructure,
    step: StepStructure,
    skips: bool,
    slots: list[Any],
    differentiated: Any,
    traced: Any,
    rows: list[Any],
    limit: Any,
) -> Any:
    """Value, gradient and update in one program.

    Args:
      loss_fn: the loss function.
      call: of it.
      step: the structure of the buckets, and which of the parameters are in each.
      skips: whether a step whose gradients are not finite changes nothing.
      slots: of each bucket.
      differentiated: the arrays of parameters.
      traced: the other arrays of the call.
      rows: of each bucket, its scalars.
      limit: the largest norm of all gradients, or ``None``.

    Returns:
      The slots of each bucket, the parameters of each bucket, the loss and what comes with it, packed, what it has
      changed in modules, the norm and whether the step counts. The slots come first, see
      :func:`optimjax._engine.bucket.update_each`.
    """
    loss, aux, changed, written, grads = evaluate(loss_fn, call, differentiated, traced)
    limits = Guard(limit, skips).limits(grads)
    params = list(differentiated)
    for index, value in written.items():
        params[index] = unless_skipped(limits.counts, value, params[index])
    updated = [
        update_each(bucket, kept, [params[i] for i in positions], [grads[i] for i in positions], row, limits)
        for bucket, positions, kept, row in zip(step.buckets, step.positions, slots, rows, strict=True)
    ]
    new_slots, new_params = [new for new, _ in updated], [new for _, new in updated]
    return new_slots, new_params, loss, packed(aux), changed, limits.norm, limits.counts
