"""Objects of libraries that may not be installed, or not imported: ``flax.nnx`` and PyTorch.

Only where somebody has imported such a library can an object be one of its own, so nothing is imported here.
"""

import sys
from collections.abc import Iterator, ValuesView
from typing import Any

import jax
import jax.numpy as jnp

from optimjax._core.versions import check_version

__all__ = ["OPAQUE", "from_tensor", "holds_nnx", "is_nnx", "is_torch_module", "is_variable", "nnx"]

OPAQUE = (Iterator, ValuesView)  # what JAX warns of where it takes it for a leaf


def nnx() -> Any:
    """``flax.nnx`` if anyone has imported it, else ``None``: only then can an object be one of its modules."""
    return sys.modules.get("flax.nnx")


def is_variable(x: Any) -> bool:
    """Whether this is a ``flax.nnx`` variable."""
    return nnx() is not None and isinstance(x, nnx().Variable) and _is_new_enough()


def is_nnx(x: Any) -> bool:
    """Whether this is a ``flax.nnx`` module, container or variable."""
    return nnx() is not None and isinstance(x, (nnx().Pytree, nnx().Variable)) and _is_new_enough()


def _is_new_enough() -> bool:
    """Raise for a Flax whose modules work otherwise; nobody who has none of them needs to hear of it."""
    check_version("flax")
    return True


def holds_nnx(tree: Any) -> bool:
    """Whether there are such objects in a tree."""
    return any(map(is_nnx, jax.tree.leaves(tree, is_leaf=lambda x: is_nnx(x) or isinstance(x, OPAQUE))))


def is_torch_module(x: Any) -> bool:
    """Whether this is a module of PyTorch, which is looked for only if somebody has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.nn.Module)


def from_tensor(x: Any) -> Any:
    """The array of a PyTorch tensor; anything else as it is."""
    if not hasattr(x, "detach"):
        return x
    tensor = x.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16, which NumPy lacks
        return jnp.from_dlpack(tensor.contiguous().clone())  # whose memory nobody else has
