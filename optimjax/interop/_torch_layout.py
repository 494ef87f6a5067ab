"""How one array of PyTorch becomes one array of ours, or several, and comes back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Layout", "LayoutLike", "Parts", "ambiguous", "join", "parts_of", "split", "torch_shape_of"]

Axis = int | tuple[int, ...]  # the size of an axis, or the sizes of ours that it is


@dataclass(frozen=True)
class Layout:
    """Where the elements of an array of PyTorch are in ours; the same value serves both directions.

    Attributes:
      name: our name of the parameter; ``None`` if it is PyTorch's.
      axes: the permutation that turns PyTorch's array into ours, as ``numpy.transpose`` takes it; ``None`` keeps it.
      shape: that of PyTorch's array. In place of a size, a tuple says that this axis is several of ours: ``((8, 64),
        512)`` is a matrix of 512 rows for each of 8 heads. They count as axes of their own in ``axes``. ``None`` if no
        axis is split; only LBFGS, which keeps all parameters in one vector, then needs it.
      flip: axes of ours along which the order is reversed.

    >>> import numpy as np
    >>> from optimjax.interop.torch import Layout
    >>> Layout("fc.kernel", axes=(1, 0)).to_ours(np.ones((10, 32))).shape
    (32, 10)
    """

    name: str | None = None
    axes: tuple[int, ...] | None = None
    shape: tuple[Axis, ...] | None = None
    flip: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.axes is not None and sorted(self.axes) != list(range(len(self.axes))):
            raise ValueError(f"axes of a layout must be a permutation of 0, 1, ..., got {self.axes}")
        if self.axes is not None and self.shape is not None and len(self.axes) != len(self.sizes or ()):
            raise ValueError(f"a layout has {len(self.axes)} axes for the shape {self.shape}")

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The shape with split axes apart."""
        if self.shape is None:
            return None
        return tuple(size for axis in self.shape for size in (axis if isinstance(axis, tuple) else (axis,)))

    @property
    def torch_shape(self) -> tuple[int, ...] | None:
        """The shape of PyTorch's array."""
        if self.shape is None:
            return None
        return tuple(math.prod(axis) if isinstance(axis, tuple) else axis for axis in self.shape)

    @property
    def our_shape(self) -> tuple[int, ...] | None:
        """The shape of ours."""
        sizes = self.sizes
        return sizes if sizes is None or self.axes is None else tuple(sizes[axis] for axis in self.axes)

    @property
    def keeps_axes(self) -> bool:
        """Whether each axis stays one axis, wherever it goes."""
        return self.shape is None or all(isinstance(axis, int) for axis in self.shape)

    def to_ours(self, array: Any) -> Any:
        """PyTorch's array, of NumPy or JAX, as ours.

        Raises:
          ValueError: it has another shape than the layout.
        """
        if self.torch_shape is not None and self.torch_shape != array.shape:
            raise ValueError(f"has shape {tuple(array.shape)}, its layout {self.torch_shape}")
        if self.sizes is not None:
            array = array.reshape(self.sizes)
        return self._flipped(self._transposed(array, self.axes))

    def to_torch(self, array: Any) -> Any:
        """Our array as PyTorch's.

        Raises:
          ValueError: it has another shape than the layout.
        """
        if self.our_shape is not None and self.our_shape != array.shape:
            raise ValueError(f"has shape {tuple(array.shape)}, its layout {self.our_shape}")
        back = None if self.axes is None else tuple(self.axes.index(axis) for axis in range(len(self.axes)))
        array = self._transposed(self._flipped(array), back)
        return array if self.torch_shape is None else array.reshape(self.torch_shape)

    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Where the rows and columns of PyTorch's matrix are in our array, from its end; ``None`` if they stay.

        Raises:
          ValueError: PyTorch's array is not a matrix.
        """
        if len(self.shape or self.axes or (0, 0)) != 2:
            raise ValueError("is not a matrix in PyTorch")
        if self.axes in (None, (0, 1)) and self.keeps_axes:
            return None
        first = self.shape[0] if self.shape else 1
        rows = len(first) if isinstance(first, tuple) else 1
        sizes = self.sizes or (1, 1)
        axes = self.axes or tuple(range(len(sizes)))
        places = tuple(axes.index(axis) - len(axes) for axis in range(len(axes)))
        return places[:rows], places[rows:]

    def _transposed(self, array: Any, axes: tuple[int, ...] | None) -> Any:
        if axes is None:
            return array
        if len(axes) != array.ndim:
            raise ValueError(f"has shape {tuple(array.shape)}, its layout the axes {self.axes}")
        return array.transpose(axes)

    def _flipped(self, array: Any) -> Any:
        where = tuple(slice(None, None, -1) if axis in self.flip else slice(None) for axis in range(array.ndim))
        return array[where] if self.flip else array


Parts = tuple[Layout, ...]  # into which PyTorch's array falls along its first axis, all of one size
LayoutLike = Layout | Sequence[int] | Sequence[Layout] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | None


def parts_of(value: Any, name: str) -> Parts:
    """What a user gives as the layout of a parameter, also as JSON has it: one, its axes alone, or several.

    Raises:
      TypeError: it is something else; the message names the parameter.
      ValueError: the axes are not a permutation.
    """
    try:
        if value is None:
            return (Layout(),)
        if isinstance(value, Layout):
            return (value,)
        if isinstance(value, Mapping):
            return (Layout(**{key: _tuples(entry) for key, entry in value.items()}),)
        if isinstance(value, (list, tuple)):
            if value and all(isinstance(axis, int) for axis in value):
                return (Layout(axes=tuple(value)),)
            if all(isinstance(part, (Layout, Mapping)) for part in value):
                return tuple(parts_of(part, name)[0] for part in value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the layout of {name!r}: {error}") from None
    raise TypeError(
        f"the layout of {name!r} must be None, a tuple of axes, a Layout or a tuple of Layouts, got {value!r}"
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def split(parts: Parts, array: Any) -> list[Any]:
    """PyTorch's array as ours, one for each part.

    Raises:
      ValueError: it does not fit; the message is to follow a name.
    """
    if len(parts) < 2:
        return [part.to_ours(array) for part in parts]
    if not array.ndim or array.shape[0] % len(parts):
        raise ValueError(f"has shape {tuple(array.shape)}, which does not fall into {len(parts)} parts")
    size = array.shape[0] // len(parts)
    return [part.to_ours(array[index * size : (index + 1) * size]) for index, part in enumerate(parts)]


def join(parts: Parts, arrays: Sequence[Any]) -> Any:
    """What :func:`split` came from."""
    theirs = [part.to_torch(array) for part, array in zip(parts, arrays, strict=True)]
    if len(theirs) == 1:
        return theirs[0]
    return (jnp if isinstance(theirs[0], jax.Array) else np).concatenate(theirs)


def torch_shape_of(parts: Parts) -> tuple[int, ...] | None:
    """The shape of PyTorch's whole array, where the layout says it."""
    shapes = [part.torch_shape for part in parts]
    if not shapes or shapes[0] is None:
        return None
    return shapes[0] if len(shapes) == 1 else (len(shapes) * shapes[0][0], *shapes[0][1:])


def ambiguous(shape: Sequence[int]) -> bool:
    """Whether an array of this shape fits its place with two of its axes exchanged, too."""
    sizes = [size for size in shape if size != 1]
    return len(set(sizes)) < len(sizes)
