"""State dicts in one ``.safetensors`` file: arrays as tensors, everything else as JSON in the header.

A file is the length of its header in 8 bytes, the header, and the bytes of the tensors one after the other. The header
is a JSON object that gives dtype, shape and offsets of each tensor; its ``__metadata__`` has two entries of ours, the
state dict with names in place of arrays, and a checksum of that and of all tensors. Any reader of the format reads the
arrays. Files without a checksum are of the time before there was one.
"""

import errno
import functools
import json
import os
import stat
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax.tree import from_tensor

__all__ = ["load", "save"]

FORMAT = "optimjax-2"  # the entry of the header that holds everything that is not an array
FIRST_FORMAT = "optimjax"  # the same, of files without a checksum
CHECKSUM = "crc32"
LONGEST_HEADER = 100_000_000  # bytes; other readers of the format refuse more, too
# What the format calls the dtypes that it has. Others are saved as their bytes.
DTYPES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16",
    "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip
LONGEST_INTEGER = 2048  # bits that are written in decimal; Python refuses to convert integers that are much longer


def save(path: str | os.PathLike[str], state_dict: Any) -> None:
    """Write a state dict, of an optimizer, a scheduler, or a dict of several, to one file.

    The file is written next to its place and then moved there: whatever happens, ``path`` holds the old content or the
    new one. It keeps the permissions that it has; through a symbolic link, what that points to is written. Arrays are
    written one by one, without a second copy of them all.

    Args:
      path: usually ends in ``.safetensors``; its folder must exist.
      state_dict: nested dicts, lists and tuples of arrays (JAX, NumPy, PyTorch), random keys, numbers (of Python or
        NumPy), strings, booleans, ``None``. An ``nnx.State`` is such a dict, and a :class:`optimjax.Parameter` such an
        array. Keys are strings, numbers, booleans, ``None``, and tuples of these. Of named tuples only the values are
        saved, see :func:`load`.

    Raises:
      TypeError: it holds something else; the message names the path.
      ValueError: an array is distributed over several processes, or was deleted, or the state dict holds itself; the
        message names the path.
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
    tensors: dict[str, Any] = {}
    try:
        content = json.dumps(_packed(state_dict, "", tensors))
    except RecursionError:
        raise ValueError("cannot save what holds itself, or is nested too deeply") from None
    # As other writers do: larger elements first, so that all are aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(content, tensors)
    checksum = zlib.crc32(content.encode())
    with _replacing(_target(path)) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, array in tensors.items():
            data = _bytes(array)
            checksum = _extended(checksum, name, data)
            file.write(data)
        file.seek(8 + header.index(NO_CHECKSUM))
        file.write(b"%08x" % checksum)


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save` has written.

    Returns:
      The same structure, arrays as NumPy arrays of the saved dtypes, random keys as JAX's. A named tuple comes back as
      a tuple: the state of the functional core is ``type(algorithm.init(params))(*loaded)``.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or damaged, or was not written by :func:`save`.

    >>> import tempfile
    >>> import jax, jax.numpy as jnp, optimjax as optim
    >>> adam, params = optim.functional.adam(lr=0.1), {"w": jnp.ones(2)}
    >>> path = os.path.join(tempfile.mkdtemp(), "state.safetensors")
    >>> optim.save(path, adam.init(params))
    >>> state = type(adam.init(params))(*optim.load(path))
    >>> params, state = adam.update(params, {"w": jnp.ones(2)}, state)
    >>> print(state.step)
    1
    """
    refusal = f"{os.fspath(path)!r} is truncated, damaged, or not a file that optim.save has written"
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{refusal}: it is {_kind(os.stat(path).st_mode)}")
    with open(path, "rb") as file:
        try:
            content, tensors = _read(file)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{refusal}: {error}") from error
    try:
        return json.loads(content, object_hook=functools.partial(_unpacked, tensors))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal}: the state dict in its header is broken: {error!r}") from error


# --- The file -------------------------------------------------------------------------------------------------------


NO_CHECKSUM = b"0" * 8  # in its place until it is known


def _target(path: str | os.PathLike[str]) -> Path:
    """Where a file goes: what symbolic links lead to, if that is a regular file or nothing."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "cannot save to a folder", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"cannot save to {_kind(mode)}", os.fspath(path))
    return target


def _kind(mode: int) -> str:
    """For messages: what is not a regular file."""
    kinds = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, is_kind in kinds.items() if is_kind(mode)), "a device")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of another one when it is complete; if anything is raised, nothing has changed."""
    beside = path.with_name(f".{uuid.uuid4().hex}")  # short, because the file's own name may be as long as can be
    try:
        with open(beside, "xb") as file:
            mode = (path if path.exists() else beside).stat().st_mode
            beside.chmod(0o600)  # before anything is in it that others may not read
            yield file
            file.flush()
            beside.chmod(stat.S_IMODE(mode))
            os.fsync(file.fileno())  # or a power failure might leave the new name on an empty file
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    with suppress(OSError):  # not every system can; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _header(content: str, tensors: Mapping[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {CHECKSUM: NO_CHECKSUM.decode(), FORMAT: content}}
    begin = 0
    for name, array in tensors.items():
        code, shape = DTYPES.get(array.dtype.name), [*array.shape]
        if array.dtype == np.complex128:
            code, shape = "F64", [*shape, 2]
        elif code is None:
            code, shape = "U8", shape if array.dtype.itemsize == 1 else [array.nbytes]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    if len(header) > LONGEST_HEADER - 8:
        raise ValueError(
            f"everything that is not an array takes {len(header):,} bytes, of which at most {LONGEST_HEADER:,} can be "
            "saved: put long lists of numbers into arrays"
        )
    return header + b" " * (-len(header) % 8)


