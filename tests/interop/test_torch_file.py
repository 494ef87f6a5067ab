"""Files of PyTorch are read and written without PyTorch, and what is in them is never executed."""

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax.interop import torch as interop

pytestmark = pytest.mark.usefixtures("folder")


def archive(content: bytes, **entries: bytes) -> str:
    """A file as ``torch.save`` writes it, with this pickle."""
    with zipfile.ZipFile("file.pt", "w") as file:
        for name, data in {"data.pkl": content, "version": b"3\n", **entries}.items():
            file.writestr(f"archive/{name}", data)
    return "file.pt"


# --- Reading ----------------------------------------------------------------------------------------------------------


DTYPES = "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 uint16 bool float8_e5m2"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_tensors_of_every_dtype_are_read(dtype: str, torch: Any) -> None:
    tensor = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 64.0]]).abs().to(getattr(torch, dtype))
    torch.save({"x": tensor}, "x.pt")
    array = interop.load("x.pt")["x"]
    assert array.dtype.name == dtype
    np.testing.assert_array_equal(array.astype(complex), tensor.to(torch.complex128).numpy())


def test_views_and_shared_memory_are_read(torch: Any) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    views = {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "part": whole[1, 1:, ::2],
        "expanded": whole[0, 0, :1].expand(1000, 1000),
        "empty": whole[:, :0],
        "number": whole[1, 2, 3],
        "parameter": torch.nn.Parameter(whole[0]),
    }
    torch.save(views, "x.pt")
    loaded = interop.load("x.pt")
    for name, tensor in views.items():
        np.testing.assert_array_equal(loaded[name], tensor.detach().numpy(), err_msg=name)
    assert np.shares_memory(loaded["whole"], loaded["part"])
    with pytest.raises(ValueError, match="read-only"):
        loaded["whole"][0] = 1


def test_what_is_not_a_tensor_is_read(torch: Any) -> None:
    value = {
        "ordered": collections.OrderedDict(b=1, a=[2.5, None, True, "ü", (1, (2,))]),
        "counter": collections.Counter([3, 3, 5]),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "complex": 1 - 2j,
        "integers": [2**40, -(2**70), 0],
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        3: "three",
    }
    torch.save(value, "x.pt")
    assert interop.load("x.pt") == value | {"device": "cuda:1", "dtype": "torch.bfloat16"}


def test_a_checkpoint_is_read(torch: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "checkpoint.pt")
    loaded = interop.load("checkpoint.pt")
    assert type(loaded["model"]) is dict
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(loaded["model"][name], tensor.numpy())
    state = optimizer.state_dict()
    assert loaded["optimizer"]["param_groups"] == state["param_groups"]
    for index, entries in state["state"].items():
        assert {name: np.asarray(value).tolist() for name, value in entries.items()} == {
            name: value.tolist() for name, value in loaded["optimizer"]["state"][index].items()
        }


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


EVIL: dict[str, tuple[bytes, str]] = {
    "a function of the system": (pickle.dumps({"x": Evil()}, 2), r"asks for (posix|nt)\.system"),
    "with another instruction": (pickle.dumps({"x": Evil()}, 4), "has the instruction FRAME"),
    "one that needs memory": (b"Nr\xff\xff\xff\x7f.", "stores a value in place 2147483647"),
    "eval": (b"cbuiltins\neval\n(X\x06\x00\x00\x001 + 1.tR.", r"asks for builtins\.eval"),
    "an attribute of what is allowed": (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "asks for torch"),
    "a class of numpy": (pickle.dumps(np.float64(1), 2), r"asks for numpy\.\w+\.multiarray\.scalar"),
    "a model": (b"ctorch.nn.modules.linear\nLinear\n)R.", r"asks for torch\.nn\.modules\.linear\.Linear"),
    "a function that is changed": (
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x09\x00\x00\x00_functionK\x01s\x86b.",
        "tries to change '_function'",
    ),
    "a function alone": (b"ctorch._utils\n_rebuild_tensor_v2\n.", "stands alone"),
    "a dict that hides its items": (b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.", ""),
}


@pytest.mark.parametrize(("content", "message"), EVIL.values(), ids=EVIL)
def test_nothing_is_executed(content: bytes, message: str) -> None:
    path = archive(content)
    if message:
        with pytest.raises(ValueError, match=rf"^'file\.pt' (is damaged: ValueError: )?.*{message}"):
            interop.load(path)
    else:
        assert interop.load(path) == {}
    assert os.listdir() == ["file.pt"]


def test_what_is_allowed_cannot_be_used_as_something_else(torch: Any) -> None:
    """Whatever pickle is made of the words that are allowed, nothing but data comes out, or an error."""
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(3), "y": {1}}, buffer)
    with zipfile.ZipFile(buffer) as file:
        entries = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    content = bytearray(entries.pop("data.pkl"))
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 2):
            changed[place] = rng.integers(0, 256)
        try:
            loaded = interop.load(archive(bytes(changed), **entries))
        except ValueError:
            continue
        assert_is_data(loaded)


