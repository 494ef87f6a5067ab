"""Sparse gradients: ``jax.experimental.sparse.BCOO``, which names the entries of an array that a step touches.

An entry is a row of an embedding table (``n_sparse=1``), or with more sparse axes a part of a row, down to one element.
"""

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.numerics import widened

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

__all__ = ["Entries", "addressed", "coalesced", "is_sparse", "over_values", "zeros_like"]


def is_sparse(x: Any) -> "TypeGuard[BCOO]":
    """Whether this is a BCOO; ``jax.experimental.sparse`` is slow to import, and where one is, somebody has done so."""
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(x, module.BCOO)


def addressed(grad: Any) -> int:
    """How many positions :class:`Entries` counts: those of the array, and what it may need behind its end."""
    return math.prod(grad.shape[: grad.n_sparse]) + grad.nse


class Entries:
    """The entries that a sparse gradient names, each once, in order, and their gradients.

    There are as many as the gradient has, whatever their indices, so that shapes are static. Those left over by
    duplicates and padding lie behind the end of the array, where zeros are read and nothing is written.

    Attributes:
      index: their positions along the sparse axes, taken as one; int of shape ``(nse,)``.
      values: their gradients, those of duplicates summed, zero behind the end; like the gradient's ``data``, but
        float32 at least.
    """

    def __init__(self, grad: Any):
        sizes = grad.shape[: grad.n_sparse]
        self.count = count = math.prod(sizes)
        # Of shape [1, sparse axes], as indices are.
        self._strides = np.array([[math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]], int)
        self._sizes = np.array([sizes], int)
        nse = grad.nse if count else 0  # all is padding where there is nothing, which JAX cannot gather from
        data, indices = grad.data[:nse], _signed(grad.indices[:nse])
        indices = jnp.where(indices < 0, indices + self._sizes, indices)  # negative ones count from the end
        inside = jnp.all((indices >= 0) & (indices < self._sizes), axis=-1)
        flat = jnp.where(inside, jnp.sum(indices * self._strides, axis=-1), count)
        distinct, position = jnp.unique(flat, return_inverse=True, size=nse, fill_value=count)
        # Behind the end, too, each index occurs once, or it would be wrong to call them unique.
        self.index = jnp.where(distinct < count, distinct, count + jnp.arange(nse))
        data = widened(data)
        self.values = jnp.zeros_like(data).at[jnp.where(inside, position, nse)].add(data, mode="drop")

    def take(self, array: Array) -> Array:
        """The entries of a dense array of the gradient's shape."""
        return self._of(array).get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    def put(self, array: Array, entries: Array) -> Array:
        """The array with these entries in place of its own: in place, where its memory is free."""
        updated = self._of(array).set(entries, mode="drop", indices_are_sorted=True, unique_indices=True)
        return updated.reshape(array.shape)

    def _of(self, array: Array) -> Any:
        return array.reshape(self.count, *self.values.shape[1:]).at[self.index]

    def columns(self) -> Array:
        """The index along each sparse axis: of shape ``(nse, n_sparse)``."""
        columns = self.index[:, None] // self._strides
        return columns.at[:, 1:].set(columns[:, 1:] % self._sizes[:, 1:])  # the first one may stay behind the end


def _signed(indices: Array) -> Array:
    """Indices as JAX's default integers; what these cannot hold stays beyond the end."""
    dtype = jnp.result_type(int)
    largest = jnp.iinfo(dtype).max
    if jnp.iinfo(indices.dtype).max > largest:
        indices = jnp.minimum(indices, largest)
    return indices.astype(dtype)


def coalesced(grad: Any) -> Any:
    """The same gradient; a sparse one names each entry once."""
    if not is_sparse(grad):
        return grad
    entries = Entries(grad)
    data, indices = entries.values.astype(grad.dtype), entries.columns()
    return type(grad)((data, indices), shape=grad.shape, indices_sorted=True, unique_indices=True)


def over_values(function: Callable[[Array], Array], grad: Any) -> Any:
    """The function of a dense gradient, or of a sparse one's values."""
    if not is_sparse(grad):
        return function(grad)
    flags = dict(indices_sorted=grad.indices_sorted, unique_indices=grad.unique_indices)
    return type(grad)((function(grad.data), grad.indices), shape=grad.shape, **flags)


def zeros_like(grad: Any) -> Any:
    """Zeros; of a sparse gradient one that names nothing, as in PyTorch."""
    if not is_sparse(grad):
        return jnp.zeros_like(grad)
    return type(grad)((grad.data[:0], grad.indices[:0]), shape=grad.shape)
