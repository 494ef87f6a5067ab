"""Files of PyTorch, without PyTorch: ``.pt``, and weights in ``.safetensors``.

A ``.pt`` file is an uncompressed archive: ``data.pkl``, a pickle in which tensors refer to storages, and a file for
each storage. That is the format of ``torch.save`` since PyTorch 1.6.

A pickle is a program. It may have the instructions that ``torch.save`` writes (``OPCODES``); what it may name is a list
of constants and of functions that only arrange what they are given (``ALLOWED``); and whatever it gets hold of while it
runs is of a type that it cannot change: tensors become arrays when it has ended.
"""

import collections
import io
import itertools
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optimjax._facade.files import replacing
from optimjax.interop._torch_arrays import as_array, is_array

__all__ = ["load", "save"]


def load(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` has written, a ``.pt`` file, or weights in ``.safetensors``; PyTorch is not needed.

    Of a ``.pt`` file it reads what ``torch.load(weights_only=True)`` reads of state dicts: tensors, numbers, strings,
    and containers of these. It executes nothing of what is in the file.

    Returns:
      What was saved, with NumPy arrays in place of tensors. They cannot be written to, and tensors that share memory in
      PyTorch share it here.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file asks for something else, which the message names; it is truncated or damaged; it is of a
        version before PyTorch 1.6, or a TorchScript archive; or ``optim.save`` has written it.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from optimjax.interop import torch as interop
    >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
    >>> interop.save(path, {"model": {"fc.bias": np.zeros(3)}, "epoch": 7})
    >>> interop.load(path)
    {'model': {'fc.bias': array([0., 0., 0.])}, 'epoch': 7}
    """
    if _is_safetensors(path):
        return _load_safetensors(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive).read()
    except _RefusedError as error:
        raise ValueError(f"{os.fspath(path)!r} {error}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not a file of torch.save since PyTorch 1.6, or is truncated: {error}"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a pickle that is not whole fails in any way
        raise ValueError(f"{os.fspath(path)!r} is damaged: {type(error).__name__}: {error}") from error


def save(path: str | os.PathLike[str], value: Any) -> None:
    """Write a file that ``torch.load(path, weights_only=True)`` reads; PyTorch is not needed.

    The file is written next to its place and then moved there: whatever happens, ``path`` holds the old content or the
    new one.

    Args:
      path: ends in ``.safetensors`` for a dict of arrays by name, which is written in that format; else in ``.pt``.
      value: nested dicts, lists and tuples of arrays (JAX, NumPy, PyTorch), which become tensors, numbers, strings,
        booleans and ``None``.

    Raises:
      TypeError: it holds something else, or an array of a dtype that PyTorch lacks; the message names the path.
      ValueError: it holds itself, or an array was deleted.
      OSError: the file cannot be written.
    """
    if isinstance(value, (str, os.PathLike)):
        raise TypeError(f"the path comes first, as in save(path, state_dict); got {value!r} as the state dict")
    if _is_safetensors(path):
        _save_safetensors(path, value)
        return
    writer = _Writer()
    try:
        content = writer.pickled(value)
    except RecursionError:
        raise ValueError("cannot save what holds itself, or is nested too deeply") from None
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, "data.pkl", content)
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(writer.arrays):
            _add(archive, f"data/{key}", array.tobytes())
        _add(archive, "version", b"3\n")


# --- .safetensors ---------------------------------------------------------------------------------------------------


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".safetensors"


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    import safetensors

    open(path, "rb").close()  # says what prevents it; for the library, what it cannot open does not exist
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            if any(key.startswith("optimjax") for key in file.metadata() or {}):
                raise ValueError(f"{os.fspath(path)!r} was written by optim.save, and optim.load reads it")
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is truncated or damaged: {error}") from error


def _save_safetensors(path: str | os.PathLike[str], value: Any) -> None:
    import safetensors.numpy

    if not isinstance(value, Mapping) or not all(map(is_array, value.values())):
        raise TypeError("a .safetensors file has arrays by name alone: save the weights of a model, or a .pt file")
    arrays = {str(name): np.asarray(as_array(array), order="C") for name, array in value.items()}
    with replacing(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, {"format": "pt"})


# --- Reading .pt ----------------------------------------------------------------------------------------------------


DTYPES = {  # by PyTorch's names
    name: np.dtype(getattr(jnp, {"bool": "bool_"}.get(name, name)))
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "int16", "int8",
        "uint64", "uint32", "uint16", "uint8", "bool",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
}  # fmt: skip
STORAGES = {  # the classes that tensors of such a dtype name
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
PREFIX = "torch."  # of a dtype's name


class _RefusedError(Exception):
    """What is in the file is not read; the message follows its path."""


class _Storage(NamedTuple):
    """Memory that tensors share: its name in the archive, and how many elements of which dtype it has."""

    key: str
    dtype: str
    length: int


class _Tensor(NamedTuple):
    """A tensor until the pickle has ended."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Function:
    """A function that a pickle may call, of which it can change nothing."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _RefusedError(f"tries to change {name!r} of a function")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Archive:
    """An archive that is being read; each storage once."""

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        self._storages: dict[str, np.ndarray] = {}
        self._made: dict[int, Any] = {}  # what a pickle names twice is there once, however often that is nested
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")]
        if len(roots) != 1:
            raise _RefusedError("is an archive, but not one that torch.save has written: it has no 'data.pkl'")
        (self._root,) = roots
        if f"{self._root}constants.pkl" in names:
            raise _RefusedError("is a TorchScript archive: save model.state_dict() with torch.save")
        if f"{self._root}byteorder" in names and self._content("byteorder") != b"little":
            raise _RefusedError("was written by a machine with the other order of bytes")

    def read(self) -> Any:
        content = self._content("data.pkl")
        _check_opcodes(content)
        return self._value(_Unpickler(io.BytesIO(content), encoding="utf-8").load())

    def _value(self, value: Any) -> Any:
        """Nested containers with arrays in place of tensors; of a dict only its items, not what it calls them."""
        if not isinstance(value, (dict, list, tuple, _Function)):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._container(value)
        return self._made[id(value)]

    def _container(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            return self._array(value)
        if isinstance(value, (_Function, _Storage)):
            raise ValueError(f"a {type(value).__name__.strip('_').lower()} stands alone")
        if isinstance(value, dict):
            items = [(key, self._value(entry)) for key, entry in dict.items(value)]
            return collections.Counter(dict(items)) if isinstance(value, collections.Counter) else dict(items)
        return type(value)(map(self._value, value))

    def _array(self, tensor: _Tensor) -> np.ndarray:
        """The elements of a tensor, where they are."""
        (key, dtype, count), offset, size, stride = tensor
        elements = self._storage(key).view(DTYPES[dtype.removeprefix(PREFIX)])
        numbers = (offset, *size, *stride)
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(size) != len(stride):
            raise ValueError(f"a tensor of size {size!r}, stride {stride!r} and offset {offset!r}")
        if elements.size != count:
            raise ValueError(f"storage {key} has {elements.size} elements of {dtype}, not {count}")
        if 0 in size:
            return np.zeros(size, elements.dtype)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= elements.size:
            raise ValueError(f"a tensor of size {size} reaches beyond its storage")
        strides = [step * elements.itemsize for step in stride]
        return np.ndarray(size, elements.dtype, elements, offset * elements.itemsize, strides)

    def _storage(self, key: str) -> np.ndarray:
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._content(f"data/{key}"), np.uint8)
        return self._storages[key]

    def _content(self, name: str) -> bytes:
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise _RefusedError(f"has a compressed entry {name!r}, which torch.save does not write")
        return self._archive.read(entry)


OPCODES = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip


def _check_opcodes(content: bytes) -> None:
    """Refuse a pickle with other instructions, or one that counts further than it is long."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in OPCODES:
            raise _RefusedError(f"has the instruction {opcode.name}, which torch.save does not write by default")
        if opcode.name == "LONG_BINPUT" and (argument or 0) > len(content):
            raise ValueError(f"its pickle stores a value in place {argument}")


class _Unpickler(pickle.Unpickler):
    """A pickle in which only what is in the allow-list has a name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _RefusedError(
                f"asks for {module}.{name}, which is not among what state dicts are made of, and is not loaded; it may "
                "be code that does harm. Save state_dict() of models, optimizers and schedulers, with plain numbers "
                "and tensors"
            )
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise ValueError(f"a reference to {pid!r}")
        return _Storage(key, dtype, count)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
    """A tensor; ``rest`` is ``requires_grad``, hooks and whether it is conjugated."""
    if len(rest) > 2 and rest[2]:
        raise _RefusedError(f"has a tensor that is a lazy view ({rest[2]!r}): save a copy of it")
    return _Tensor(_Storage(*storage), offset, tuple(size), tuple(stride))


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> _Tensor:
    """A tensor whose dtype has no class of storages of its own: its storage is counted in bytes."""
    key, _, count = storage
    wide = DTYPES[dtype.removeprefix(PREFIX)].itemsize
    return _tensor(_Storage(key, dtype, count // wide), offset, size, stride, requires_grad, hooks, *rest)


def _encoded(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _allowed() -> Iterator[tuple[tuple[str, str], Any]]:
    functions: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "Counter"): lambda counts=(): collections.Counter(dict(counts)),
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
        ("torch", "Size"): lambda sizes=(): tuple(sizes),
        ("torch", "device"): lambda *place: ":".join(map(str, place)),
        ("_codecs", "encode"): _encoded,
    }
    for builtins in ("builtins", "__builtin__"):
        functions[builtins, "set"] = lambda items=(): set(items)
        functions[builtins, "complex"] = lambda *parts: complex(*parts)
    for place, function in functions.items():
        yield place, _Function(function)
    for name, dtype in STORAGES.items():
        yield ("torch", name), PREFIX + dtype
        yield ("torch.storage", name), PREFIX + dtype
    for name in DTYPES:
        yield ("torch", name), PREFIX + name


ALLOWED = dict(_allowed())


# --- Writing .pt ----------------------------------------------------------------------------------------------------


STORAGE_OF = {DTYPES[dtype]: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
PROTOCOL = b"\x80\x02"
SMALL = 2**31  # integers that four bytes hold with their sign
LARGEST = 255  # bytes of a larger one


class _Writer:
    """A pickle in the making, and the arrays that it refers to.

    It is written out because that of Python imports what it names, which here is PyTorch's.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def pickled(self, value: Any) -> bytes:
        return b"".join(itertools.chain([PROTOCOL], self._value(value, ""), [pickle.STOP]))

    def _value(self, value: Any, path: str) -> Iterator[bytes]:
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            value = value.item()
        if value is None:
            yield pickle.NONE
        elif isinstance(value, bool):
            yield pickle.NEWTRUE if value else pickle.NEWFALSE
        elif isinstance(value, int):
            yield _integer(value, path)
        elif isinstance(value, float):
            yield pickle.BINFLOAT + struct.pack(">d", value)
        elif isinstance(value, str):
            yield _text(value)
        elif isinstance(value, Mapping):
            yield pickle.EMPTY_DICT + pickle.MARK
            for key, entry in value.items():
                yield from self._value(key, f"{path}.{key}")
                yield from self._value(entry, f"{path}.{key}")
            yield pickle.SETITEMS
        elif isinstance(value, (list, tuple)):
            yield pickle.MARK if isinstance(value, tuple) else pickle.EMPTY_LIST + pickle.MARK
            for index, item in enumerate(value):
                yield from self._value(item, f"{path}.{index}")
            yield pickle.TUPLE if isinstance(value, tuple) else pickle.APPENDS
        elif is_array(value):
            yield from self._tensor(np.asarray(as_array(value)), path)
        else:
            raise TypeError(f"cannot save {path.removeprefix('.')!r}, a {type(value).__name__}: {value!r}")

    def _tensor(self, array: np.ndarray, path: str) -> Iterator[bytes]:
        if array.dtype not in STORAGE_OF:
            raise TypeError(f"cannot save {path.removeprefix('.')!r}: it has the dtype {array.dtype}")
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        key = str(len(self.arrays))
        self.arrays.append(np.asarray(array, order="C"))
        storage = STORAGE_OF[array.dtype]
        yield _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
        yield pickle.MARK + _text("storage") + _global("torch", storage) + _text(key) + _text("cpu")
        yield _integer(array.size, path) + pickle.TUPLE + pickle.BINPERSID
        yield _integer(0, path)
        yield from self._value(tuple(array.shape), path)
        yield from self._value(tuple(strides), path)
        yield pickle.NEWFALSE + _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        yield pickle.TUPLE + pickle.REDUCE


def _integer(value: int, path: str) -> bytes:
    if -SMALL <= value < SMALL:
        return pickle.BININT + struct.pack("<i", value)
    content = pickle.encode_long(value)
    if len(content) > LARGEST:
        raise TypeError(f"cannot save {path.removeprefix('.')!r}: it is an integer of {len(content)} bytes")
    return pickle.LONG1 + bytes([len(content)]) + content


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


ALIGNMENT = 64  # of each entry's content, so that PyTorch can map the file into memory
HEADER, FIELD = 30, 4  # bytes of an entry's header without its name, and of the header of what pads it


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")  # of 1980, so that equal content makes equal files
    start = archive.start_dir + HEADER + len(entry.filename) + FIELD
    padding = -start % ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(entry, content)
