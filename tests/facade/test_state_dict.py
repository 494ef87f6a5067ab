"""A state dict has PyTorch's layout, is a snapshot, and shares nothing with a copy of the optimizer."""

import collections
import copy
import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx
from saved_runs import VARIANTS, assert_equal, boxes_of, build, grads, plain, run, run_adam, values

import optimjax as optim

# --- Layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_layout_is_pytorchs(case: Case, index: int, torch: Any) -> None:
    ours = build(case, index)
    tensors = [torch.nn.Parameter(torch.from_numpy(v.copy())) for v in case.fit(values())]
    theirs = case.reference(torch)(
        [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.02}], **case.theirs(case.variants()[index])
    )
    for step in range(3):
        run(ours, step, step + 1)
        for tensor, grad in zip(tensors, grads(step), strict=True):
            tensor.grad = case.torch_gradient(torch, torch.from_numpy(grad.reshape(tensor.shape)))
        theirs.step()
    saved, expected = ours.state_dict(), theirs.state_dict()
    assert list(saved) == list(expected)
    assert [case.theirs(group) for group in saved["param_groups"]] == expected["param_groups"]
    assert [list(group)[-1] for group in saved["param_groups"]] == ["params", "params"]
    for number in range(3):
        entries = saved["state"].get(number, {})
        wanted = {k: v for k, v in expected["state"].get(number, {}).items() if v is not None}
        assert entries.keys() == wanted.keys()
        for name, value in entries.items():
            np.testing.assert_allclose(np.asarray(value), np.asarray(wanted[name]), rtol=1e-12, atol=1e-14)


def test_only_parameters_with_state_appear_and_numbers_follow_the_groups() -> None:
    optimizer = optim.Adam([{"params": [jnp.ones(1), jnp.ones(2)]}, {"params": [jnp.ones(3)]}])
    assert optimizer.state_dict()["state"] == {}
    optimizer.step([[None, jnp.ones(2)], [jnp.ones(3)]])
    saved = optimizer.state_dict()
    assert list(saved["state"]) == [1, 2]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2]]


def test_names_are_saved_where_there_are_names() -> None:
    named = optim.SGD(nnx.Linear(2, 2, rngs=nnx.Rngs(0))).state_dict()["param_groups"][0]
    assert named["param_names"] == ["bias", "kernel"]
    assert "param_names" not in optim.SGD([optim.Parameter(1.0)]).state_dict()["param_groups"][0]


def test_only_arrays_and_plain_values() -> None:
    saved = run_adam().state_dict()
    leaves = jax.tree.leaves(saved)
    assert all(isinstance(leaf, (jax.Array, int, float, bool, str)) for leaf in leaves)
    json.dumps(saved["param_groups"])


# --- A snapshot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_a_state_dict_is_a_snapshot(case: Case, index: int) -> None:
    optimizer = build(case, index, values(dtype=np.float32))
    run(optimizer, 0, 2)
    saved = optimizer.state_dict()
    before = plain(saved)
    run(optimizer, 2, 4)
    optimizer.param_groups[0]["lr"] = 0.9
    assert plain(saved) == before


@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_a_loaded_dict_is_left_alone_and_serves_twice(case: Case, index: int) -> None:
    source = build(case, index, values(dtype=np.float32))
    run(source, 0, 2)
    saved = source.state_dict()
    before = plain(saved)
    first, second = (build(case, index, source_values(source)) for _ in range(2))
    first.load_state_dict(saved)
    expected = run(first, 2, 5)
    assert plain(saved) == before
    second.load_state_dict(saved)
    second.load_state_dict(saved)  # loading twice is loading once
    assert_equal(run(second, 2, 5), expected)
    assert_equal(run(source, 2, 5), expected)
    assert plain(saved) == before


def source_values(optimizer: Any) -> list[np.ndarray]:
    return [np.asarray(box) for box in boxes_of(optimizer)]


def test_numpy_arrays_that_were_loaded_may_be_overwritten() -> None:
    source = run_adam()
    saved = jax.tree.map(lambda x: np.array(x) if isinstance(x, jax.Array) else x, source.state_dict())
    other = build(CASES[1], 1, source_values(source))
    other.load_state_dict(saved)
    for entries in saved["state"].values():
        for value in entries.values():
            if isinstance(value, np.ndarray):
                value[...] = 0
    assert_equal(run(other, 2, 4), run(source, 2, 4))


