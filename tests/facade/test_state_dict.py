"""State dicts: PyTorch's layout, resuming, matching, misfits that change nothing."""

import collections
import copy
import functools
import json
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import optimjax as optim

SHAPES = [(3, 2), (3,), (3, 2)]
NAMES = ("base.kernel", "base.bias", "head.kernel")
VARIANTS = [pytest.param(case, index, id=f"{case}-{index}") for case in CASES for index in (0, 1)]


@functools.cache
def values(seed: int = 0, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in SHAPES)


def grads(step: int, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    return values(1000 + step, dtype)


def build(case: Case, index: int = 1, params: Any = None, **options: Any) -> Any:
    """Two groups, the second with a rate of its own."""
    a, b, c = map(optim.Parameter, case.fit(values() if params is None else params))
    options = {**case.variants()[index], **options}
    return case.optimizer([{"params": [a, b]}, {"params": [c], "lr": 0.02}], **options)


def boxes_of(optimizer: Any) -> list[Any]:
    return [box for group in optimizer.param_groups for box in group["params"]]


def run(optimizer: Any, start: int, stop: int) -> list[np.ndarray]:
    boxes = boxes_of(optimizer)
    for step in range(start, stop):
        for box, grad in zip(boxes, grads(step, boxes[0].dtype), strict=True):
            box.grad = grad.reshape(box.shape)
        optimizer.step()
    return [np.asarray(box) for box in boxes]


def plain(tree: Any) -> Any:
    """Comparable with ``==``: arrays become dtype and list."""
    return jax.tree.map(lambda x: (str(x.dtype), np.asarray(x).tolist()) if hasattr(x, "dtype") else x, tree)


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_layout_is_pytorchs(case: Case, index: int, torch: Any) -> None:
    ours = build(case, index)
    tensors = [torch.nn.Parameter(torch.from_numpy(v.copy())) for v in case.fit(values())]
    theirs = getattr(torch.optim, case.torch)(
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


def run_adam(steps: int = 2, **options: Any) -> Any:
    optimizer = build(CASES[1], 1, values(dtype=np.float32), **options)
    run(optimizer, 0, steps)
    return optimizer


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


# --- Resuming -------------------------------------------------------------------------------------------------------


def through_numpy(saved: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, saved)


def through_pickle(saved: Any) -> Any:
    return pickle.loads(pickle.dumps(saved))


def through_json(saved: Any) -> Any:
    """Keys become strings, tuples and arrays lists."""
    return json.loads(
        json.dumps(jax.tree.map(lambda x: np.asarray(x).tolist() if isinstance(x, jax.Array) else x, saved))
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    index=st.sampled_from([0, 1]),
    first=st.integers(0, 5),
    second=st.integers(0, 5),
    through=st.sampled_from([lambda saved: saved, through_numpy, through_pickle, through_json]),
)
def test_resuming_is_bit_for_bit(case: Case, index: int, first: int, second: int, through: Any) -> None:
    """Saved after any number of steps, loaded into an optimizer made with other options."""
    whole = build(case, index, values(dtype=np.float32))
    expected = run(whole, 0, first + second + 2)

    before = build(case, index, values(dtype=np.float32))
    params = run(before, 0, first)
    after = build(case, 1 - index, params, lr=0.7)
    after.load_state_dict(through(before.state_dict()))
    assert [group["lr"] for group in after.param_groups] == [case.base["lr"], 0.02]
    params = run(after, first, first + second)
    last = build(case, index, params)
    last.load_state_dict(through(after.state_dict()))
    assert_equal(run(last, first + second, first + second + 2), expected)
    ours, theirs = last.state_dict(), whole.state_dict()
    assert plain(ours["state"]) == plain(theirs["state"])
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])  # JSON has no tuples


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("saved_after", [0, 1, 7])
@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_a_run_of_pytorch_continues(case: Case, index: int, saved_after: int, torch: Any) -> None:
    tensors = [torch.nn.Parameter(torch.from_numpy(v.copy())) for v in case.fit(values())]
    theirs = getattr(torch.optim, case.torch)(
        [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.02}], **case.theirs(case.variants()[index])
    )

    def run_theirs(start: int, stop: int) -> None:
        for step in range(start, stop):
            for tensor, grad in zip(tensors, grads(step), strict=True):
                tensor.grad = case.torch_gradient(torch, torch.from_numpy(grad.reshape(tensor.shape)))
            theirs.step()

    run_theirs(0, saved_after)
    saved = theirs.state_dict()
    ours = build(case, 0, [t.detach().numpy() for t in tensors], lr=0.7)
    ours.load_state_dict(saved)
    run_theirs(saved_after, saved_after + 10)  # PyTorch overwrites its tensors: ours must be copies
    run(ours, saved_after, saved_after + 10)
    for box, tensor in zip(boxes_of(ours), tensors, strict=True):
        np.testing.assert_allclose(box.value, tensor.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_bfloat16_tensors_of_pytorch(torch: Any) -> None:
    tensor = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    theirs = torch.optim.Adam([tensor], lr=0.1)
    tensor.grad = torch.tensor([0.1, -0.2, 3.0], dtype=torch.bfloat16)
    theirs.step()
    ours = optim.Adam([jnp.ones(3, jnp.bfloat16)], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    (state,) = ours.state.values()
    assert state["step"] == 1
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(state[name], np.float32), theirs.state[tensor][name].to(torch.float32).numpy()
        )
    ours.step([jnp.ones(3, jnp.bfloat16)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_the_saved_dtype_is_kept(dtype: Any) -> None:
    """PyTorch casts the state to the parameter's dtype on loading, which loses it."""
    wide = optim.Adam({"w": jnp.ones(3, dtype)}, lr=0.1)
    wide.step({"w": jnp.full(3, 0.1, dtype)})
    narrow = optim.Adam({"w": jnp.ones(3, jnp.bfloat16)}, lr=0.1)
    narrow.load_state_dict(wide.state_dict())
    for _ in range(2):
        (state,) = narrow.state.values()
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        narrow.step({"w": jnp.ones(3, jnp.bfloat16)})
        assert narrow.params["w"].dtype == jnp.bfloat16


def test_plain_numbers_take_the_dtype_of_the_slot() -> None:
    """JSON has no arrays; and 1.0 is 1 to some who write it."""
    source = optim.NAdam({"w": jnp.ones(2, jnp.bfloat16)}, lr=0.1)
    source.step({"w": jnp.array([1, 0], jnp.bfloat16)})
    saved = jax.tree.map(lambda x: np.asarray(x).tolist() if isinstance(x, jax.Array) else x, source.state_dict())
    saved["state"][0]["exp_avg_sq"] = [1, 2**40]
    other = optim.NAdam({"w": jnp.ones(2, jnp.bfloat16)}, lr=0.1)
    other.load_state_dict(json.loads(json.dumps(saved)))
    (ours,), (theirs,) = other.state.values(), source.state.values()
    assert {k: v.dtype for k, v in ours.items() if k != "step"} == {
        k: v.dtype for k, v in theirs.items() if k != "step"
    }
    np.testing.assert_array_equal(ours.pop("exp_avg_sq").astype(float), [1, 2**40])
    assert plain(dict(ours)) == plain({k: v for k, v in theirs.items() if k != "exp_avg_sq"})


@pytest.mark.parametrize("value", [np.array([1.0, 2.0]), [1, 2], [1.0, 2 + 0j], jnp.array([1.0, 2.0], jnp.bfloat16)])
def test_a_complex_slot_takes_real_numbers(value: Any) -> None:
    optimizer = optim.SGD({"w": jnp.ones(2, complex)}, lr=0.1, momentum=0.5)
    optimizer.step({"w": jnp.ones(2, complex)})
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_buffer"] = value
    optimizer.load_state_dict(saved)
    optimizer.step({"w": jnp.array([2j, 0])})  # of which the buffer takes the conjugate
    (state,) = optimizer.state.values()
    np.testing.assert_array_equal(state["momentum_buffer"], np.array([0.5 - 2j, 1], np.complex64))


def test_a_loaded_rate_in_a_tensor_or_array_becomes_a_number(torch: Any) -> None:
    saved = run_adam().state_dict()
    for value in (torch.tensor(0.25), np.float32(0.25), np.asarray(0.25)):
        saved["param_groups"][0]["lr"] = value
        other = build(CASES[1])
        other.load_state_dict(saved)
        assert other.param_groups[0]["lr"] == 0.25
        assert type(other.param_groups[0]["lr"]) is float


def test_hyperparameters_that_the_saved_groups_lack_come_from_the_defaults() -> None:
    """A state dict of an older version."""
    saved = run_adam().state_dict()
    for group in saved["param_groups"]:
        del group["eps"], group["fused"]
    other = build(CASES[1], eps=1e-3)
    other.load_state_dict(saved)
    assert other.param_groups[0]["eps"] == 1e-3
    assert other.param_groups[0]["amsgrad"] is True


def test_param_groups_and_their_boxes_stay_the_same_objects() -> None:
    """A scheduler or a script may hold them."""
    optimizer = run_adam()
    groups, boxes = list(optimizer.param_groups), boxes_of(optimizer)
    optimizer.load_state_dict(run_adam(lr=0.3).state_dict())
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert all(a is b for a, b in zip(boxes, boxes_of(optimizer), strict=True))
    assert groups[0]["lr"] == 0.3


def test_a_smaller_state_replaces_the_larger() -> None:
    optimizer = run_adam()
    optimizer.load_state_dict(build(CASES[1]).state_dict())
    assert not optimizer.state


# --- Matching by name -----------------------------------------------------------------------------------------------


def named(order: tuple[int, ...], params: Any = None) -> Any:
    params = values(dtype=np.float32) if params is None else params
    return optim.Adam([(NAMES[i], optim.Parameter(params[i])) for i in order], lr=0.1)


def step_by_name(optimizer: Any, start: int, stop: int) -> dict[str, np.ndarray]:
    for step in range(start, stop):
        gradients = dict(zip(NAMES, grads(step, np.float32), strict=True))
        optimizer.step({name: gradients[name] for name in optimizer.param_groups[0]["param_names"]})
    return {name: np.asarray(value) for name, value in optimizer.params.items()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_reordered_parameters_are_matched_by_name(order: tuple[int, ...]) -> None:
    """The first and the last have one shape: by order their moments would swap without a word, as in PyTorch."""
    source = named((0, 1, 2))
    params = step_by_name(source, 0, 3)
    other = named(order, [params[name] for name in NAMES])
    other.load_state_dict(source.state_dict())
    assert other.param_groups[0]["param_names"] == [NAMES[i] for i in order]
    expected, after = step_by_name(source, 3, 6), step_by_name(other, 3, 6)
    for name in NAMES:
        np.testing.assert_array_equal(after[name], expected[name])


def test_without_names_on_one_side_order_decides() -> None:
    source = named((0, 1, 2))
    params = step_by_name(source, 0, 3)
    other = optim.Adam([optim.Parameter(params[name]) for name in NAMES])
    other.load_state_dict(source.state_dict())
    for step in range(3, 6):
        other.step(list(grads(step, np.float32)))
    assert_equal(other.params, step_by_name(source, 3, 6).values())


def test_a_tree_resumes_from_the_state_of_a_module() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    source = optim.Adam(model, lr=0.1)
    loss = lambda p, x: jnp.sum((x @ p["kernel"] + p["bias"][None]) ** 2)  # noqa: E731
    x = jnp.ones((4, 2))
    source.step(lambda m, x: jnp.sum(m(x) ** 2), x)
    other = optim.Adam({"kernel": model.kernel[...], "bias": model.bias[...]})
    other.load_state_dict(source.state_dict())
    source.step(lambda m, x: jnp.sum(m(x) ** 2), x)
    other.step(loss, x)
    np.testing.assert_allclose(other.params["kernel"], model.kernel[...], rtol=1e-6)


# --- Misfits --------------------------------------------------------------------------------------------------------


def edit(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A misfit made by editing a state dict."""

    def edited(saved: Any) -> Any:
        change(saved)
        return saved

    return edited


MISFITS = {
    "no state": (lambda s: {"param_groups": s["param_groups"]}, r"'state' and 'param_groups', got \['param_groups'\]"),
    "no groups": (lambda s: {"state": s["state"]}, r"got \['state'\]"),
    "a checkpoint around it": (lambda s: {"optimizer": s}, r"got \['optimizer'\]"),
    "empty": (lambda s: {}, r"got \[\]"),
    "a list": (lambda s: [s], "list"),
    "nothing": (lambda s: None, "None"),
    "fewer groups": (
        edit(lambda s: s["param_groups"].pop()),
        "different number of parameter groups: 1, the optimizer has 2",
    ),
    "more groups": (edit(lambda s: s["param_groups"].append(s["param_groups"][0])), "parameter groups: 3"),
    "fewer parameters": (edit(lambda s: s["param_groups"][0]["params"].pop()), "match the size of optimizer's group"),
    "more parameters": (
        edit(lambda s: s["param_groups"][1]["params"].append(3)),
        "match the size of optimizer's group",
    ),
    "a group without params": (edit(lambda s: s["param_groups"][1].pop("params")), "params"),
    "unknown id": (edit(lambda s: s["state"].update({7: s["state"][0]})), r"none of its groups: \[7\]"),
    "a shape": (
        edit(lambda s: s["state"][2].update(exp_avg=np.ones(3))),
        r"'exp_avg' has shape \(3,\), expected \(3, 2\)",
    ),
    "a transposed shape": (edit(lambda s: s["state"][0].update(exp_avg=np.ones((2, 3)))), r"has shape \(2, 3\)"),
    "an unknown slot": (
        edit(lambda s: s["state"][2].update(momentum_buffer=np.ones((3, 2)))),
        "'momentum_buffer', which Adam",
    ),
    "a missing slot": (edit(lambda s: s["state"][2].pop("exp_avg_sq")), r"lacks \['exp_avg_sq'\]"),
    "a slot of a flag": (edit(lambda s: s["state"][2].pop("max_exp_avg_sq")), r"lacks \['max_exp_avg_sq'\]"),
    "a missing step": (edit(lambda s: s["state"][2].pop("step")), r"lacks \['step'\]"),
    "only a step": (edit(lambda s: s["state"].update({2: {"step": 3}})), "lacks"),
    "an illegal value": (edit(lambda s: s["param_groups"][1].update(lr="fast")), r"lr of param_groups\[1\] is 'fast'"),
    "a slot that is no array": (edit(lambda s: s["state"][2].update(exp_avg="mean")), "exp_avg"),
    "a step that is no number": (edit(lambda s: s["state"][2].update(step=np.ones(2))), "step"),
    "a step in between": (edit(lambda s: s["state"][2].update(step=1.5)), "'step' is 1.5, which is not a whole number"),
    "a step below zero": (edit(lambda s: s["state"][2].update(step=-3)), "'step' is -3, which is not a whole number"),
    "an infinite step": (
        edit(lambda s: s["state"][2].update(step=np.inf)),
        "'step' is inf, which is not a whole number",
    ),
    "a step in text": (edit(lambda s: s["state"][2].update(step="3")), "'step' is '3', which is not a whole number"),
    "a ragged slot": (edit(lambda s: s["state"][2].update(exp_avg=[[1.0], [2.0, 3.0]])), "'exp_avg' is .* loaded"),
    "an unknown id in text": (edit(lambda s: s["state"].update({"7": {}})), r"none of its groups: \['7'\]"),
    "an id twice": (edit(lambda s: s["param_groups"][0].update(params=[0, 0])), "more than once in its groups: 0"),
    "an id in two groups": (edit(lambda s: s["param_groups"][1].update(params=[1])), "more than once in its groups: 1"),
    "a state twice": (edit(lambda s: s["state"].update({"2": s["state"][2]})), "state of parameter 2 twice"),
    "one beta": (edit(lambda s: s["param_groups"][1].update(betas=0.9)), "0.9, .* must be a tuple of 2 numbers$"),
} | {
    f"a slot of kind {dtype.__name__}": (
        edit(lambda s, dtype=dtype: s["state"][2].update(exp_avg=np.ones((3, 2), dtype))),
        rf"'exp_avg' is .* its dtype {np.dtype(dtype)} is of another kind than float32",
    )
    for dtype in (int, bool, complex)
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_raises_and_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    saved = copy.deepcopy(run_adam(steps=3, lr=0.3).state_dict())
    misfit = change(saved)
    optimizer = run_adam()
    before = plain(optimizer.state_dict())
    twin = run_adam()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(misfit)
    assert plain(optimizer.state_dict()) == before
    assert_equal(run(optimizer, 2, 4), run(twin, 2, 4))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("base.kernel", "base.bias", "tail.kernel"), r"missing \['head.kernel'\], unexpected \['tail.kernel'\]"),
        (("base.kernel", "base.bias", "base.bias"), r"missing \['head.kernel'\]"),
        (("base.kernel", "base.bias"), "names"),
    ],
)
def test_names_that_disagree(names: Any, message: str) -> None:
    source = named((0, 1, 2))
    step_by_name(source, 0, 2)
    saved = source.state_dict()
    saved["param_groups"][0]["param_names"] = list(names)
    optimizer = named((0, 1, 2))
    before = plain(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert plain(optimizer.state_dict()) == before


# --- A changed model ------------------------------------------------------------------------------------------------


def momentum(groups: dict[str, tuple[int, ...]] | list[dict[str, tuple[int, ...]]], lr: float = 0.1) -> Any:
    """SGD with momentum over named parameters of these shapes, in one group or several."""
    parts = groups if isinstance(groups, list) else [groups]
    named = [[(name, optim.Parameter(jnp.ones(shape))) for name, shape in part.items()] for part in parts]
    return optim.SGD([{"params": params} for params in named], lr=lr, momentum=0.9)


def stepped(optimizer: Any, value: float) -> Any:
    """After one step, whose gradients are the momenta then: ``value`` for the first parameter, then one more each."""
    for index, box in enumerate(boxes_of(optimizer)):
        box.grad = jnp.full(box.shape, value + index)
    optimizer.step()
    return optimizer


def momenta(optimizer: Any) -> list[Any]:
    states = (optimizer.state.get(box, {}) for box in boxes_of(optimizer))
    return [float(state["momentum_buffer"].ravel()[0]) if state else None for state in states]


@pytest.mark.parametrize(
    ("saved", "present", "loaded", "missing", "unexpected"),
    [
        ({"a": (2,), "b": (3,)}, {"b": (3,), "a": (2,)}, [6, 5], [], []),
        ({"a": (2,), "b": (3,)}, {"a": (2,), "new": (3,), "b": (3,)}, [5, None, 6], ["new"], []),
        ({"a": (2,), "b": (3,)}, {"b": (3,)}, [6], [], ["a"]),
        ({"a": (2,), "b": (3,)}, {"a": (2,), "b": (4,)}, [5, None], ["b"], ["b"]),
        ({"a": (2,)}, {"b": (2,)}, [None], ["b"], ["a"]),
        # A parameter that has moved to another group, and a group that has gone.
        ([{"a": (2,)}, {"b": (3,)}], {"a": (2,), "b": (3,)}, [5, 6], [], []),
        ([{"a": (2,), "b": (3,)}], [{"b": (3,)}, {"a": (2,)}], [6, 5], [], []),
        # Names that are unique only in their groups.
        ([{"w": (2,)}, {"w": (3,)}], [{"w": (2,)}, {"w": (3,)}], [5, 6], [], []),
        ([{"w": (2,)}], [{"w": (2,)}, {"w": (2,)}], [5, None], ["w"], []),
        ([{"w": (2,)}, {"w": (2,)}], [{"v": (2,)}, {"w": (2,)}], [None, 6], ["v"], ["w"]),
    ],
)
def test_partial_loading(saved: Any, present: Any, loaded: Any, missing: Any, unexpected: Any) -> None:
    optimizer = momentum(present)
    keys = optimizer.load_state_dict(stepped(momentum(saved), 5.0).state_dict(), strict=False)
    assert momenta(optimizer) == loaded
    assert keys == (missing, unexpected)
    assert (keys.missing_keys, keys.unexpected_keys) == (missing, unexpected)
    stepped(optimizer, 1.0)
    assert momenta(optimizer) == [pytest.approx(1 + i + 0.9 * (m or 0)) for i, m in enumerate(loaded)]


def test_what_has_no_match_stays_as_it_is() -> None:
    optimizer = stepped(momentum([{"a": (2,)}, {"b": (3,)}], lr=0.1), 1.0)
    optimizer.param_groups[1]["lr"] = 0.7
    assert optimizer.load_state_dict(momentum({"a": (2,)}, lr=0.5).state_dict(), strict=False) == (["b"], [])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.7]
    assert momenta(optimizer) == [None, 2]  # the saved run had done no step


def test_partial_loading_reads_as_in_pytorch(torch: Any) -> None:
    module = torch.nn.Linear(2, 3)
    theirs = [module.load_state_dict(d, strict=False) for d in (module.state_dict(), {"weight": torch.ones(3, 2)})]
    ours = []
    for names in ({"weight": (3, 2), "bias": (3,)}, {"weight": (3, 2)}):
        optimizer = momentum({"weight": (3, 2), "bias": (3,)})
        ours.append(optimizer.load_state_dict(momentum(names).state_dict(), strict=False))
    assert [repr(keys).lstrip("_") for keys in theirs] == [repr(keys) for keys in ours]


def test_partial_loading_needs_names_and_whole_entries() -> None:
    optimizer = momentum({"a": (2,), "b": (2,)})
    unnamed = optim.SGD([optim.Parameter(jnp.ones(2))], lr=0.1, momentum=0.9).state_dict()
    with pytest.raises(
        ValueError, match=r"size of optimizer's group: 1 parameters.*; strict=False needs names on both sides"
    ):
        optimizer.load_state_dict(unnamed, strict=False)
    corrupt = copy.deepcopy(stepped(momentum({"a": (2,)}), 5.0).state_dict())
    corrupt["state"][0]["momentum_buffer"] = "mean"
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(corrupt, strict=False)
    assert momenta(optimizer) == [None, None]


def test_state_of_another_algorithm() -> None:
    with pytest.raises(ValueError, match="which SGD does not keep"):
        build(CASES[0]).load_state_dict(build_and_run(CASES[1]))


def build_and_run(case: Case) -> Any:
    optimizer = build(case, 1, values(dtype=np.float32))
    run(optimizer, 0, 1)
    return optimizer.state_dict()


# --- An optimizer with a step of its own --------------------------------------------------------------------------


class Own(optim.Optimizer):
    """Keeps what it likes."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, dict(lr=lr))

    def step(self, *args: Any) -> None:
        """Nothing."""


Pair = collections.namedtuple("Pair", "a b")


def test_an_optimizer_with_a_step_of_its_own_gets_back_what_it_kept(torch: Any) -> None:
    kept = {
        "step": 0.5,
        "counts": np.array([2**40]),
        "wide": np.full(2, 1e-300),
        "texts": np.array(["a"]),
        "nothing": None,
        "name": "fast",
        "nested": [1, None, {"b": (jnp.ones(3), "x"), "a": Pair(1, {2})}],
        "recent": collections.deque([1.0, 2.0], maxlen=2),
        "function": len,
        "large": 2**70,
    }
    first, second = Own([optim.Parameter(1.0)]), Own([optim.Parameter(1.0)])
    first.state[boxes_of(first)[0]].update(kept)
    for _ in range(2):  # its own state dict, too
        second.load_state_dict(first.state_dict())
        (state,) = second.state.values()
        assert list(state) == list(kept)
        assert repr(dict(state)) == repr(kept)
        first.state[boxes_of(first)[0]] = state
    assert state["nested"][2]["b"][0] is kept["nested"][2]["b"][0]
    state["nested"][2]["b"] = state["nested"].append(3)
    state["counts"][0] = 0
    state["recent"].append(3.0)
    assert len(kept["nested"]) == 3
    assert kept["counts"][0] == 2**40
    assert list(kept["recent"]) == [1, 2]


def test_its_arrays_become_those_of_jax_where_these_can_hold_them(torch: Any) -> None:
    arrays = {"n32": np.ones(2, np.float32), "t32": torch.ones(2), "i": np.array(3, np.int32)}
    arrays |= {"n64": np.ones(2), "t64": torch.ones(2, dtype=torch.float64)}
    optimizer = Own([optim.Parameter(1.0)])
    optimizer.load_state_dict({"state": {0: arrays}, "param_groups": [{"params": [0]}]})
    (state,) = optimizer.state.values()
    for array in (arrays["n32"], arrays["t32"], arrays["n64"], arrays["t64"]):
        array *= 2
    assert {name: (type(x), str(x.dtype)) for name, x in state.items()} == {
        "n32": (type(jnp.ones(1)), "float32"),
        "t32": (type(jnp.ones(1)), "float32"),
        "i": (type(jnp.ones(1)), "int32"),
        "n64": (np.ndarray, "float64"),
        "t64": (np.ndarray, "float64"),
    }
    assert all(np.all(np.asarray(x) % 2 == 1) for x in state.values())


def beside(optimizer: Any) -> dict[Any, Any]:
    return {key: dict(value) for key, value in optimizer.state.items() if isinstance(key, str)}


def test_state_beside_the_parameters_is_saved_and_loaded_as_in_pytorch(torch: Any) -> None:
    def script(optimizers: Any) -> Any:
        first, second = optimizers
        first.step()
        first.state["global"] = {"count": 3, "history": [1.0]}
        first.state["b"]["x"] = 1
        saved = first.state_dict()
        first.state["global"]["count"] = 4
        second.state["old"] = {"y": 2}
        second.load_state_dict(saved)
        loaded = beside(second)
        second.load_state_dict({**saved, "state": {key: value for key, value in saved["state"].items() if key == 0}})
        return list(saved["state"]), loaded, beside(second)

    def theirs() -> Any:
        tensor = torch.nn.Parameter(torch.ones(()))
        tensor.grad = torch.ones(())
        return torch.optim.SGD([tensor], lr=0.1, momentum=0.9)

    ours = [optim.SGD([optim.Parameter(1.0)], lr=0.1, momentum=0.9) for _ in range(2)]
    boxes_of(ours[0])[0].grad = jnp.ones(())
    keys, loaded, after = script(ours)
    assert keys == [0, "global", "b"]
    assert loaded == {"global": {"count": 3, "history": [1.0]}, "b": {"x": 1}}
    expected = script([theirs(), theirs()])
    expected[1]["global"]["count"] = 3  # PyTorch's state dict is no snapshot
    assert (keys, loaded, after) == expected


def test_state_beside_the_parameters_through_json_and_partly() -> None:
    first, second = run_adam(), run_adam()
    first.state["global"] = {"count": 3, "values": np.ones(1)}
    saved = first.state_dict()
    saved["state"] = {str(key): value for key, value in saved["state"].items()}
    second.state["mine"] = {"x": 1}
    before = [plain(dict(entries)) for entries in second.state.values()]
    with pytest.raises(ValueError, match="match the size of optimizer's group"):
        second.load_state_dict({**saved, "param_groups": saved["param_groups"][:1] * 2})
    assert [plain(dict(entries)) for entries in second.state.values()] == before
    second.load_state_dict(saved)
    assert beside(second) == {"global": {"count": 3, "values": np.ones(1)}}
    second.state["global"]["values"][0] = 7
    assert saved["state"]["global"]["values"] == first.state["global"]["values"] == 1

    changed = momentum({"a": (2,)})
    changed.state["mine"] = {"x": 1}
    changed.load_state_dict(momentum({"b": (2,)}).state_dict(), strict=False)
    assert beside(changed) == {"mine": {"x": 1}}


def test_a_subclass_completes_an_old_checkpoint_where_it_does_in_pytorch(torch: Any) -> None:
    def script(base: Any, parameter: Any) -> Any:
        log: list[Any] = []

        class Newer(base):
            def __setstate__(self, state: Any) -> None:
                super().__setstate__(state)
                log.append(sorted(state))
                for group in self.param_groups:
                    group.setdefault("newopt", 7)

        old, new = base([parameter], lr=0.1), Newer([parameter], lr=0.2)
        new.register_load_state_dict_post_hook(lambda o: log.append(o.param_groups[0]["newopt"]))
        new.load_state_dict(old.state_dict())
        return log, new.param_groups[0]["lr"], new.param_groups[0]["newopt"]

    theirs = script(torch.optim.SGD, torch.nn.Parameter(torch.ones(())))
    assert script(optim.SGD, optim.Parameter(1.0)) == theirs == ([["param_groups", "state"], 7], 0.1, 7)


def test_a_subclass_that_refuses_what_was_loaded_keeps_what_it_had() -> None:
    class Strict(optim.SGD):
        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            if self.param_groups[0]["lr"] > 0.5:
                raise ValueError("too fast")

    slow, fast = (Strict({"w": jnp.ones(2)}, lr=lr, momentum=0.9) for lr in (0.1, 0.7))
    fast.step({"w": jnp.ones(2)})
    for optimizer in (slow, stepped(copy.copy(slow), 2.0)):
        before = plain(optimizer.state_dict())
        with pytest.raises(ValueError, match="too fast"):
            optimizer.load_state_dict(fast.state_dict())
        assert plain(optimizer.state_dict()) == before


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


# --- Damaged or hostile ones -----------------------------------------------------------------------------------------


def holds_itself(kind: type) -> Any:
    node: Any = kind()
    node.append(node) if kind is list else node.update(x=node)
    return node


def deleted() -> Any:
    array = jnp.zeros(2)
    array.delete()
    return array


@pytest.mark.parametrize(
    "place",
    [
        ("state",),
        ("state", 0),
        ("state", 0, "step"),
        ("state", 0, "exp_avg"),
        ("state", 0, "own"),
        ("state", "own"),
        ("param_groups",),
        ("param_groups", 0),
        ("param_groups", 0, "lr"),
        ("param_groups", 0, "params"),
        ("param_groups", 0, "param_names"),
        ("param_groups", 0, "own"),
    ],
    ids=lambda place: ".".join(map(str, place)),
)
@pytest.mark.parametrize(
    "make",
    [lambda: holds_itself(list), lambda: holds_itself(dict), deleted],
    ids=["a list in itself", "a dict in itself", "deleted"],
)
def test_what_cannot_be_read_is_an_error_of_the_state_dict(place: tuple[Any, ...], make: Callable[[], Any]) -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    optimizer.step({"w": jnp.ones(2)})
    node = saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = make()
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(saved)
    jax.tree.map(np.testing.assert_array_equal, optimizer.state_dict()["state"], before["state"])
    optimizer.step({"w": jnp.ones(2)})


def test_a_count_that_nothing_can_be_computed_with_is_refused() -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    optimizer.step({"w": jnp.ones(2)})
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 10**400
    with pytest.raises(ValueError, match=r"'step' is .*which is not a whole number"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["step"] = 10**300
    optimizer.load_state_dict(saved)
    optimizer.step({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="more than the functional state can count"):
        optimizer.functional_state()


@pytest.mark.parametrize("key", [5, (1, 2), None, 1.5])
def test_keys_that_are_no_names_are_kept_and_shown(key: Any) -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    optimizer.step({"w": jnp.ones(2)})
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = saved["state"][0][key] = 1
    optimizer.load_state_dict(saved)
    assert str(key) in repr(optimizer)
    assert str(key) in optimizer._repr_html_()
    optimizer.step({"w": jnp.ones(2)})
    assert optimizer.state_dict()["state"][0][key] == 1


@pytest.mark.parametrize(
    "dtypes", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32)]
)
def test_a_state_of_another_dtype_crosses_and_comes_back(dtypes: Any) -> None:
    saved, present = dtypes
    source, optimizer = (optim.NAdam({"w": jnp.ones(3, dtype)}) for dtype in dtypes)
    source.step({"w": jnp.ones(3, saved)})
    optimizer.load_state_dict(source.state_dict())
    params, state = optimizer.functional_state()
    assert state.exp_avg["w"].dtype == saved
    optimizer.load_functional_state(params, state)
    optimizer.step({"w": jnp.ones(3, present)})
    with pytest.raises(ValueError, match=r"'state\.exp_avg\.w' has shape and dtype"):
        optimizer.load_functional_state(params, state._replace(exp_avg={"w": jnp.ones(3, int)}))
