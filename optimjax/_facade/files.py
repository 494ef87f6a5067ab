"""State dicts, and states, in one ``.safetensors`` file: arrays as tensors, all else as JSON in its metadata.

The metadata has one entry. Its key is the version of the format; its value is a checksum, and the state dict with names
of tensors in place of arrays. Any reader of ``.safetensors`` reads the arrays.
"""

import errno
import functools
import json
import os
import re
import stat
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax._core.foreign import from_tensor, is_nnx
from optimjax._core.states import is_registered, named_state
from optimjax._facade.template import entries_of, like_template

__all__ = ["load", "replacing", "save"]


def save(path: str | os.PathLike[str], state_dict: Any) -> None:
    """Write a state dict, of an optimizer, a scheduler, or a dict of several, to one file.

    The file is written next to its place and then moved there: whatever happens, ``path`` holds the old content or the
    new one. It keeps the permissions that it has; if it is a symbolic link, what that points to is written. Arrays in
    the host's memory are written without a copy; those on accelerators are copied to the host first, all of them.

    Args:
      path: usually ends in ``.safetensors``; its folder must exist.
      state_dict: nested dicts, lists and tuples of arrays (JAX, NumPy, PyTorch), random keys, numbers (of Python or
        NumPy), strings, booleans, ``None``. An ``nnx.State`` is such a dict, and a :class:`optimjax.Parameter` such an
        array. Keys are strings, numbers, booleans, ``None``, and tuples of these. Named tuples and other nodes of
        pytrees (Equinox modules, dataclasses of Flax) are saved by their fields, without what is static: see
        :func:`load`.

    Raises:
      TypeError: it holds something else, such as a function, or a ``flax.nnx`` module; the message names the path.
      ValueError: an array is distributed over several processes, or was deleted, or the state dict holds itself, or
        everything in it that is not an array takes more than 100 MB.
      OSError: the file cannot be written: the disk is full, the folder does not exist, permission is missing, or
        ``path`` is a folder, a device, a pipe or a loop of links. Whatever is raised, the old content is still there.

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
    try:
        content = json.dumps(_packed(state_dict, "", tensors))
    except RecursionError:
        raise ValueError("cannot save what holds itself, or is nested too deeply") from None
    with replacing(path) as temporary:
        _write(temporary, content, tensors)


def load(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Read what :func:`save` has written.

    Args:
      path: the file.
      like: a tree of the saved structure, such as the state that a run begins with. What is loaded gets its classes,
        and its arrays go where those of the tree are: arrays of JAX, or ``jax.ShapeDtypeStruct`` with a sharding, also
        one over several processes. Other leaves only say that something was saved there, and ``...`` takes a whole part
        as it was saved.

    Returns:
      The same structure, arrays as NumPy arrays of the saved dtypes, random keys as JAX's. A state of the functional
      core (of an algorithm, a partition, an average, a schedule) is again what ``update`` takes. Without ``like``,
      other named tuples become tuples, and other nodes of pytrees dicts of their fields.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or damaged, which its checksum shows, or was not written by :func:`save`, or in
        a format of another version of optimjax; it does not have the structure of ``like``, or an array has another
        shape or dtype there: the message names the path.
      OSError: the file cannot be read.

    >>> import tempfile
    >>> import jax, jax.numpy as jnp, optimjax as optim
    >>> adam, params = optim.functional.adam(lr=0.1), {"w": jnp.ones(2)}
    >>> path = os.path.join(tempfile.mkdtemp(), "state.safetensors")
    >>> optim.save(path, {"params": params, "state": adam.init(params)})
    >>> loaded = optim.load(path)
    >>> params, state = adam.update(loaded["params"], {"w": jnp.ones(2)}, loaded["state"])
    >>> print(type(state).__name__, state.step)
    AdamState 1
    >>> placed = optim.load(path, like={"params": params, "state": ...})
    >>> isinstance(loaded["params"]["w"], jax.Array), isinstance(placed["params"]["w"], jax.Array)
    (False, True)
    """
    try:
        content, tensors = _read(path)
        loaded = json.loads(content, object_hook=functools.partial(_unpacked, tensors, like is not None))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        message = f"{os.fspath(path)!r} is truncated, damaged, or not a file that optim.save has written: {error}"
        raise ValueError(message) from error
    return loaded if like is None else like_template(like, loaded)


# --- The file -------------------------------------------------------------------------------------------------------


