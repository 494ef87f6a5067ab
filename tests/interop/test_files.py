"""Saving to one file: what comes back, what is refused, and a file that is whole whatever happens."""

import errno
import math
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupted_everywhere

import optimjax as optim
from optimjax._facade import files
from optimjax._facade.files import load, save

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int32", "int64", "uint8", "bool"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b) or repr(a) == repr(b))


def count_arrays(tree: Any) -> int:
    if isinstance(tree, (dict, list, tuple)):
        return sum(map(count_arrays, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, (np.ndarray, np.generic))


texts = st.text(st.characters(exclude_categories=()))  # lone surrogates, too
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**2040, 2**2056)
    | st.floats()
    | st.complex_numbers()
    | texts
    | st.builds(lambda x, dtype: jnp.dtype(dtype).type(x), st.integers(0, 9), st.sampled_from(DTYPES))
    | st.builds(
        lambda shape, dtype: np.arange(math.prod(shape)).reshape(shape).astype(jnp.dtype(dtype)),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.sampled_from(DTYPES),
    )
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | texts | st.tuples(st.booleans(), texts), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(trees)
@settings(max_examples=100, deadline=None)
def test_what_is_saved_comes_back(tree: Any) -> None:
    path = Path("tree.safetensors")
    save(path, tree)
    assert same(load(path), tree)
    assert os.listdir() == [path.name]
    with safetensors.safe_open(path, "np") as other:  # the format's own library accepts it
        assert len(other.keys()) == count_arrays(tree)


@pytest.mark.parametrize(
    "value",
    [
        1 - 2j,
        complex("nan+infj"),
        10**5000,
        -(10**5000),
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        np.complex128(1j),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_come_back_as_what_they_were(value: Any) -> None:
    save("a.safetensors", {"x": value, "key": {10**5000: 1}})
    loaded = load("a.safetensors")
    assert same(loaded, {"x": value, "key": {10**5000: 1}})


def test_names_that_are_not_unicode() -> None:
    tree = {"\ud800": np.ones(1), "\\ud800": np.ones(2), "\ud83d\ude00": np.ones(3), "\U0001f600": np.ones(4)}
    save("a.safetensors", tree)
    assert same(load("a.safetensors"), tree)
    assert len(safetensors.numpy.load_file("a.safetensors")) == 4


def test_what_holds_itself_is_refused() -> None:
    cyclic: Any = {"a": 1}
    cyclic["b"] = [cyclic]
    with pytest.raises(ValueError, match="cannot save what holds itself"):
        save("a.safetensors", cyclic)
    array = jnp.ones(2)
    array.delete()
    with pytest.raises(ValueError, match=r"cannot save 'x\.0': the array has been deleted"):
        save("a.safetensors", {"x": [array]})
    assert not os.listdir()


def test_a_functional_state_is_made_of_what_is_loaded() -> None:
    adam, params = optim.functional.adam(lr=0.1), {"w": jnp.ones(2)}
    _, state = adam.update(params, params, adam.init(params))
    save("a.safetensors", state)
    again = type(state)(*load("a.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, adam.update(params, params, again), adam.update(params, params, state))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({np.int64(0): 1, np.str_("a"): 2, np.float32(0.5): 3, np.bool_(True): 4}, {0: 1, "a": 2, 0.5: 3, True: 4}),
        ({None: 1, ("a", (np.int8(1), None)): 2}, {None: 1, ("a", (1, None)): 2}),
    ],
)
def test_keys_come_back_as_plain_ones(tree: Any, expected: Any) -> None:
    save("keys.safetensors", tree)
    loaded = load("keys.safetensors")
    assert loaded == expected
    assert list(map(type, loaded)) == list(map(type, expected))


def test_arrays_whose_dotted_paths_coincide_are_all_saved() -> None:
    tree = {
        "a.b": np.ones(1),
        "a": {"b": np.full(2, 2.0)},
        "a.b_": np.full(3, 3.0),
        0: np.zeros(1),
        "0": np.ones(2),
        "__metadata__": np.full(2, 4.0),
    }
    save("a.safetensors", tree)
    assert same(load("a.safetensors"), tree)


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">c16", ">c8", ">f2"])
def test_big_endian_arrays_keep_their_values(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    save("a.safetensors", array)
    loaded = load("a.safetensors")
    assert loaded.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize(
    "dtype", ["float32", "int4", "uint4", "int2", "float8_e4m3fn", "float8_e4m3b11fnuz", "float4_e2m1fn"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_dtypes_that_few_formats_have_and_transposed_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    array = jnp.ones(shape, dtype)
    save("a.safetensors", {"x": array, "transposed": array.T})
    loaded = load("a.safetensors")
    assert same(loaded, {"x": np.asarray(array), "transposed": np.asarray(array.T)})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_continues_from_a_file_bit_for_bit() -> None:
    def make() -> Any:
        params = {"w": jnp.arange(3.0), "b": jnp.ones((), "bfloat16")}
        optimizer = optim.AdamW(params, lr=0.1, betas=(0.8, 0.9), amsgrad=True)
        return optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)

    def run(optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(jax.tree.map(jnp.cos, optimizer.params))
            scheduler.step()

    optimizer, scheduler = make()
    run(optimizer, scheduler, 3)
    save("run.safetensors", {"o": optimizer.state_dict(), "s": scheduler.state_dict(), "params": optimizer.params})
    run(optimizer, scheduler, 3)

    saved = load("run.safetensors")
    other, restored = make()
    for parameter, value in zip(other.param_groups[0]["params"], jax.tree.leaves(saved["params"]), strict=True):
        parameter.value = value
    other.load_state_dict(saved["o"])
    restored.load_state_dict(saved["s"])
    run(other, restored, 3)
    jax.tree.map(np.testing.assert_array_equal, optimizer.params, other.params)
    assert other.param_groups[0]["betas"] == (0.8, 0.9)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (2, 0), (2, 3)])
def test_random_keys_come_back_as_random_keys(impl: str, shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(3, impl=impl), shape)
    save("keys.safetensors", {"keys": keys, "after": 1})
    loaded = load("keys.safetensors")
    assert loaded["keys"].dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(loaded["keys"]), jax.random.key_data(keys))
    assert loaded["after"] == 1


