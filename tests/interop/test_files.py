"""What is saved to a file comes back as it was, and what cannot be saved is named."""

import math
import os
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
from saved_trees import same

import optimjax as optim
from optimjax._facade.files import load, save

pytestmark = pytest.mark.usefixtures("folder")

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int32", "int64", "uint8", "bool"]


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


def test_what_is_saved_twice_has_the_same_bytes() -> None:
    tree = {"x": np.ones(2), "y": [jnp.ones(3), {"z": np.ones(1, np.int8)}], "n": 1}
    save("a.safetensors", tree)
    save("b.safetensors", tree)
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


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
