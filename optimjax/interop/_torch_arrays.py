"""Arrays between PyTorch, NumPy and JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimjax._core.containers import not_deleted
from optimjax._core.foreign import from_tensor

__all__ = ["as_array", "as_tensors", "is_array"]


def is_array(value: Any) -> bool:
    """Whether this is an array of PyTorch, NumPy or JAX, or a parameter or variable."""
    if getattr(value, "__jax_array__", None) is not None:
        return True
    return hasattr(value, "detach") or isinstance(value, (np.ndarray, np.generic, jax.Array))


def as_array(value: Any) -> Any:
    """The array of a PyTorch tensor, a parameter or a variable; what is one of NumPy or JAX stays it."""
    value = not_deleted(from_tensor(value))
    held = getattr(value, "__jax_array__", None)  # which a tracer has, too, as None
    return value if held is None else held()


def as_tensors(value: Any) -> Any:
    """Nested containers with tensors of PyTorch, which have memory of their own, in place of arrays.

    Raises:
      ImportError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("tensors need PyTorch: pip install torch; tensors=False gives NumPy arrays") from error
    if isinstance(value, dict):
        return {key: as_tensors(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_tensors, value))
    if not is_array(value):
        return value
    array = np.array(as_array(value))
    if array.dtype == jnp.bfloat16:  # which NumPy's own dtypes lack
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
