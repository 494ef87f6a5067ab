"""Saving to one file: what comes back, what is refused, and a file that is whole whatever happens."""

import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import optimjax as optim
from optimjax.files import load, save

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int32", "int64", "uint8", "bool"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
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
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
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


def test_a_truncated_or_foreign_file_is_a_clear_error() -> None:
    save("a.safetensors", {"x": np.arange(5.0)})
    whole = Path("a.safetensors").read_bytes()
    for size in range(len(whole)):
        Path("a.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"'a.safetensors' is truncated, or no file that optim.save has written"):
            load("a.safetensors")
    import safetensors.numpy

    Path("b.safetensors").write_bytes(safetensors.numpy.save({"x": np.ones(2)}))
    Path("c.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    for name, reason in (("b", r"has written: its header has no 'optimjax'$"), ("c", r"has written: \w+")):
        with pytest.raises(ValueError, match=f"'{name}.safetensors' is truncated, or no file that optim.save {reason}"):
            load(f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        load("d.safetensors")
    with pytest.raises(FileNotFoundError):
        save("missing/folder.safetensors", {})


@pytest.mark.parametrize(
    "header",
    [
        "nope",
        '{"dict": 5}',
        '{"dict": [[[], 1]]}',
        '{"dict": [], "tuple": []}',
        '{"array": ["y", "float32", [2]]}',
        '{"array": ["x", "float32", [3]]}',
        '{"array": ["x", "float31", [2]]}',
        '{"array": ["x", "object", [1]]}',
        '{"array": [[], "float32", [2]]}',
        '{"key": [5, {"array": ["x", "float32", [2]]}]}',
        "[" * 100_000,
    ],
)
def test_a_broken_header_is_a_clear_error(header: str) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.ones(2, np.float32)}, "a.safetensors", {"optimjax": header})
    with pytest.raises(ValueError, match=r"no file that optim.save has written: 'optimjax' in its header is broken: "):
        load("a.safetensors")


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
