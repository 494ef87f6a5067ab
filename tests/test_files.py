"""Saving to one file: what comes back, what is refused, and a file that is whole whatever happens."""

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
from optimjax import files
from optimjax.files import load, save

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
        | st.dictionaries(st.integers() | texts, inner, max_size=3)
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


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float8_e4m3fn", "float8_e4m3b11fnuz", "float4_e2m1fn"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_dtypes_that_few_formats_have(dtype: str, shape: tuple[int, ...]) -> None:
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
    for box, value in zip(other.param_groups[0]["params"], jax.tree.leaves(saved["params"]), strict=True):
        box.value = value
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


def test_the_state_of_a_module_and_boxes_are_saved_as_their_arrays() -> None:
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
    with pytest.raises(ValueError, match=f"{REFUSED}its header has no 'optimjax-2'$"):
        load("a.safetensors")
    with pytest.raises(FileNotFoundError):
        load("d.safetensors")
    with pytest.raises(FileNotFoundError):
        save("missing/folder.safetensors", {})


def test_a_damaged_file_never_loads_with_other_values() -> None:
    tree = {"x": np.arange(3, dtype=np.float32), "k": jax.random.key(1), "lr": 0.1, "n": [1, (2, "text")], "c": 1j}
    save("a.safetensors", tree)
    whole = Path("a.safetensors").read_bytes()
    loaded = 0
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        Path("a.safetensors").write_bytes(damaged)
        try:
            result = load("a.safetensors")
        except ValueError as error:
            assert re.match(REFUSED, str(error))  # noqa: PT017
        else:
            loaded += 1
            assert np.array_equal(*(jax.random.key_data(each.pop("k")) for each in (result, dict(tree))))
            assert same(result, {name: value for name, value in tree.items() if name != "k"})
    assert loaded < len(whole)  # where the dtype or shape is written that other readers look at


def as_before(tensors: Any, content: str, **metadata: str) -> None:
    """A file of the time before there was a checksum."""
    safetensors.numpy.save_file(tensors, "a.safetensors", {"optimjax": content, **metadata})


def test_files_without_a_checksum_are_read() -> None:
    content = """{"dict": [
        ["x", {"array": ["x", "complex128", [1]]}], ["b", {"array": ["b", "bfloat16", []]}],
        [0, {"tuple": [1, null, "a"]}], ["key", {"key": ["threefry2x32", {"array": ["key", "uint32", [2]]}]}]]}"""
    as_before({"x": np.array([[1.0, 2.0]]), "b": np.ones(1, jnp.bfloat16), "key": np.array([0, 1], np.uint32)}, content)
    loaded = load("a.safetensors")
    assert jnp.array_equal(jax.random.key_data(loaded.pop("key")), jnp.array([0, 1], jnp.uint32))
    assert same(loaded, {"x": np.array([1 + 2j]), "b": np.array(1, jnp.bfloat16), 0: (1, None, "a")})


@pytest.mark.parametrize(
    "header",
    [
        "nope",
        '{"dict": 5}',
        '{"dict": [[[], 1]]}',
        '{"dict": [], "tuple": []}',
        '{"strange": ["x", "float32", [2]]}',
        '{"array": ["y", "float32", [2]]}',
        '{"array": ["x", "float32", [3]]}',
        '{"array": ["x", "float31", [2]]}',
        '{"array": ["x", "object", [1]]}',
        '{"array": ["x", "S4", [2]]}',
        '{"array": ["x", "m8", [1]]}',
        '{"array": [[], "float32", [2]]}',
        '[{"array": ["x", "float32", [2]]}, {"array": ["x", "float32", [2]]}]',
        '{"key": [5, {"array": ["x", "float32", [2]]}]}',
        '{"int": "0x"}',
        '{"complex": ["x"]}',
        '{"text": "x"}',
        "[" * 100_000,
    ],
)
def test_a_broken_header_is_a_clear_error(header: str) -> None:
    as_before({"x": np.ones(2, np.float32)}, header)
    with pytest.raises(ValueError, match=f"{REFUSED}the state dict in its header is broken: "):
        load("a.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"optimjax": 5}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": 5}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [0]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": ["0", "4"]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [0, 4.0]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [4, 0]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [0, 1000000000000]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [-4, 4]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [0, 3]}, "y": {"data_offsets": [2, 4]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [0, 1]}, "y": {"data_offsets": [2, 4]}}',
        b'{"__metadata__": {"optimjax": "1"}, "x": {"data_offsets": [0, 2]}}',
        b'{"__metadata__": {"optimjax-2": "1"}, "x": {"data_offsets": [0, 4]}}',
        b'{"__metadata__": {"optimjax-2": "1", "crc32": "00000000"}, "x": {"data_offsets": [0, 4]}}',
        b"\xff" * 20,
        b"[" * 100_000,
    ],
)
def test_a_crafted_header_is_a_clear_error(header: bytes) -> None:
    Path("a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=REFUSED):
        load("a.safetensors")


def test_a_header_longer_than_other_readers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.safetensors", {"before": 1})
    long = {"n": list(range(500))}
    save("b.safetensors", long)
    monkeypatch.setattr(files, "LONGEST_HEADER", 1000)
    with pytest.raises(ValueError, match=r"not an array takes 2,\d+ bytes, of which at most 1,000 can be saved"):
        save("a.safetensors", long)
    assert load("a.safetensors") == {"before": 1}
    with pytest.raises(ValueError, match=r"a header of 2,\d+ bytes"):
        load("b.safetensors")
    assert sorted(os.listdir()) == ["a.safetensors", "b.safetensors"]


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
        ("fifo", OSError, "cannot save to a named pipe: 'fifo'"),
        ("folder", IsADirectoryError, "cannot save to a folder: 'folder'"),
        ("loop", OSError, "symbolic links"),
        ("null", OSError, "cannot save to a device: 'null'"),
        ("socket", OSError, "cannot save to a socket: 'socket'"),
    ):
        mode = os.lstat(path).st_mode
        with pytest.raises(error, match=message):
            save(path, {"n": 1})
        assert os.lstat(path).st_mode == mode
    bound.close()
    assert sorted(os.listdir()) == ["fifo", "folder", "loop", "null", "socket"]
    with pytest.raises(ValueError, match="has written: it is a named pipe"):
        load("fifo")  # without waiting for somebody to write into it


def test_a_full_disk_is_an_oserror_and_leaves_the_file() -> None:
    resource = pytest.importorskip("resource")
    save("a.safetensors", {"before": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for array in (np.ones(100_000), np.ones((1000, 2000))[:, ::2]):
            with pytest.raises(OSError, match="File too large"):
                save("a.safetensors", {"x": array})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]


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
    from optimjax.files import save
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