def assert_is_data(value: Any) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            assert_is_data(key)
            assert_is_data(entry)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            assert_is_data(item)
    else:
        assert value is None or isinstance(value, (bool, int, float, str, bytes, complex, np.ndarray))


def test_what_is_named_often_is_there_once() -> None:
    """A pickle of 100 bytes that would be 2**40 lists, and one that holds itself."""
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested]
    loaded = interop.load(archive(pickle.dumps(nested, 2)))
    assert loaded[0] is loaded[1]
    nested = []
    nested.append(nested)
    with pytest.raises(ValueError, match="is damaged: RecursionError"):
        interop.load(archive(pickle.dumps(nested, 2)))


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n%s\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    b"K%ctQK%c(K%ct(K%ct\x89NtR."
)


@pytest.mark.parametrize(
    ("storage", "count", "offset", "size", "stride", "message"),
    [
        (b"FloatStorage", 4, 0, 4, 1, None),
        (b"FloatStorage", 4, 1, 4, 1, "beyond its storage"),
        (b"FloatStorage", 4, 0, 4, 2, "beyond its storage"),
        (b"FloatStorage", 5, 0, 4, 1, "not 5"),
        (b"DoubleStorage", 4, 0, 4, 1, "not 4"),
        (b"float32", 4, 0, 2, 1, None),  # no storage, but it says as much
    ],
)
def test_a_tensor_stays_within_its_storage(
    storage: bytes, count: int, offset: int, size: int, stride: int, message: str | None
) -> None:
    content = TENSOR % (storage, count, offset, size, stride)
    path = archive(content, **{"data/0": np.arange(4, dtype=np.float32).tobytes()})
    if message is None:
        np.testing.assert_array_equal(interop.load(path), np.arange(size))
    else:
        with pytest.raises(ValueError, match=f"'file.pt' is damaged.*{message}"):
            interop.load(path)


