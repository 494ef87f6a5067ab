"""What an optimizer has seen of its gradients, and the numbers of a step whose count nobody has waited for."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax._core.definition import Definition
from optimjax._core.guard import counted
from optimjax._engine.interned import interned

__all__ = ["Watch", "after", "from_here", "scalars_at"]


class Watch:
    """What an optimizer has seen of its gradients; arrays that nobody has waited for.

    Attributes:
      norm: of the gradients of the last step, all together; ``None`` where none was measured.
      skipped: how many steps were skipped.
    """

    def __init__(self) -> None:
        self.norm: Array | None = None
        self.skipped: Array | int = 0


def from_here(skipped: Any) -> Array:
    """The number of skipped steps, on whatever device the next one runs. This waits for the last step."""
    return skipped if isinstance(skipped, Tracer) else jnp.asarray(int(skipped), jnp.int32)


after = jax.jit(counted)


class _Structure:
    """What is compiled in where scalars are computed on the device. Equal ones are one object."""

    def __init__(self, definition: Definition, rows: tuple[tuple[Any, Any], ...], dtype: Any):
        self.definition, self.rows, self.dtype = definition, rows, dtype


def scalars_at(
    definition: Definition, rows: Sequence[tuple[int, Any, Any]], skipped: Array, before: Array
) -> Array | list[Any]:
    """Rows of scalars for the next update, where the number of updates done is on the device.

    They are computed in double precision, as they are from Python numbers, so that skipping none changes nothing.

    Args:
      definition: the algorithm.
      rows: for each its hyperparameters and flags, after the number of the update if none had been skipped.
      skipped: how many were skipped so far.
      before: how many of these before the first update that the numbers count.
    """
    numeric = definition.hyperparameters.numeric
    numbers, structures = zip(
        *(jax.tree.flatten([getattr(hyper, name) for name in numeric]) for _, hyper, _ in rows), strict=True
    )
    counts = [count for count, _, _ in rows]
    structure = interned(
        _Structure,
        definition,
        tuple((flags, treedef) for (_, _, flags), treedef in zip(rows, structures, strict=True)),
        jnp.dtype(jnp.result_type(float)),
    )
    if any(isinstance(value, Tracer) for value in jax.tree.leaves((numbers, skipped, before))):
        return _scalars(structure, numbers, counts, skipped, before)  # the facade inside a `jit`
    with _double_precision():
        return _compiled(structure, numbers, np.array(counts, float), skipped, before)


def _scalars(structure: _Structure, numbers: Any, counts: Any, skipped: Array, before: Array) -> Array:
    definition, wide = structure.definition, jnp.result_type(float)
    done, rows = (skipped - before).astype(wide), []
    for values, count, (flags, treedef) in zip(numbers, counts, structure.rows, strict=True):
        named = dict(zip(definition.hyperparameters.numeric, treedef.unflatten(values), strict=True))
        hyper = definition.hyperparameters.hyper(flags._asdict() | named)
        rows.append([jnp.asarray(one, wide) for one in definition.arithmetic.scalars(count - done, hyper)])
    return jnp.array(rows, structure.dtype)


_compiled = jax.jit(_scalars, static_argnums=0)
_double_precision = functools.partial(
    jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64,  # pyright: ignore
    True,
)
