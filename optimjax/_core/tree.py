"""Trees of parameters and of gradients: flattening, names of leaves, and gradients that do not fit."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax._core.foreign import is_torch_module
from optimjax._core.sparse import addressed, is_sparse
from optimjax._storage.placement import sharding_of

__all__ = [
    "by_key",
    "check_gradient",
    "copied_array",
    "distinct_names",
    "dotted",
    "flatten_params",
    "is_inexact_array",
    "kind_of",
    "match",
    "names",
    "structure_error",
]


def by_key(keys: Sequence[Any], positions: Iterable[int] | None = None) -> dict[Any, list[int]]:
    """The positions that have equal keys, by key; all positions, or these."""
    found: dict[Any, list[int]] = {}
    for position in range(len(keys)) if positions is None else positions:
        found.setdefault(keys[position], []).append(position)
    return found


def dotted(path: Sequence[Any]) -> str:
    """A leaf's path as PyTorch writes names: ``layers.0.kernel``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def copied_array(array: Array) -> Array:
    """Another array with these values in the same place, without compiling a copy for each shape."""
    return array if isinstance(array, Tracer) else jax.device_put(array, sharding_of(array), may_alias=False)


def distinct_names(paths: Sequence[Any]) -> list[str]:
    """The dotted names of paths, or as JAX writes them where keys with dots in them make two the same."""
    names = list(map(dotted, paths))
    return names if len(set(names)) == len(names) else list(map(jax.tree_util.keystr, paths))


def names(tree: Any) -> list[str]:
    """The dotted names of a tree's leaves."""
    return [dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def is_inexact_array(leaf: Any) -> bool:
    """Whether a leaf is a real or complex floating array, of JAX or NumPy."""
    return isinstance(leaf, _ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def kind_of(leaf: Any) -> str:
    """For messages: what a leaf is if it is not such an array."""
    if is_torch_module(leaf):
        return f"PyTorch module ({type(leaf).__name__})"
    return f"{leaf.dtype} array" if isinstance(leaf, _ARRAYS) else type(leaf).__name__


_ARRAYS = (jax.Array, np.ndarray, np.generic)


def flatten_params(params: Any) -> tuple[list[Array], Any]:
    """The leaves as arrays, and the structure.

    Raises:
      TypeError: a leaf is not a floating number; the message names its path.
    """
    leaves, treedef = jax.tree.flatten(params)
    if not all(map(is_inexact_array, leaves)):
        for name, leaf in zip(names(params), leaves, strict=True):
            if not (is_inexact_array(leaf) or isinstance(leaf, (float, complex))):
                raise TypeError(
                    f"parameter {name or 'params'!r} is a {kind_of(leaf)}: only real or complex floating arrays can be "
                    "optimized; split the other leaves off first, for example with jax.tree.map and None"
                )
    return [jnp.asarray(leaf) for leaf in leaves], treedef


def match(treedef: Any, grads: Any, names: Callable[[], Sequence[str]]) -> list[Any]:
    """The gradients of the leaves of the parameters, in order; ``None`` where a gradient is missing.

    ``names`` is called only to explain a mismatch.

    Raises:
      ValueError: the structure differs; the message names the first path that only one side has.
    """
    try:
        return treedef.flatten_up_to(grads)
    except ValueError as error:
        # None is a leaf here: a missing gradient is not a difference of structure.
        paths = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: x is None or is_sparse(x))[0]
        for path, leaf in paths:
            below = [name for name in names() if not path or name.startswith(f"{dotted(path)}.")]
            if leaf is None and below:
                raise ValueError(
                    f"None stands for the gradient of one parameter, but {dotted(path) or 'grads'!r} is that of "
                    f"{below[:3]}: give a tree of None"
                ) from None
        raise structure_error(names(), [dotted(path) for path, _ in paths], str(error)) from None


def structure_error(ours: Sequence[str], theirs: Sequence[str], otherwise: str = "") -> ValueError:
    """The error that names the leaves only one side has, or says ``otherwise`` where the names agree."""
    missing = [name for name in ours if name not in set(theirs)]
    unexpected = [name for name in theirs if name not in set(ours)]
    detail = f"missing {missing[:3]}, unexpected {unexpected[:3]}" if missing or unexpected else otherwise
    return ValueError(f"gradients do not have the structure of the parameters: {detail}")


def check_gradient(name: Callable[[], str], param: Any, grad: Any) -> None:
    """Raise where a gradient cannot belong to a parameter; ``name`` is called only then.

    Raises:
      ValueError: the shapes differ (nothing is broadcast); a sparse gradient has batch axes, or more entries to choose
        from than integers can count.
      TypeError: the gradient is not a floating-point array, or is complex for a real parameter.
    """
    if not isinstance(grad, (jax.Array, np.ndarray, np.generic, float, complex)) and not is_sparse(grad):
        raise TypeError(f"gradient of {name()!r} must be an array or None, got {type(grad).__name__}: {grad!r}")
    if np.shape(grad) != param.shape:
        raise ValueError(f"gradient of {name()!r} has shape {np.shape(grad)}, the parameter has {param.shape}")
    if is_sparse(grad):
        if grad.n_batch:
            raise ValueError(f"gradient of {name()!r} is {grad!r}: it must have n_batch=0 (see bcoo_update_layout)")
        if addressed(grad) > jnp.iinfo(jax.dtypes.canonicalize_dtype(int)).max:
            raise ValueError(f"gradient of {name()!r} is {grad!r}: give it fewer sparse axes, or enable jax_enable_x64")
    dtype, param_dtype = getattr(grad, "dtype", None) or np.dtype(type(grad)), param.dtype
    if dtype == param_dtype:
        return
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"gradient of {name()!r} is {dtype}: it must be a floating array like the parameter")
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(param_dtype, jnp.complexfloating):
        raise TypeError(f"gradient of {name()!r} is {dtype}, the parameter is real ({param_dtype})")