def test_the_state_of_a_module_and_parameters_are_saved_as_their_arrays() -> None:
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1)))
    w = optim.Parameter([1.0, 2.0], name="w")
    save("model.safetensors", {"model": nnx.state(model), "w": w})
    loaded = load("model.safetensors")
    np.testing.assert_array_equal(loaded["model"]["layers"][0]["kernel"], model.layers[0].kernel[...])
    np.testing.assert_array_equal(loaded["w"], w)
    other = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(8)), nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=9)))
    nnx.update(other, loaded["model"])
    for _ in range(2):  # the random state, too
        np.testing.assert_array_equal(other(jnp.ones((9, 2))), model(jnp.ones((9, 2))))


def test_other_libraries_can_read_the_arrays(torch: Any) -> None:
    from safetensors.torch import load_file

    optimizer = optim.Adam([jnp.ones(2)], lr=0.1)
    optimizer.step([jnp.ones(2)])
    save("adam.safetensors", optimizer.state_dict())
    tensors = load_file("adam.safetensors")
    assert tensors.keys() == {"state.0.exp_avg", "state.0.exp_avg_sq"}
    np.testing.assert_array_equal(tensors["state.0.exp_avg"].numpy(), optimizer.state_dict()["state"][0]["exp_avg"])
    half = {name: jnp.arange(3).astype(name) for name in ("bfloat16", "float16", "complex64", "bool", "uint16")}
    save("half.safetensors", half)
    for name, tensor in load_file("half.safetensors").items():
        assert tensor.dtype == getattr(torch, name)
        np.testing.assert_array_equal(tensor.to(torch.complex64).numpy(), half[name])
    save("torch.safetensors", {"weight": torch.ones(2), "n": 1})
    np.testing.assert_array_equal(load("torch.safetensors")["weight"], np.ones(2))


def test_arguments_in_the_order_of_torch_save_are_told_apart() -> None:
    with pytest.raises(TypeError, match="the path comes first"):
        optim.save({"n": 1}, "state.safetensors")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        len,
        *(np.array([x]) for x in ("a", None, np.timedelta64(1, "s"), np.datetime64(1, "s"))),
        np.timedelta64(1, "s"),
        {frozenset(): 1},
        {object: 1},
        {("a", b"b"): 1},
        {1j: 1},
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_the_file(value: Any) -> None:
    save("a.safetensors", {"before": 1})
    with pytest.raises(TypeError, match=r"""cannot save ['\"]state\.0\.x['\".]"""):
        save("a.safetensors", {"state": [{"x": value}]})
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]


