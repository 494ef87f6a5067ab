"""Where the matrices of an array are, and how those of many arrays are worked on together.

Algorithms for matrices, such as Muon, share it: which axes are rows and columns, and how a fused kernel falls into
blocks, is the same question for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._storage.placement import automatic
from optimjax.rule import Structural

__all__ = ["ELEMENTS", "Axes", "Blocks", "Layout", "together"]

T = TypeVar("T")

ELEMENTS = 2**20  # of the arrays that are worked on together; benchmarks/muon_iteration.py measures it


def _axes(name: str, value: Any) -> None:
    pair = (
        isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, (tuple, list)) for part in value)
    )
    if value is not None and not (pair and all(isinstance(axis, int) for part in value for axis in part)):
        raise ValueError(f"{name} must be None or a pair of tuples of axes, (rows, columns), got {value!r}")


def _blocks(name: str, value: Any) -> None:
    sizes = value if isinstance(value, (tuple, list)) and value else [value]
    if value is not None and not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(
            f"{name} must be None, a number of blocks or a tuple of their rows, all above 0, got {value!r}"
        )


Axes = Annotated[tuple[tuple[int, ...], tuple[int, ...]] | None, Structural(_axes, of_parameters=True)]
Blocks = Annotated[int | tuple[int, ...] | None, Structural(_blocks, of_parameters=True)]


class Layout:
    """Where the matrices are in an array.

    Args:
      shape: of the array.
      axes: ``(rows, columns)``, two tuples of axes, each of which is merged in its order; other axes are a batch.
        ``None`` is ``((0,), (1,))``.
      blocks: into which the rows are split: a number of equal ones, or a tuple with the rows of each; ``None`` for one.

    Attributes:
      columns: of each matrix.
      heights: the rows of each block, from the first row to the last.

    Raises:
      ValueError: the axes are not different axes of the array, or the blocks are not all of its rows.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        blocks: int | tuple[int, ...] | None = None,
    ):
        ndim = len(shape)
        rows, columns = axes or ((0,), (1,))
        named = [axis % ndim for axis in rows + columns if -ndim <= axis < ndim]
        if len(set(named)) < len(rows + columns):
            raise ValueError(f"matrix_axes must name different axes of the parameter, got {axes} for shape {shape}")
        batch = [axis for axis in range(ndim) if axis not in named]
        self._order = batch + named
        self._back = [self._order.index(axis) for axis in range(ndim)]
        self._moved = [shape[axis] for axis in self._order]
        self._batch = self._moved[: len(batch)]
        self._rows = self._moved[len(batch) : len(batch) + len(rows)]
        self.columns = math.prod(shape[axis] for axis in columns)
        self.heights = _heights(math.prod(self._rows), blocks, shape)

    @property
    def _rows_of(self) -> dict[int, list[slice]]:
        """For each height of a block the rows of its blocks."""
        rows: dict[int, list[slice]] = {}
        start = 0
        for height in self.heights:
            rows.setdefault(height, []).append(slice(start, start + height))
            start += height
        return rows

    def matrices(self, array: Array) -> list[Array]:
        """The array as batches of matrices, one for each height: each of shape (..., height, columns)."""
        whole = array.transpose(self._order).reshape(*self._batch, sum(self.heights), self.columns)
        if len(self._rows_of) == 1:
            return [whole.reshape(*self._batch, *self._count, self.heights[0], self.columns)]
        return [jnp.stack([whole[..., rows, :] for rows in part], axis=-3) for part in self._rows_of.values()]

    def array(self, matrices: Sequence[Array]) -> Array:
        """The array that these are the matrices of."""
        if len(matrices) == 1:
            (whole,) = matrices
        else:
            found = {
                rows.start: batch[..., index, :, :]
                for batch, part in zip(matrices, self._rows_of.values(), strict=True)
                for index, rows in enumerate(part)
            }
            whole = jnp.concatenate([found[start] for start in sorted(found)], axis=-2)
        return whole.reshape(self._moved).transpose(self._back)

    def numbers(self, of: Callable[[int, int], float]) -> float | np.ndarray:
        """``of(rows, columns)`` of the matrices: one number for all, or an array that broadcasts against the array."""
        each = [of(height, self.columns) for height in self.heights]
        if len(set(each)) == 1:
            return each[0]
        columns = len(self._moved) - len(self._batch) - len(self._rows)
        moved = np.repeat(each, self.heights).reshape([1] * len(self._batch) + self._rows + [1] * columns)
        return moved.transpose(self._back)

    @property
    def _count(self) -> list[int]:
        """The axis of equal blocks: none where there is one block, so that a matrix alone has no batch axis."""
        return [len(self.heights)] if len(self.heights) > 1 else []


def _heights(rows: int, blocks: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rows of each block."""
    if blocks is None:
        return (rows,)
    if isinstance(blocks, int):
        if rows % blocks:
            raise ValueError(f"blocks={blocks} must divide the rows, which are {rows} for shape {shape}")
        return (rows // blocks,) * blocks
    if sum(blocks) != rows:
        total = " + ".join(map(str, blocks))
        raise ValueError(f"blocks={blocks} must be all rows: {total} is {sum(blocks)}, not {rows}, for shape {shape}")
    return blocks


def together(function: Callable[[Array, T], Array], arrays: list[Array], scalars: list[T]) -> Iterator[Array]:
    """``function(array, scalars)`` of each array, mapped over as many arrays as stay in the cache.

    Args:
      function: of one array and its scalars; the result has the array's shape.
      arrays: of one shape and dtype.
      scalars: for each array a tree of arrays.

    Yields:
      The result for each array.
    """
    count = max(1, ELEMENTS // arrays[0].size)
    if count == 1 or len(arrays) == 1:  # without an axis of one element, there is less to compile
        yield from map(automatic(function, arrays[0]), arrays, scalars)
        return
    for start in range(0, len(arrays), count):
        part = slice(start, start + count)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(arrays[part], scalars[part], strict=True))
        yield from automatic(jax.vmap(function), stacked[0])(*stacked)
