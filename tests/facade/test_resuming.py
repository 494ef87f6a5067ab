"""A run resumes bit for bit from a state dict, ours or PyTorch's, and parameters with names are matched by name."""

import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_runs import (
    NAMES,
    VARIANTS,
    assert_equal,
    boxes_of,
    build,
    grads,
    named,
    plain,
    run,
    run_adam,
    step_by_name,
    values,
)

import optimjax as optim

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
    theirs = case.reference(torch)(
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


def test_param_groups_and_their_parameters_stay_the_same_objects() -> None:
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