def _read(file: BinaryIO) -> tuple[str, dict[str, np.ndarray]]:
    """The state dict as it is in the header, and the bytes of each tensor; memory for no more than is in the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise ValueError(f"it has {size:,} bytes, and a header of {length:,} bytes, by what it begins with")
    header = json.loads(file.read(length))
    entries = header.pop("__metadata__", {})
    wanted = next((name for name in (FORMAT, FIRST_FORMAT) if name in entries), None)
    if wanted is None:
        raise ValueError(f"its header has no {FORMAT!r}")
    content = entries[wanted]
    checksum, end = zlib.crc32(content.encode("utf-8", "surrogatepass")), 0
    tensors: dict[str, np.ndarray] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, after = entry["data_offsets"]
        if begin != end or not begin <= after <= size - 8 - length:
            raise ValueError(f"the tensor {name!r} is said to be at {begin} to {after}")
        end = after
        tensors[name] = np.empty(after - begin, np.uint8)
        if file.readinto(tensors[name].data) != after - begin:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"it ends within the tensor {name!r}")
        checksum = _extended(checksum, name, tensors[name].data)
    if end != size - 8 - length:
        raise ValueError(f"its tensors have {end:,} bytes, behind the header are {size - 8 - length:,}")
    if wanted == FORMAT and entries[CHECKSUM] != f"{checksum:08x}":
        raise ValueError("its checksum is another one")
    return content, tensors


def _extended(checksum: int, name: str, data: memoryview) -> int:
    """The checksum with a tensor more."""
    return zlib.crc32(data, zlib.crc32(f"{name} {data.nbytes} ".encode("utf-8", "surrogatepass"), checksum))


def _bytes(array: Any) -> memoryview:
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --- The state dict -------------------------------------------------------------------------------------------------

# JSON has lists, and objects with strings as keys. What else there is becomes an object with one entry, the kind.


PLAIN = (type(None), bool, int, float, str)


def _packed(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    if type(value) in PLAIN:
        return _plain(value)
    if isinstance(value, Mapping):
        return {"dict": [[_packed_key(k, path), _packed(v, _under(path, k), tensors)] for k, v in value.items()]}
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
        dtype = value.dtype.newbyteorder("=")
        name = _free_name(path, tensors)
        tensors[name] = value
        return {"scalar" if isinstance(value, np.generic) else "array": [name, str(dtype), list(value.shape)]}
    raise TypeError(f"cannot save {path.removeprefix('.')!r}, a {type(value).__name__}: {value!r}")


def _plain(value: Any) -> Any:
    """A plain value, or what stands for it where JSON or Python's reader of it would not give it back."""
    if type(value) is int and value.bit_length() > LONGEST_INTEGER:
        return {"int": hex(value)}
    if type(value) is str and any("\ud800" <= character <= "\udfff" for character in value):  # surrogates
        return {"text": list(map(ord, value))}
    return value


def _under(path: str, key: Any) -> str:
    try:
        return f"{path}.{key}"
    except ValueError:  # an integer with more digits than Python writes
        return f"{path}.<{type(key).__name__}>"


def _check_readable(array: jax.Array, path: str) -> None:
    where = f"cannot save {path.removeprefix('.')!r}"
    if isinstance(array, Tracer):
        raise TypeError(f"{where} while JAX traces it: save outside of jit, grad, ...")
    if array.is_deleted():
        raise ValueError(f"{where}: the array has been deleted")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise ValueError(
            f"{where}: it is distributed over several processes, and this one does not see all of it, but what "
            f"{array.sharding} gives it; use Orbax, as the page on saving shows"
        )


def _free_name(path: str, tensors: Mapping[str, Any]) -> str:
    """The name of a tensor, which keys with dots could give twice; what is not Unicode is written as an escape."""
    name = path.removeprefix(".").encode("utf-8", "backslashreplace").decode()
    while name in tensors or name == "__metadata__":
        name += "_"
    return name


def _packed_key(key: Any, path: str) -> Any:
    if isinstance(key, tuple):
        return {"tuple": [_packed_key(item, path) for item in key]}
    key = key.item() if isinstance(key, np.generic) else key
    if type(key) in PLAIN:
        return _plain(key)
    raise TypeError(f"cannot save {_under(path, key).removeprefix('.')!r}: its key is a {type(key).__name__}")


def _is_number(dtype: Any) -> bool:
    """Numbers and booleans; no strings, objects or times."""
    if jnp.issubdtype(dtype, np.timedelta64):  # for NumPy, an integer
        return False
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def _unpacked(tensors: dict[str, np.ndarray], entry: dict[str, Any]) -> Any:
    """What an object of one entry stands for; what is inside has been unpacked before."""
    ((kind, content),) = entry.items()
    if kind == "dict":
        return dict(content)
    if kind == "tuple":
        return tuple(content)
    if kind == "key":
        return jax.random.wrap_key_data(content[1], impl=content[0])
    if kind == "int":
        return int(content, 16)
    if kind == "text":
        return "".join(map(chr, content))
    if kind == "complex":
        return complex(*content)
    name, dtype, shape = content
    if not _is_number(jnp.dtype(dtype)) or kind not in ("array", "scalar"):
        raise ValueError(f"{name!r} is {kind} of {dtype}")
    array = tensors.pop(name).view(jnp.dtype(dtype)).reshape(shape)
    return array[()] if kind == "scalar" else array