def test_what_jax_traces_cannot_be_saved() -> None:
    @jax.jit
    def traced(x: Any) -> None:
        save("a.safetensors", {"n": 1, "x": [x]})

    with pytest.raises(TypeError, match=r"cannot save 'x\.0' while JAX traces it"):
        traced(1.0)
    assert not os.listdir()


def test_a_file_has_the_permissions_of_any_new_file_and_keeps_those_it_has() -> None:
    save("a.safetensors", {"x": np.ones(2)})
    Path("b").touch()
    assert os.stat("a.safetensors").st_mode == os.stat("b").st_mode
    for mode in (0o600, 0o400, 0o664):
        os.chmod("a.safetensors", mode)
        save("a.safetensors", {"mode": mode})
        assert os.stat("a.safetensors").st_mode & 0o777 == mode
        assert load("a.safetensors") == {"mode": mode}


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_one(exists: bool) -> None:
    os.mkdir("store")
    if exists:
        save("store/a.safetensors", {"n": 1})
    os.symlink("store/a.safetensors", "latest.safetensors")
    save("latest.safetensors", {"n": 2})
    assert os.path.islink("latest.safetensors")
    assert load("store/a.safetensors") == load("latest.safetensors") == {"n": 2}
    assert os.listdir("store") == ["a.safetensors"]


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
        ValueError, match=f"{REFUSED}its format is unknown, and this version of optimjax reads optimjax-1$"
    ):
        load("a.safetensors")
    Path("a.safetensors").write_bytes(whole.replace(b"optimjax-1", b"optimjax-9"))
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


def test_what_is_saved_twice_has_the_same_bytes() -> None:
    tree = {"x": np.ones(2), "y": [jnp.ones(3), {"z": np.ones(1, np.int8)}], "n": 1}
    save("a.safetensors", tree)
    save("b.safetensors", tree)
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


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
        "[" * 100_000,
    ],
)
def test_a_broken_state_dict_is_a_clear_error(content: str) -> None:
    craft(content, {"x": np.ones(2, np.uint32), "y": np.ones(8, np.uint8)})
    with pytest.raises(ValueError, match=REFUSED):
        load("a.safetensors")