def test_other_files_are_refused(torch: Any) -> None:
    with pytest.raises(FileNotFoundError):
        interop.load("missing.pt")
    torch.save({"x": torch.ones(2)}, "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"'old\.pt' is not a file of torch\.save since PyTorch 1\.6"):
        interop.load("old.pt")
    torch.save({"x": torch.ones(200)}, "short.pt")
    Path("short.pt").write_bytes(Path("short.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"'short\.pt' is not a file .* truncated"):
        interop.load("short.pt")
    with pytest.raises(ValueError, match="is a TorchScript archive"):
        interop.load(archive(b"N.", **{"constants.pkl": b""}))
    with pytest.raises(ValueError, match="the other order of bytes"):
        interop.load(archive(b"N.", byteorder=b"big"))
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"N." + bytes(10**6))
    with pytest.raises(ValueError, match=r"compressed entry 'data\.pkl'"):
        interop.load("bomb.pt")
    torch.save({"x": torch.ones(2).to_sparse()}, "sparse.pt")
    with pytest.raises(ValueError, match=r"asks for torch\._utils\._rebuild_sparse_tensor"):
        interop.load("sparse.pt")
    optim.save("ours.safetensors", {"x": np.ones(2)})
    with pytest.raises(ValueError, match=r"was written by optim\.save, and optim\.load reads it"):
        interop.load("ours.safetensors")


def test_pytorch_is_not_imported() -> None:
    """Neither by the module, nor by the command line, nor by reading and writing files."""
    script = """
import sys
import numpy as np
import optimjax.__main__
from optimjax.interop import torch as interop
state = {"state": {0: {"step": np.ones(())}}, "param_groups": [{"params": [0]}]}
interop.save("x.pt", interop.to_torch(state, tensors=False))
interop.from_torch(interop.load("x.pt"))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_pytorch_reads_what_is_written(torch: Any) -> None:
    value = {
        "plain": [None, True, False, 1, -5, 2**40, -(2**70), 0.5, "ü", (1, ("a",), ()), {}, {3: []}],
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True)],
        "state": {0: {"exp_avg": jnp.ones((2, 3)), "step": np.float32(3)}},
    }
    interop.save("x.pt", value)
    loaded = torch.load("x.pt", weights_only=True)
    assert loaded["plain"] == value["plain"]
    assert loaded["numpy"] == [0.5, 3, True]
    assert loaded["state"][0]["exp_avg"].tolist() == [[1.0] * 3] * 2
    again = interop.load("x.pt")
    assert again["plain"] == value["plain"]


@pytest.mark.parametrize("dtype", [name for name in DTYPES.split() if name not in ("uint16", "float8_e5m2")])
@pytest.mark.parametrize("mapped", [False, True])
def test_arrays_become_tensors(dtype: str, mapped: bool, torch: Any) -> None:
    arrays = [np.asarray([[0, 1, 2], [3, 4, 5]]).astype(dtype if dtype != "bfloat16" else jnp.bfloat16)]
    arrays += [arrays[0].T, arrays[0][:, :0], arrays[0][1, 1]]
    interop.save("x.pt", [np.asarray(array) for array in arrays])
    for tensor, array in zip(torch.load("x.pt", weights_only=True, mmap=mapped), arrays, strict=True):
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert tensor.shape == array.shape
        np.testing.assert_array_equal(tensor.to(torch.complex128).numpy(), array.astype(complex))
    with zipfile.ZipFile("x.pt") as file:
        for entry in file.infolist():
            header = Path("x.pt").read_bytes()[entry.header_offset :][26:30]
            start = (
                entry.header_offset + 30 + int.from_bytes(header[:2], "little") + int.from_bytes(header[2:], "little")
            )
            assert start % 64 == 0


def test_what_cannot_be_written_is_refused_and_leaves_the_file() -> None:
    interop.save("x.pt", {"x": 1})
    itself: list[Any] = []
    itself.append(itself)
    for value, error, message in [
        ({"a": [object()]}, TypeError, r"cannot save 'a\.0', a object"),
        ({"a": np.array(["text"])}, TypeError, "cannot save 'a': it has the dtype"),
        (itself, ValueError, "holds itself"),
        (2**5000, TypeError, "an integer of"),
    ]:
        with pytest.raises(error, match=message):
            interop.save("x.pt", value)
    with pytest.raises(TypeError, match="the path comes first"):
        interop.save({"x": 1}, "x.pt")  # pyright: ignore[reportArgumentType]
    assert interop.load("x.pt") == {"x": 1}
    assert os.listdir() == ["x.pt"]


def test_weights_in_safetensors(torch: Any) -> None:
    import safetensors.torch

    weights = {"fc.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(weights, "model.safetensors")
    loaded = interop.load("model.safetensors")
    np.testing.assert_array_equal(loaded["fc.weight"], weights["fc.weight"].numpy())
    assert loaded["half"].dtype == jnp.bfloat16
    interop.save("again.safetensors", loaded | {"transposed": loaded["fc.weight"].T})
    again = safetensors.torch.load_file("again.safetensors")
    assert torch.equal(again["fc.weight"], weights["fc.weight"])
    assert torch.equal(again["transposed"], weights["fc.weight"].T)
    assert torch.equal(again["half"], weights["half"])
    with pytest.raises(TypeError, match="arrays by name alone"):
        interop.save("x.safetensors", {"epoch": 3})
    Path("short.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated or damaged"):
        interop.load("short.safetensors")
