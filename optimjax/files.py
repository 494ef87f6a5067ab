"""State dicts in one ``.safetensors`` file: arrays as tensors, everything else as JSON in the header."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax.tree import from_tensor

__all__ = ["load", "save"]

FORMAT = "optimjax"  # the header's entry that holds what is no array
# What the format has, of NumPy's and JAX's dtypes.
DTYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
}  # fmt: skip


def save(path: str | os.PathLike[str], state_dict: Any) -> None:
    """Write a state dict, of an optimizer, a scheduler, or a dict of several, to one file.

    The file is written beside its place and then moved there: whatever happens, ``path`` holds the old content or the
    new one. It keeps the permissions that it has; through a symbolic link, what that points to is written.

    Args:
      path: usually ends in ``.safetensors``; its folder must exist.
      state_dict: nested dicts, lists and tuples of arrays (JAX, NumPy, PyTorch), random keys, numbers, strings,
        booleans, ``None``. An ``nnx.State`` is such a dict, and a :class:`optimjax.Parameter` such an array. Keys are
        strings, numbers, booleans, ``None``, and tuples of these.

    Raises:
      TypeError: it holds something else; the message names the path. Nothing is written then.
      ImportError: ``safetensors`` is not installed.

    >>> import tempfile
    >>> import jax.numpy as jnp, optimjax as optim
    >>> path = os.path.join(tempfile.mkdtemp(), "adam.safetensors")
    >>> optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    >>> optimizer.step({"w": jnp.ones(2)})
    >>> optim.save(path, {"optimizer": optimizer.state_dict(), "epoch": 3})
    >>> loaded = optim.load(path)
    >>> optimizer.load_state_dict(loaded["optimizer"])
    <All keys matched successfully>
    >>> loaded["epoch"]
    3
    """
    if isinstance(state_dict, (str, os.PathLike)):
        raise TypeError(f"the path comes first, as in save(path, state_dict); got {state_dict!r} as the state dict")
    tensors: dict[str, np.ndarray] = {}
    header = json.dumps(_packed(state_dict, "", tensors))
    path = Path(os.path.realpath(path))
    library = _safetensors()
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.touch()  # says at once if that cannot be
    mode = (path if path.exists() else beside).stat().st_mode
    try:
        library.numpy.save_file(tensors, beside, {FORMAT: header})  # only its owner may read it
        with open(beside, "rb+") as file:
            beside.chmod(mode)  # once it is open, for the mode may be to read only
            os.fsync(file.fileno())  # or a power failure might leave the new name on an empty file
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save` has written.

    Returns:
      The same structure, arrays as NumPy arrays of the saved dtypes, random keys as JAX's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, or was not written by :func:`save`.
      ImportError: ``safetensors`` is not installed.
    """
    library = _safetensors()
    data = Path(path).read_bytes()
    refusal = f"{os.fspath(path)!r} is truncated, or no file that optim.save has written"
    try:
        tensors = dict(library.deserialize(data))
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    except (library.SafetensorError, ValueError) as error:
        raise ValueError(f"{refusal}: {error}") from error
    if FORMAT not in entries:
        raise ValueError(f"{refusal}: its header has no {FORMAT!r}")
    try:
        return _unpacked(json.loads(entries[FORMAT]), tensors)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal}: {FORMAT!r} in its header is broken: {error!r}") from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("saving to .safetensors needs the safetensors package: pip install safetensors") from error
    return safetensors


# JSON has lists, and objects with strings as keys. What else there is becomes an object with one entry, the kind.


PLAIN = (type(None), bool, int, float, str)


def _packed(value: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, Mapping):
        return {"dict": [[_packed_key(k, path), _packed(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_packed(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    value = from_tensor(value)
    if getattr(value, "__jax_array__", None) is not None:  # a Parameter, or a variable of flax.nnx
        value = value.__jax_array__()
    if isinstance(value, Tracer):
        raise TypeError(f"cannot save {path.removeprefix('.')!r} while JAX traces it: save outside of jit, grad, ...")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {"key": [str(jax.random.key_impl(value)), _packed(jax.random.key_data(value), path, tensors)]}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and _is_plain(value.dtype):
        array: Any = np.asarray(value)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        name = path.removeprefix(".")
        while name in tensors or name == "__metadata__":  # keys with dots in them can make two paths the same
            name += "_"
        tensors[name] = _stored(array)
        return {"array": [name, str(array.dtype), list(array.shape)]}
    raise TypeError(f"cannot save {path.removeprefix('.')!r}, a {type(value).__name__}: {value!r}")


def _packed_key(key: Any, path: str) -> Any:
    if isinstance(key, tuple):
        return {"tuple": [_packed_key(item, path) for item in key]}
    key = key.item() if isinstance(key, np.generic) else key
    if type(key) in PLAIN:
        return key
    raise TypeError(f"cannot save {f'{path}.{key}'.removeprefix('.')!r}: its key is a {type(key).__name__}")


def _stored(array: Any) -> np.ndarray:
    """The array in a dtype that the format has; the bytes are the same."""
    if array.dtype == np.complex128:
        return np.stack([array.real, array.imag], axis=-1)
    array = np.ascontiguousarray(array)
    return array if array.dtype.name in DTYPES else array.view(np.uint8)


def _is_plain(dtype: Any) -> bool:
    """Numbers and booleans; no strings, objects or times."""
    if jnp.issubdtype(dtype, np.timedelta64):  # for NumPy, an integer
        return False
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def _unpacked(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    if kind == "key":
        return jax.random.wrap_key_data(_unpacked(content[1], tensors), impl=content[0])
    name, dtype, shape = content
    return np.frombuffer(tensors[name]["data"], jnp.dtype(dtype)).reshape(shape).copy()
