"""Gradients of parameters are clipped by norm and by value as in ``torch.nn.utils``, and bad inputs are refused."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from clipping_cases import INF, boxes
from flax import nnx
from jax.experimental.sparse import BCOO

import optimjax as optim

GRADS = [np.array([3.0, -4.0]), np.array([[0.5, 0.0], [1.0, 2.0]]), np.array(-0.25)]


def tensors(torch: Any, grads: Any) -> list[Any]:
    made = [torch.nn.Parameter(torch.zeros_like(torch.as_tensor(grad))) for grad in grads]
    for tensor, grad in zip(made, grads, strict=True):
        tensor.grad = torch.tensor(grad)
    return made


def assert_same(ours: Any, theirs: Any) -> None:
    for box, tensor in zip(ours, theirs, strict=True):
        assert box.grad.dtype == tensor.grad.numpy().dtype
        np.testing.assert_allclose(box.grad, tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


# --- The norm, alongside PyTorch's ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1, 2, 2.0, 3, 3.5, 0.5, INF, "inf", "2"])
@pytest.mark.parametrize("max_norm", [1.0, 2, 1000.0, 0, INF, -1.0])
def test_every_norm_is_pytorchs(norm_type: Any, max_norm: Any, torch: Any) -> None:
    ours, theirs = boxes(GRADS), tensors(torch, GRADS)
    norm = optim.clip_grad_norm_(ours, max_norm, norm_type)
    np.testing.assert_allclose(
        norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type), rtol=1e-12, atol=1e-12
    )
    assert_same(ours, theirs)
    if max_norm in (1000.0, INF) and norm_type != 0.5:
        for box, grad in zip(ours, GRADS, strict=True):
            np.testing.assert_array_equal(box.grad, grad)  # within bounds they stay as they are, to the last bit


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1, 2, 3.5, INF])
def test_complex_gradients_are_pytorchs(norm_type: Any, torch: Any) -> None:
    grads = [np.array([3 + 4j, 1j, -2]), np.array([1.0, -6.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    norm = optim.clip_grad_norm_(ours, 1.0, norm_type)
    assert norm.dtype == np.float64
    np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type), rtol=1e-12)
    assert_same(ours, theirs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1, 2, INF])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spreads_as_in_pytorch(value: float, norm_type: Any, torch: Any) -> None:
    grads = [np.array([value, 1.0]), np.array([2.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    norm = optim.clip_grad_norm_(ours, 1.0, norm_type)
    np.testing.assert_array_equal(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type))
    assert_same(ours, theirs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_error_on_request_before_anything_changes(value: float, torch: Any) -> None:
    grads = [np.array([value, 1.0], np.float32), np.array([2.0], np.float32)]
    ours, theirs = boxes(grads), tensors(torch, grads)
    with pytest.raises(RuntimeError, match=r"order 2\.0 .* is non-finite"):
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"order 2\.0 .* is non-finite"):
        optim.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    for box, grad in zip(ours, grads, strict=True):
        np.testing.assert_array_equal(box.grad, grad)
    assert optim.clip_grad_norm_(ours[1:], 1.0, error_if_nonfinite=True) == 2  # the others are finite


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("value", "max_norm"), [(3e4, 1e3), (1e-5, 1e-3)])
def test_half_precision_is_summed_in_single(dtype: str, value: float, max_norm: float, torch: Any) -> None:
    """A norm of 3e6 is more than float16 can hold, and the square of 1e-5 less."""
    grad = np.asarray(jnp.full(10_000, value, dtype))
    (box,) = boxes([grad])
    (tensor,) = tensors(torch, [grad.astype(np.float32)])
    norm = optim.clip_grad_norm_(box, max_norm)
    assert (norm.dtype, box.grad.dtype) == (np.float32, grad.dtype)
    np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(tensor, max_norm), rtol=1e-5)
    np.testing.assert_array_equal(box.grad, tensor.grad.numpy().astype(grad.dtype))


@pytest.mark.usefixtures("x64")
def test_each_gradient_keeps_its_dtype(torch: Any) -> None:
    grads = [np.array([3.0], np.float32), np.array([4.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    assert optim.clip_grad_norm_(ours, 1.0).dtype == np.float64
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert [box.grad.dtype for box in ours] == [np.float32, np.float64]
    np.testing.assert_allclose(ours[0].grad, theirs[0].grad, rtol=1e-7)
    np.testing.assert_allclose(ours[1].grad, theirs[1].grad, rtol=1e-12)


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, INF])
def test_zero_gradients_stay_zero(norm_type: Any) -> None:
    ours = boxes([np.zeros(3, np.float32), np.zeros(0, np.float32)])
    assert optim.clip_grad_norm_(ours, 1.0, norm_type) == 0
    assert ours[0].grad.tolist() == [0, 0, 0]
    assert ours[1].grad.shape == (0,)


def test_no_gradients_at_all() -> None:
    w = optim.Parameter(jnp.ones(2))
    for none in ([], [w], w, iter([w])):
        assert optim.clip_grad_norm_(none, 1.0, error_if_nonfinite=True) == 0
        optim.clip_grad_value_(none, 1.0)
    assert w.grad is None
    grads, norm = optim.clip_grad_norm({"w": None}, 1.0)
    assert (grads, float(norm)) == ({"w": None}, 0)
    assert optim.clip_grad_value({"w": None}, 1.0) == {"w": None}


# --- What is handed in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hand_in",
    [
        list,
        tuple,
        iter,
        lambda made: (box for box in made),
        lambda made: filter(lambda box: box.requires_grad, made),
        lambda made: optim.SGD(made, lr=0.1),
        lambda made: optim.SGD([{"params": made[:1]}, {"params": made[1:]}], lr=0.1),
        lambda made: optim.parameters(optim.SGD(made, lr=0.1)),
    ],
    ids=["list", "tuple", "iterator", "generator", "filter", "optimizer", "groups", "parameters of an optimizer"],
)
def test_parameters_may_come_in_every_form(hand_in: Any) -> None:
    made = [*boxes([np.array([3.0], np.float32), np.array([4.0], np.float32)]), optim.Parameter(jnp.ones(2))]
    assert optim.clip_grad_norm_(hand_in(made), 1.0, foreach=True) == 5
    np.testing.assert_allclose([made[0].grad[0], made[1].grad[0]], [0.6, 0.8], rtol=1e-5)
    optim.clip_grad_value_(hand_in(made), 0.7, foreach=False)
    np.testing.assert_allclose([made[0].grad[0], made[1].grad[0]], [0.6, 0.7], rtol=1e-5)
    assert made[2].grad is None


def test_a_single_parameter_and_the_parameters_of_a_module() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(lambda model: 100 * jnp.sum(model(jnp.ones((4, 2)))))
        norm = optim.clip_grad_norm_(optim.parameters(model), max_norm=1.0)
        np.testing.assert_allclose(norm, 1200, rtol=1e-5)
        np.testing.assert_allclose(sum(jnp.sum(box.grad**2) for box in optim.parameters(model)), 1, rtol=1e-5)
        optim.clip_grad_value_(dict(optim.named_parameters(model))["bias"], 0.25)
        assert dict(optim.named_parameters(model))["bias"].grad.tolist() == [0.25, 0.25, 0.25]


def test_an_exhausted_generator_warns_as_in_pytorch(torch: Any) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    parameters = optim.parameters(model)
    optim.SGD(parameters, lr=0.1)
    with pytest.warns(UserWarning, match="is an empty generator, no gradient clipping will occur") as ours:
        optim.clip_grad_norm_(parameters, 1.0)
    assert ours[0].filename == __file__
    with pytest.warns(UserWarning, match="is an empty generator, no gradient clipping will occur"):
        torch.nn.utils.clip_grad_norm_((p for p in []), 1.0)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm_, optim.clip_grad_value_])
@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "Linear"),
        ({"w": optim.Parameter(1.0)}, "dict"),
        ([optim.Parameter(1.0), jnp.ones(2)], "float32 array"),
        ([("w", optim.Parameter(1.0))], "tuple"),
        (None, "NoneType"),
        (3.0, "float"),
    ],
    ids=["module", "dict", "arrays", "named", "None", "number"],
)
def test_what_are_no_parameters(clip: Any, parameters: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"must be Parameters or an optimizer, but this is a {found}: give"):
        clip(parameters, 1.0)


@pytest.mark.parametrize(
    ("norm_type", "error"),
    [(value, ValueError) for value in (0, -1, -INF, float("nan"), "foo")] + [(None, TypeError), ([2], TypeError)],
)
def test_a_norm_that_is_none(norm_type: Any, error: Any) -> None:
    """PyTorch takes 0 and less, and returns what is not a norm of all gradients: 0 counts arrays, not elements."""
    (box,) = boxes([np.ones(2, np.float32)])
    for call in (lambda: optim.clip_grad_norm_(box, 0.1, norm_type), lambda: optim.clip_grad_norm([], 0.1, norm_type)):
        with pytest.raises(error, match=rf"norm_type.*{re.escape(repr(norm_type))}"):
            call()
    assert box.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    "limit", [None, "1", [1.0], np.ones(2), {"w": 1.0}, 1j, np.complex64(1), np.str_("1"), np.array(None)], ids=str
)
def test_a_limit_that_is_no_number(limit: Any) -> None:
    (box,) = boxes([np.ones(2, np.float32)])
    for clip, name in ((optim.clip_grad_norm_, "max_norm"), (optim.clip_grad_value_, "clip_value")):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            clip(box, limit)
    for pure, name in ((optim.clip_grad_norm, "max_norm"), (optim.clip_grad_value, "clip_value")):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            pure({"w": jnp.ones(2)}, limit)
    assert box.grad.tolist() == [1, 1]


def test_a_limit_that_is_too_large() -> None:
    (box,) = boxes([np.ones(2, np.float32)])
    for clip, name in ((optim.clip_grad_norm_, "max_norm"), (optim.clip_grad_value_, "clip_value")):
        with pytest.raises(ValueError, match=f"{name} must be a number that fits into a float, got 10000"):
            clip(box, 10**400)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
@pytest.mark.parametrize(("grad", "kind"), [(jnp.arange(2), "int32 array"), (1.0, "float"), ("x", "str")])
def test_a_gradient_that_is_no_floating_array_is_named(clip: Any, grad: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"gradient 'head\.0' must be a floating array, got {kind}"):
        clip({"base": jnp.ones(2), "head": [grad]}, 1.0)


def test_the_pure_twins_refuse_parameters() -> None:
    """An underscore was forgotten: their values are not gradients."""
    made = boxes([np.ones(2, np.float32)])
    for pure, name in ((optim.clip_grad_norm, "clip_grad_norm"), (optim.clip_grad_value, "clip_grad_value")):
        for given, found in ((made, "'0' is a Parameter"), (made[0], "'grads' is a Parameter")):
            with pytest.raises(TypeError, match=f"{found}: {name} takes .* gradients; {name}_ is for parameters"):
                pure(given, 1.0)
        with pytest.raises(TypeError, match=f"'grads' is a SGD: .* {name}_ is for parameters and optimizers"):
            pure(optim.SGD(made, lr=0.1), 1.0)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
def test_a_tensor_is_no_gradient(clip: Any, torch: Any) -> None:
    with pytest.raises(TypeError, match="gradient 'w' must be a floating array, got Tensor"):
        clip({"w": torch.ones(2)}, 1.0)


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("clip_value", [1.0, 1, 0.3, 0, INF, -1.0])
def test_values_are_pytorchs(clip_value: float, torch: Any) -> None:
    grads = [*GRADS, np.array([np.nan, np.inf, -np.inf, 0.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    optim.clip_grad_value_(ours, clip_value)
    torch.nn.utils.clip_grad_value_(theirs, clip_value)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_clamping_keeps_the_dtype(dtype: str) -> None:
    grad = jnp.array([3, -0.25, -4], dtype) * (1 + 1j if dtype == "complex64" else 1)
    clamped = optim.clip_grad_value(grad, 1e6)
    assert clamped.dtype == grad.dtype
    np.testing.assert_array_equal(clamped, grad)
    clamped = optim.clip_grad_value(grad, np.float64(0.5))
    assert clamped.dtype == grad.dtype
    for part in (jnp.real, jnp.imag):
        np.testing.assert_array_equal(part(clamped), np.clip(part(grad), -0.5, 0.5))


def test_sparse_gradients_on_parameters() -> None:
    """Their norms and values are in the tests of SparseAdam; here with an error on request."""
    table = optim.Parameter(jnp.ones((5, 2)))
    table.grad = BCOO((jnp.array([[3.0, np.nan], [4.0, 0.0]]), jnp.array([[1], [1]])), shape=(5, 2))
    before = table.grad
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_([table], 1.0, error_if_nonfinite=True)
    assert table.grad is before
    table.grad = BCOO((jnp.array([[3.0, 0.0], [4.0, 0.0]]), jnp.array([[1], [1]])), shape=(5, 2))
    assert optim.clip_grad_norm_(optim.SparseAdam([table]), 3.5) == 7
    np.testing.assert_allclose(table.grad.todense()[1], [3.5, 0], rtol=1e-6)