FORMAT = "optimjax-2"  # the key in the metadata; counts up when older versions could not read what is written
READABLE = ("optimjax-1", FORMAT)  # the first one had plain tuples only


def _write(path: Path, content: str, tensors: dict[str, np.ndarray]) -> None:
    import safetensors.numpy

    try:
        safetensors.numpy.save_file(tensors, path, {FORMAT: f"{_checksum(content, tensors)} {content}"})
    except safetensors.SafetensorError as error:
        if "header too large" in str(error):
            what = f"cannot save {len(content):,} characters of what is not an array"
            raise ValueError(f"{what}: put long lists of numbers into arrays") from error
        raise _os_error(error, path) from error


def _read(path: str | os.PathLike[str]) -> tuple[str, dict[str, np.ndarray]]:
    import safetensors

    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    open(path, "rb").close()  # says what prevents it; for the library, what it cannot open does not exist
    try:
        # Not mapped into memory: it would take as much again, and a file that shrinks meanwhile would end the process.
        with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
            metadata = file.metadata() or {}
            version = next((key for key in metadata if key.startswith("optimjax")), "unknown")
            if version not in READABLE:
                raise ValueError(f"its format is {version}, and this version of optimjax reads {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except safetensors.SafetensorError as error:
        raise (_os_error(error, path) if "os error" in str(error) else ValueError(str(error))) from error
    checksum, _, content = metadata[version].partition(" ")
    if checksum != _checksum(content, tensors):
        raise ValueError("its checksum does not match")
    return content, tensors


def _os_error(error: Exception, path: str | os.PathLike[str]) -> OSError:
    """The library's error as Python's; if the system caused it, its number is in the text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, str(error), os.fspath(path), number)  # the last one counts on Windows, where numbers differ


def _checksum(content: str, tensors: Mapping[str, np.ndarray]) -> str:
    checksum = zlib.crc32(content.encode())
    for name, array in sorted(tensors.items()):
        checksum = zlib.crc32(f" {name} {array.dtype} {array.shape} ".encode(), checksum)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    return f"{checksum:08x}"


def _target(path: str | os.PathLike[str]) -> Path:
    """Where a file goes: what symbolic links lead to, if that is a regular file or nothing."""
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(number, "cannot save to what is not a regular file", os.fspath(path))
    return target


@contextmanager
def replacing(place: str | os.PathLike[str]) -> Iterator[Path]:
    """A file that takes the place of another one when it is complete; if anything is raised, nothing has changed."""
    path = _target(place)
    temporary = path.with_name(f".{uuid.uuid4().hex}")  # short, because the file's own name may be as long as can be
    try:
        temporary.touch(exist_ok=False)
        mode = (path if path.exists() else temporary).stat().st_mode
        temporary.chmod(0o600)  # before anything is in it that others may not read
        yield temporary
        with open(temporary, "rb+") as file:
            temporary.chmod(stat.S_IMODE(mode))
            os.fsync(file.fileno())  # or a power failure might leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = os.fspath(path)  # the one that the caller knows
        raise
    with suppress(OSError):  # not every system can; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- The state dict -------------------------------------------------------------------------------------------------

# JSON has lists, and objects with strings as keys. What else there is becomes an object with one entry, the kind.


PLAIN = (type(None), bool, int, float, str)
LONGEST_INTEGER = 2048  # bits that are written in decimal; Python refuses to convert integers that are much longer
# What NumPy and other readers of the format have. Arrays of other dtypes are saved as their bytes.
DTYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bfloat16", "float16", "float32",
    "float64", "complex64",
}  # fmt: skip


def _packed(value: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    if type(value) in PLAIN:
        return _plain(value)
    if isinstance(value, Mapping):
        entries = [(_packed_key(key, path), entry) for key, entry in value.items()]
        return {"dict": [[key, _packed(entry, f"{path}.{key}", tensors)] for key, entry in entries]}
    fields = getattr(value, "_fields", None)
    if isinstance(value, tuple) and fields is not None:
        kind = "state" if is_registered(type(value)) else "named"
        return _packed_node(kind, value, zip(fields, value, strict=True), path, tensors)
    if isinstance(value, (list, tuple)):
        items = [_packed(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    value = from_tensor(value)
    if getattr(value, "__jax_array__", None) is not None:  # a Parameter, or a variable of flax.nnx
        value = value.__jax_array__()
    if isinstance(value, jax.Array):
        _check_readable(value, path)
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return {"key": [str(jax.random.key_impl(value)), _packed(jax.random.key_data(value), path, tensors)]}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and _is_number(value.dtype):
        array = _packed_array(np.asarray(value, value.dtype.newbyteorder("="), order="C"), path, tensors)
        return {"scalar": array} if isinstance(value, np.generic) else array
    if is_nnx(value):
        raise TypeError(f"{_refusal(path)}, a {type(value).__name__}: save nnx.state(...) of it")
    if not jax.tree_util.all_leaves([value]):
        return _packed_node("node", value, entries_of(value), path, tensors)
    raise TypeError(f"{_refusal(path)}, a {type(value).__name__}: {value!r}")


def _packed_node(
    kind: str, node: Any, entries: Iterable[tuple[Any, Any]], path: str, tensors: dict[str, np.ndarray]
) -> Any:
    """A node of a class, which only its name is saved of: what it is called, its keys, and what is under these."""
    packed = [(_packed_key(key, path), _packed(child, f"{path}.{key}", tensors)) for key, child in entries]
    return {kind: [type(node).__name__, [key for key, _ in packed], [child for _, child in packed]]}


def _plain(value: Any) -> Any:
    """A plain value, or what stands for it where JSON or Python's reader of it would not give it back."""
    if type(value) is int and value.bit_length() > LONGEST_INTEGER:
        return {"int": hex(value)}
    if type(value) is str and re.search(r"[\ud800-\udfff]", value):  # surrogates
        return {"text": list(map(ord, value))}
    return value


def _packed_key(key: Any, path: str) -> Any:
    if isinstance(key, tuple):
        return {"tuple": [_packed_key(item, path) for item in key]}
    key = key.item() if isinstance(key, np.generic) else key
    if type(key) in PLAIN:
        return _plain(key)
    raise TypeError(f"{_refusal(path)}: its key {key!r} is a {type(key).__name__}")


def _packed_array(array: np.ndarray, path: str, tensors: dict[str, np.ndarray]) -> Any:
    name = path.removeprefix(".")
    while name in tensors or name == "__metadata__":  # keys with dots could give one name to two
        name += "_"
    if array.dtype.name in DTYPES:
        tensors[name] = array
        return {"array": name}
    tensors[name] = array.reshape(-1).view(np.uint8)
    return {"bytes": [name, array.dtype.name, array.shape]}


def _check_readable(array: jax.Array, path: str) -> None:
    if isinstance(array, Tracer):
        raise TypeError(f"{_refusal(path)} while JAX traces it: save outside of jit, grad, ...")
    if array.is_deleted():
        raise ValueError(f"{_refusal(path)}: the array has been deleted")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise ValueError(
            f"{_refusal(path)}: it is distributed over several processes, and this one does not see all of it, but "
            f"what {array.sharding} gives it; use Orbax, as the page on saving shows"
        )


def _refusal(path: str) -> str:
    return f"cannot save {path.removeprefix('.')!r}"


def _is_number(dtype: Any) -> bool:
    """Numbers and booleans; no strings, objects or times."""
    if jnp.issubdtype(dtype, np.timedelta64):  # for NumPy, an integer
        return False
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def _unpacked(tensors: dict[str, np.ndarray], by_key: bool, entry: dict[str, Any]) -> Any:
    """What an object of one entry stands for; what is inside has been unpacked before.

    Nodes of a class are dicts where they are to be matched with a template, ``by_key``.
    """
    ((kind, content),) = entry.items()
    if kind == "array":
        return tensors.pop(content)
    if kind == "bytes":
        name, dtype, shape = content
        if not _is_number(jnp.dtype(dtype)):
            raise ValueError(f"{name!r} has the dtype {dtype!r}")
        return tensors.pop(name).view(jnp.dtype(dtype)).reshape(shape)
    if kind in ("state", "named", "node"):
        name, keys, children = content
        fields = dict(zip(keys, children, strict=True))
        if by_key or kind == "node":
            return fields
        return named_state(name, tuple(keys))(*children) if kind == "state" else tuple(children)
    return WITHOUT_TENSORS[kind](content)


WITHOUT_TENSORS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "tuple": tuple,
    "int": lambda digits: int(digits, 16),
    "text": lambda codes: "".join(map(chr, codes)),
    "complex": lambda parts: complex(*parts),
    "scalar": lambda array: array[()],
    "key": lambda key: jax.random.wrap_key_data(key[1], impl=key[0]),
}
