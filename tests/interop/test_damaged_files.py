"""A file that is truncated, damaged, foreign or crafted raises a clear error."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from saved_trees import same

from optimjax._facade import files
from optimjax._facade.files import load, save

pytestmark = pytest.mark.usefixtures("folder")

REFUSED = r"'a.safetensors' is truncated, damaged, or not a file that optim\.save has written: "


def test_a_truncated_or_foreign_file_is_a_clear_error() -> None:
    save("a.safetensors", {"x": np.arange(5.0)})
    whole = Path("a.safetensors").read_bytes()
    for damaged in [*(whole[:size] for size in range(len(whole))), whole + b"x", b"PK\x03\x04" + bytes(100), bytes(8)]:
        Path("a.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=REFUSED):
            load("a.safetensors")
    Path("a.safetensors").write_bytes(safetensors.numpy.save({"x": np.ones(2)}))
    with pytest.raises(
        ValueError, match=f"{REFUSED}its format is unknown, and this version of optimjax reads optimjax-2$"
    ):
        load("a.safetensors")
    Path("a.safetensors").write_bytes(whole.replace(b"optimjax-2", b"optimjax-9"))
    with pytest.raises(ValueError, match=f"{REFUSED}its format is optimjax-9, and this version of optimjax reads"):
        load("a.safetensors")
    with pytest.raises(FileNotFoundError):
        load("d.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/missing/folder\.safetensors'"):
        save("missing/folder.safetensors", {})


def test_what_cannot_be_opened_is_not_missing() -> None:
    resource = pytest.importorskip("resource")
    save("a.safetensors", {"n": 1})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Too many open files: 'a\.safetensors'"):
            load("a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_disk_that_fails_to_read_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise safetensors.SafetensorError("Could not read tensor x from file: Input/output error (os error 5)")

    save("a.safetensors", {"n": 1})
    monkeypatch.setattr(safetensors, "safe_open", fails)
    with pytest.raises(OSError, match=r"Could not read tensor x .*: 'a\.safetensors'") as caught:
        load("a.safetensors")
    assert caught.value.errno == errno.EIO


def test_a_damaged_file_never_loads() -> None:
    save("a.safetensors", {"x": np.arange(2, dtype=np.int8), "empty": np.ones((0, 2)), "lr": 0.1, "n": [(2, "é")]})
    whole = Path("a.safetensors").read_bytes()
    with open("a.safetensors", "rb+", buffering=0) as file:  # changed in place, because that is fast
        for place in range(8 * len(whole)):
            index, bit = divmod(place, 8)
            file.seek(index)
            file.write(bytes([whole[index] ^ 1 << bit]))
            with pytest.raises(ValueError, match=REFUSED):
                load("a.safetensors")
            file.seek(index)
            file.write(whole[index : index + 1])
    assert load("a.safetensors")["lr"] == 0.1


def test_tensors_that_others_have_changed_are_refused() -> None:
    tensors = {"x": np.arange(4, dtype=np.float32), "y": np.zeros(4, np.float32)}
    save("a.safetensors", tensors)
    with safetensors.safe_open("a.safetensors", "np") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file(tensors, "a.safetensors", metadata)
    assert same(load("a.safetensors"), tensors)
    x, y = tensors.values()
    for changed in (
        {"x": y, "y": x},
        {"x": x.view(np.int32), "y": y},
        {"x": x.reshape(2, 2), "y": y},
        {"x": x[:0], "y": y},
        {"x": x, "z": y},
        {"x": x, "y": y, "z": y[:0]},
    ):
        safetensors.numpy.save_file(changed, "a.safetensors", metadata)
        with pytest.raises(ValueError, match=f"{REFUSED}its checksum does not match"):
            load("a.safetensors")


def craft(content: str, tensors: dict[str, np.ndarray]) -> None:
    """A file with a checksum that is right, as nobody gets it by accident."""
    metadata = {files.FORMAT: f"{files._checksum(content, tensors)} {content}"}
    safetensors.numpy.save_file(tensors, "a.safetensors", metadata)


@pytest.mark.parametrize(
    "content",
    [
        "nope",
        '{"dict": 5}',
        '{"dict": [[[], 1]]}',
        '{"dict": [], "tuple": []}',
        '{"strange": "x"}',
        '{"array": "z"}',
        '{"array": ["x"]}',
        '[{"array": "x"}, {"array": "x"}]',
        '{"scalar": 5}',
        '{"bytes": "y"}',
        '{"bytes": ["z", "int4", [8]]}',
        '{"bytes": ["y", "int4", [7]]}',
        '{"bytes": ["y", "int4", [10000000000]]}',
        '{"bytes": ["y", "float31", [8]]}',
        '{"bytes": ["y", "object", [1]]}',
        '{"bytes": ["y", "S4", [2]]}',
        '{"bytes": ["y", "m8", [1]]}',
        '{"key": [5, {"array": "x"}]}',
        '{"key": ["rbg", {"array": "x"}]}',
        '{"int": "0x"}',
        '{"complex": ["x"]}',
        '{"text": "x"}',
        '{"text": [-1]}',
        '{"state": ["AdamState", ["step", "exp_avg"], [1]]}',
        '{"state": ["AdamState", ["step", "__class__"], [1, 2]]}',
        '{"state": ["AdamState", ["step", "import os"], [1, 2]]}',
        '{"state": ["os.system, AdamState", ["step"], [1]]}',
        '{"state": ["AveragingState", ["n_averaged"], [1]]}',
        '{"state": ["Popen", ["args"], ["true"]]}',
        '{"state": [5, ["step"], [1]]}',
        '{"named": ["A", ["a", "b"], [1]]}',
        '{"node": ["A", [[]], [1]]}',
        '{"node": 5}',
        "[" * 100_000,
    ],
)
def test_a_broken_state_dict_is_a_clear_error(content: str) -> None:
    craft(content, {"x": np.ones(2, np.uint32), "y": np.ones(8, np.uint8)})
    with pytest.raises(ValueError, match=REFUSED):
        load("a.safetensors")


def test_a_file_of_the_first_format_is_read() -> None:
    """It knew no classes, so that a state came back as a tuple."""
    tensors = {"state.1.w": np.ones(2)}
    content = '{"tuple": [3, {"dict": [["w", {"array": "state.1.w"}]]}]}'
    safetensors.numpy.save_file(
        tensors, "a.safetensors", {"optimjax-1": f"{files._checksum(content, tensors)} {content}"}
    )
    assert same(load("a.safetensors"), (3, {"w": np.ones(2)}))


def test_what_a_broken_state_dict_is_made_of_loads_when_it_is_whole() -> None:
    tensors = {"x": np.ones(2, np.uint32), "y": np.ones(8, np.uint8)}
    craft('[{"array": "x"}, {"bytes": ["y", "int4", [8]]}]', tensors)
    assert same(load("a.safetensors"), [tensors["x"], tensors["y"].astype("int4")])


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"optimjax-2": 5}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": 5}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U8", "shape": [4'
        + b",1" * 64
        + b'], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
        b'"y": {"dtype": "U8", "shape": [0, 4611686018427387904, 4], "data_offsets": [4, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"dtype": "U8", "shape": [1000000000000],'
        b'"data_offsets": [0, 1000000000000]}}',
        b'{"__metadata__": {"optimjax-2": ""}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "00000000 {}"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        b"\xff" * 20,
        b"[" * 100_000,
    ],
)
def test_a_crafted_header_is_a_clear_error(header: bytes) -> None:
    Path("a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=REFUSED):
        load("a.safetensors")


def test_a_header_longer_than_readers_take() -> None:
    save("a.safetensors", {"before": 1})
    with pytest.raises(ValueError, match=r"cannot save 100,000,\d+ characters of what is not an array: put long lists"):
        save("a.safetensors", ["x" * 100_000_000])
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]
    Path("a.safetensors").write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate("a.safetensors", 200_000_000)
    with pytest.raises(ValueError, match=f"{REFUSED}.*header too large"):
        load("a.safetensors")
