"""What was loaded, put into the structure of a template, and its arrays where those of the template are."""

from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["entries_of", "like_template"]

Path = tuple[Any, ...]


def entries_of(node: Any) -> list[tuple[Any, Any]]:
    """The children of a node of a pytree, each with its key: of a dict, a field's name, or a number."""
    paths = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(_key(entry), child) for (entry,), child in paths]


def like_template(template: Any, loaded: Any) -> Any:
    """The loaded values in the structure of the template, paired by path; see :func:`optimjax.load`.

    Raises:
      ValueError: a path is only on one side, or an array has another shape or dtype.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(template, is_leaf=lambda x: x is None or _holds_one(x))
    expected = {tuple(map(_key, path)): leaf for path, leaf in paths}
    found = dict(_leaves(loaded, (), {path for path, leaf in expected.items() if leaf is ...}))
    missing = [_dotted(path) for path in expected if path not in found]
    unexpected = [_dotted(path) for path in found if path not in expected]
    if missing or unexpected:
        raise ValueError(
            f"the file does not have the structure of like: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return treedef.unflatten([_like_leaf(leaf, found[path], _dotted(path)) for path, leaf in expected.items()])


def _key(entry: Any) -> Any:
    """What one entry of a path is called, whatever container it leads into."""
    return next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _leaves(loaded: Any, path: Path, whole: Container[Path]) -> Iterator[tuple[Path, Any]]:
    """What is no container, or stands in the place of one, with its path."""
    if path in whole or not isinstance(loaded, (Mapping, list, tuple)):
        yield path, loaded
        return
    for key, child in loaded.items() if isinstance(loaded, Mapping) else enumerate(loaded):
        yield from _leaves(child, (*path, key), whole)


def _like_leaf(leaf: Any, value: Any, path: str) -> Any:
    if _holds_one(leaf):
        return jax.tree.map(lambda own: _like_leaf(own, value, path), leaf)
    if not _is_array(leaf):
        return value
    if not _is_array(value):
        raise ValueError(f"{path!r} was saved as {value!r}, and like has {_described(leaf)}")
    if value.shape != leaf.shape or value.dtype != leaf.dtype:
        raise ValueError(f"{path!r} was saved as {_described(value)}, and like has {_described(leaf)}")
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.asarray(value) if isinstance(leaf, np.ndarray) else leaf.dtype.type(value)
    placed = _placed(value, leaf)
    if placed.dtype != value.dtype:
        raise ValueError(f"{path!r} was saved as {_described(value)}, which JAX has with jax_enable_x64 only")
    return placed


def _holds_one(x: Any) -> bool:
    """Whether this is a parameter or a variable of ``flax.nnx``, a node that is saved as its array."""
    return getattr(x, "__jax_array__", None) is not None


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _described(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _placed(array: Any, like: Any) -> jax.Array:
    """An array of JAX where another one is, or shall be; of one over several processes, each keeps its part."""
    if getattr(like, "weak_type", False) and array.shape == ():  # with narrower numbers, it gives narrower ones
        weak = jnp.asarray(array.item())
        array = weak if weak.dtype == array.dtype else array
    sharding = like.sharding if getattr(like, "committed", True) else None
    if sharding is None:
        return jnp.asarray(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