def test_what_a_broken_state_dict_is_made_of_loads_when_it_is_whole() -> None:
    tensors = {"x": np.ones(2, np.uint32), "y": np.ones(8, np.uint8)}
    craft('[{"array": "x"}, {"bytes": ["y", "int4", [8]]}]', tensors)
    assert same(load("a.safetensors"), [tensors["x"], tensors["y"].astype("int4")])


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"optimjax-1": 5}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": 5}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U8", "shape": [4'
        + b",1" * 64
        + b'], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
        b'"y": {"dtype": "U8", "shape": [0, 4611686018427387904, 4], "data_offsets": [4, 4]}}',
        b'{"__metadata__": {"optimjax-1": "1"}, "x": {"dtype": "U8", "shape": [1000000000000],'
        b'"data_offsets": [0, 1000000000000]}}',
        b'{"__metadata__": {"optimjax-1": ""}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-1": "00000000 {}"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
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


def test_saving_and_loading_take_little_more_memory_than_the_arrays() -> None:
    size = 8_000_000
    tree = {"a": np.ones(size // 4, np.uint8), "t": jnp.ones((3, size // 16)).T, "b": [np.ones(size // 8, np.float16)]}
    tracemalloc.start()
    try:
        save("a.safetensors", tree)
        assert tracemalloc.get_traced_memory()[1] < 0.6 * size  # the transposed one is copied to be written
        tracemalloc.reset_peak()
        loaded = load("a.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 1.7 * size
    finally:
        tracemalloc.stop()
    assert sum(x.nbytes for x in jax.tree.leaves(loaded)) > size
    loaded["a"][:] = 2  # an array of its own, which may be written to


# --- Where a file goes ----------------------------------------------------------------------------------------------


def test_a_name_as_long_as_names_can_be() -> None:
    name = "n" * 243 + ".safetensors"
    save(name, {"n": 1})
    assert load(name) == {"n": 1}
    assert os.listdir() == [name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_only_a_regular_file_is_replaced() -> None:
    os.mkfifo("fifo")
    os.mkdir("folder")
    os.symlink("loop", "loop")
    os.symlink("/dev/null", "null")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind("socket")
    for path, error, message in (
        ("fifo", OSError, "cannot save to what is not a regular file: 'fifo'"),
        ("folder", IsADirectoryError, "cannot save to what is not a regular file: 'folder'"),
        ("loop", OSError, "symbolic links"),
        ("null", OSError, "cannot save to what is not a regular file: 'null'"),
        ("socket", OSError, "cannot save to what is not a regular file: 'socket'"),
    ):
        mode = os.lstat(path).st_mode
        with pytest.raises(error, match=message):
            save(path, {"n": 1})
        assert os.lstat(path).st_mode == mode
    bound.close()
    assert sorted(os.listdir()) == ["fifo", "folder", "loop", "null", "socket"]
    with pytest.raises(ValueError, match="has written: it is not a regular file"):
        load("fifo")  # without waiting for somebody to write into it


def test_a_full_disk_is_an_oserror_and_leaves_the_file() -> None:
    resource = pytest.importorskip("resource")
    save("a.safetensors", {"before": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for array in (np.ones(100_000), np.ones((1000, 2000))[:, ::2]):
            with pytest.raises(OSError, match=r"I/O error: File too large .*/a\.safetensors") as caught:
                save("a.safetensors", {"x": array})
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("I/O error: Permission denied (os error 13)", PermissionError, errno.EACCES),
        ("something else went wrong", OSError, errno.EIO),
    ],
)
def test_what_the_library_fails_to_write_is_an_oserror(
    monkeypatch: pytest.MonkeyPatch, text: str, kind: type[OSError], number: int
) -> None:
    def fails(tensors: Any, path: Path, metadata: Any) -> None:
        raise safetensors.SafetensorError(text)

    save("a.safetensors", {"before": 1})
    monkeypatch.setattr(safetensors.numpy, "save_file", fails)
    with pytest.raises(kind, match=re.escape(text)) as caught:
        save("a.safetensors", {"n": 2})
    assert caught.value.errno == number
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]


def test_nobody_else_can_read_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, save_file = [], safetensors.numpy.save_file

    def watched(tensors: Any, path: Path, metadata: Any) -> None:
        modes.append(path.stat().st_mode)
        save_file(tensors, path, metadata)
        modes.append(path.stat().st_mode)

    monkeypatch.setattr(safetensors.numpy, "save_file", watched)
    save("a.safetensors", {"n": 1})
    assert [mode & 0o777 for mode in modes] == [0o600, 0o600]


def test_the_folder_is_written_to_the_disk_after_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), os.path.exists("a.safetensors")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    save("a.safetensors", {"n": 1})
    assert synced == [(False, False), (True, True)]

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("not on this system")

    monkeypatch.setattr(os, "fsync", fails)
    save("a.safetensors", {"n": 2})
    assert load("a.safetensors") == {"n": 2}


# At the end of a `with` the file is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_the_old_file_or_the_new_one() -> None:
    save("a.safetensors", {"n": 1, "x": np.ones(2)})
    outcomes = []
    for interrupted in interrupted_everywhere(files, lambda: save("a.safetensors", {"n": 2, "x": np.ones(2)})):
        outcomes.append((interrupted, load("a.safetensors")["n"]))
        assert os.listdir() == ["a.safetensors"]
        save("a.safetensors", {"n": 1, "x": np.ones(2)})
    assert outcomes[-1] == (False, 2)
    assert outcomes.count((True, 1)) > 50


def test_killing_the_process_during_a_save_leaves_a_whole_file() -> None:
    program = """
    import numpy as np
    from optimjax._facade.files import save
    for count in range(10**6):
        save("run.safetensors", {"count": count, "array": np.full(200_000, count)})
    """
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
        while not Path("run.safetensors").exists():
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(delay)
        process.kill()
        process.wait()
        saved = load("run.safetensors")
        assert (saved["array"] == saved["count"]).all()