@pytest.mark.parametrize(
    "value", [np.full(1, 0.5), [0.5, {"a": [1]}], {"a": [np.ones(2)]}, collections.deque([1, 2], 2)]
)
def test_what_can_be_edited_in_place_is_copied_out_and_in(value: Any) -> None:
    def edit(group: Any) -> None:
        inner = group["own"]
        if isinstance(inner, np.ndarray):
            inner *= 0.5
        elif isinstance(inner, dict):
            inner["a"][0] *= 3
        elif isinstance(inner, list):
            inner[1]["a"].append(2)
        else:
            inner.append(3)

    first, second = run_adam(), run_adam()
    first.param_groups[0]["own"] = value
    original = copy.deepcopy(value)
    saved = first.state_dict()
    edit(first.param_groups[0])
    np.testing.assert_equal(saved["param_groups"][0]["own"], original)
    second.load_state_dict(saved)
    assert type(second.param_groups[0]["own"]) is type(original)
    edit(second.param_groups[0])
    np.testing.assert_equal(saved["param_groups"][0]["own"], original)


def test_arrays_of_jax_are_shared() -> None:
    first, second = run_adam(), run_adam()
    saved = first.state_dict()
    second.load_state_dict(saved)
    for source in (first, second):
        for number, box in enumerate(boxes_of(source)):
            assert source.state[box]["exp_avg"] is saved["state"][number]["exp_avg"]
    assert_equal(run(first, 2, 4), run(second, 2, 4))  # and yet each step has memory of its own


# --- Copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_a_deep_copy_continues_independently_and_identically(case: Case, index: int) -> None:
    optimizer = build(case, index, values(dtype=np.float32))
    run(optimizer, 0, 3)
    twin = copy.deepcopy(optimizer)
    before = plain(twin.state_dict()), source_values(twin)
    expected = run(optimizer, 3, 6)
    assert plain(twin.state_dict()) == before[0]
    assert_equal(source_values(twin), before[1])
    assert_equal(run(twin, 3, 6), expected)


def test_a_deep_copy_of_the_optimizer_of_a_module_has_a_module_of_its_own() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    loss = lambda m, x: jnp.sum(m(x) ** 2)  # noqa: E731
    optimizer = optim.Adam(model, lr=0.1)
    optimizer.step(loss, jnp.ones((4, 2)))
    twin = copy.deepcopy(optimizer)
    assert twin.params is not model
    assert boxes_of(twin) == list(optim.parameters(twin.params))
    frozen = np.asarray(twin.params.kernel[...])
    optimizer.step(loss, jnp.ones((4, 2)))
    np.testing.assert_array_equal(frozen, twin.params.kernel[...])
    twin.backward(loss, jnp.ones((4, 2)))
    assert all(box.grad is None for box in optim.parameters(model))
    twin.step()
    np.testing.assert_allclose(twin.params.kernel[...], model.kernel[...], rtol=1e-6)


@pytest.mark.parametrize("params", [lambda model: model, optim.parameters], ids=["module", "boxes"])
def test_module_and_optimizer_copied_together_stay_together(params: Any) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    loss = lambda m, x: jnp.sum(m(x) ** 2)  # noqa: E731
    optimizer = optim.Adam(params(model), lr=0.1)
    optimizer.backward(loss, *([] if optimizer.params is model else [model]), jnp.ones((4, 2)))
    optimizer.step()
    other, twin = copy.deepcopy((model, optimizer))
    assert boxes_of(twin) == list(optim.parameters(other))
    frozen = np.asarray(model.kernel[...])
    twin.step()
    assert not np.array_equal(other.kernel[...], frozen)
    np.testing.assert_array_equal(model.kernel[...], frozen)


def test_a_deep_copy_of_a_tree_optimizer_shows_its_own_params() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2), "f": jnp.tanh}, lr=0.5)
    twin = copy.deepcopy(optimizer)
    optimizer.step({"w": jnp.ones(2), "f": None})
    np.testing.assert_array_equal(twin.params["w"], [1, 1])
    twin.step({"w": jnp.full(2, 2.0), "f": None})
    np.testing.assert_array_equal(twin.params["w"], [0, 0])
    np.testing.assert_array_equal(optimizer.params["w"], [0.5, 0.5])


def test_a_dict_whose_every_leaf_became_a_numpy_array_loads() -> None:
    saved = run_adam(steps=3).state_dict()
    optimizer = run_adam()
    optimizer.load_state_dict(jax.tree.map(np.asarray, saved))
    assert plain(optimizer.state_dict()) == plain(saved)
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_an_optimizer_pickles() -> None:
    optimizer = run_adam()
    twin = pickle.loads(pickle.dumps(optimizer))
    assert_equal(run(twin, 2, 4), run(optimizer, 2, 4))
