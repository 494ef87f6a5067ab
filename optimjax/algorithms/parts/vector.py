"""All parameters as one vector, for algorithms that need them together."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from optimjax._core.numerics import at_least_float32
from optimjax._storage.placement import explicit, resharded

__all__ = ["Layout", "dot", "largest"]


@dataclass(frozen=True)
class Layout:
    """How parameters lie in one real vector: side by side, a complex one as pairs (real, imaginary), as in PyTorch.

    Attributes:
      shapes, dtypes: of each parameter.
      shardings: of each parameter, where it is part of its type: on a mesh with explicit axes.
      moving: which of them are optimized, in the order in which their arrays are handed around. The elements of the
        others are in the vector, too, and zero.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    shardings: tuple[Any, ...]
    moving: tuple[int, ...]

    @classmethod
    def of(cls, arrays: Sequence[Array], moving: Sequence[int] | None = None) -> "Layout":
        """The layout of parameters; all of them move unless it is said which."""
        return cls(
            tuple(array.shape for array in arrays),
            tuple(array.dtype for array in arrays),
            tuple(map(explicit, arrays)),
            tuple(range(len(arrays)) if moving is None else moving),
        )

    @functools.cached_property
    def dtype(self) -> Any:
        """Of the vector: the widest of the parameters, at least float32."""
        return max(
            (at_least_float32(_real(dtype)) for dtype in self.dtypes),
            key=lambda dtype: dtype.itemsize,
            default=jnp.dtype(jnp.float32),
        )

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Where each parameter begins, and after them the end."""
        sizes = [
            math.prod(shape) * (2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return [0, *itertools.accumulate(sizes)]

    @property
    def size(self) -> int:
        """Number of elements of the vector."""
        return self.offsets[-1]

    def flatten(self, arrays: Sequence[Array]) -> Array:
        """The vector ``[size]`` of arrays like those parameters that move."""
        parts = [jnp.zeros(end - start, self.dtype) for start, end in itertools.pairwise(self.offsets)]
        for index, array in zip(self.moving, arrays, strict=True):
            if jnp.iscomplexobj(array):
                array = jnp.stack([array.real, array.imag], axis=-1)
            parts[index] = jnp.ravel(_whole(array)).astype(self.dtype)
        return jnp.concatenate(parts)

    def unflatten(self, vector: Array) -> list[Array]:
        """The arrays that a vector is made of, in the parameters' dtypes."""
        arrays = []
        for index in self.moving:
            array = vector[self.offsets[index] : self.offsets[index + 1]]
            if jnp.issubdtype(self.dtypes[index], jnp.complexfloating):
                array = jax.lax.complex(array[::2], array[1::2])
            array = array.reshape(self.shapes[index]).astype(self.dtypes[index])
            arrays.append(resharded(array, self.shardings[index]))
        return arrays

    def rounded(self, vector: Array) -> Array:
        """The vector with each element as exact as its parameter is."""
        if all(_real(dtype) == self.dtype for dtype in self.dtypes):
            return vector
        return self.flatten(self.unflatten(vector))


def dot(a: Array, b: Array) -> Array:
    """Inner product in full precision, which accelerators do not use unless told to."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def largest(x: Array) -> Array:
    """Largest absolute element, 0 where there is none."""
    return jnp.max(jnp.abs(x), initial=0)


def _whole(array: Array) -> Array:
    """The same, whole on each device of a mesh with explicit axes; other axes are the compiler's."""
    sharding = explicit(array)
    spec = PartitionSpec(*[None] * array.ndim)
    return array if sharding is None else resharded(array, NamedSharding(sharding.mesh, spec))


def _real(dtype: Any) -> Any:
    """The dtype of the real part."""
    return jnp.finfo(dtype).dtype
