"""What goes wrong at first with a loss function raises an error or a warning that says what to write."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses import Scale, X, Y, boxes_of, loss_fn, sum_of_squares

import optimjax as optim


def fails_alike(optimizer: Any, error: Any, message: str, loss: Any, *args: Any) -> None:
    """Both forms raise, and nothing has changed."""
    before = [np.asarray(box) for box in boxes_of(optimizer)]
    for call in (optimizer.backward, optimizer.step):
        with pytest.raises(error, match=message):
            call(loss, *args)
    for box, value in zip(boxes_of(optimizer), before, strict=True):
        np.testing.assert_array_equal(box.value, value)
        assert box.grad is None


@pytest.mark.parametrize("make", [lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)), lambda: {"w": jnp.ones(3)}])
def test_a_loss_that_passes_the_parameters_by_trains_nothing_and_says_so(make: Any) -> None:
    model = make()
    total = lambda _: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model))  # noqa: E731
    fails_alike(optim.AdamW(model, lr=0.1), RuntimeError, "depends on none of the parameters", total)
    fails_alike(optim.AdamW(make(), lr=0.1), RuntimeError, "depends on none", lambda _: 3.0)
    stopped = lambda params: jax.lax.stop_gradient(sum_of_squares(params))  # noqa: E731
    fails_alike(optim.AdamW({"w": jnp.ones(3)}, lr=0.1), RuntimeError, "depends on none", stopped)


def test_a_loss_of_other_arguments_is_told_who_passes_the_model() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    message = r"loss_fn\(optimizer.params, \*args\) and cannot be: too many positional arguments; .* leave it out"
    fails_alike(optim.SGD(model, lr=0.1), TypeError, message, loss_fn, model, X, Y)
    boxes = optim.SGD(optim.parameters(model), lr=0.1)
    fails_alike(boxes, TypeError, r"loss_fn\(\*args\) and cannot be: missing .* 'y'; .* give the module", loss_fn, X, Y)
    fails_alike(boxes, TypeError, "too many", lambda: 0.0, model)
    assert float(boxes.step(loss_fn, model, X, Y)) == float(loss_fn(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X, Y))


class Batch:
    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as of a dataclass that is not a tree

    def __init__(self, x: Any):
        self.x = x


def test_arguments_and_results_that_are_neither_arrays_nor_trees_are_named() -> None:
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    fails_alike(optimizer, TypeError, "holds a Batch, which is neither", lambda p, b: jnp.sum(p["w"] * b.x), Batch(X))
    both = lambda params: (sum_of_squares(params), 1)  # noqa: E731
    with pytest.raises(TypeError, match=r"scalar, got a tuple; .*has_aux=True"):
        optimizer.step(both)
    assert optimizer.backward(both, has_aux=True)[1] == 1


def test_batches_may_be_tensors_of_pytorch(torch: Any) -> None:
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    twin = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    loss = lambda params, x, index: jnp.mean((x @ params["w"])[index] ** 2)  # noqa: E731
    index = np.array([0, 2])
    for scale in (1, 2):
        ours = optimizer.step(loss, torch.from_numpy(X * scale), torch.from_numpy(index))
        assert float(ours) == float(twin.step(loss, X * scale, index))
    with jax.numpy_dtype_promotion("standard"):
        half = optimizer.backward(loss, torch.from_numpy(X).bfloat16(), torch.from_numpy(index))
    np.testing.assert_allclose(half, twin.backward(loss, X, index), rtol=0.02)


def test_has_aux_with_another_number_of_results_says_what_to_return() -> None:
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    losses = {1: sum_of_squares, 3: lambda params: (sum_of_squares(params), 1, 2)}
    for count, loss in losses.items():
        with pytest.raises(TypeError, match=rf"has_aux=True .* must return \(loss, aux\), two results, got {count}"):
            optimizer.backward(loss, has_aux=True)
    with pytest.raises(TypeError, match="got 1"):
        optimizer.backward(lambda params: params["w"][:2], has_aux=True)  # which could be unpacked


def test_where_all_parameters_are_frozen_the_error_says_so() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for params in (model, list(optim.parameters(model))):
        for box in optim.parameters(model):
            box.requires_grad = False
        args = (model, X, Y) if isinstance(params, list) else (X, Y)
        fails_alike(
            optim.SGD(params, lr=0.1), ValueError, "all of .* parameters have requires_grad=False", loss_fn, *args
        )


def test_a_loss_function_without_a_hash_is_refused() -> None:
    @dataclasses.dataclass
    class Loss:
        scale: float

        def __call__(self, params: Any) -> Any:
            return self.scale * sum_of_squares(params)

    message = r"this Loss has none \(unhashable type: 'Loss'\): give a plain function"
    fails_alike(optim.SGD({"w": jnp.ones(3)}, lr=0.1), TypeError, message, Loss(2.0))


@pytest.mark.parametrize("form", ["backward", "step"])
def test_loss_functions_made_anew_are_warned_of_once(form: str) -> None:
    optimizer = optim.SGD({"w": jnp.ones(())}, lr=0.1)

    def again() -> None:
        for _ in range(12):
            getattr(optimizer, form)(lambda params: params["w"] ** 2)

    with pytest.warns(UserWarning, match="define the function once") as warned:
        again()
    assert [warning.filename for warning in warned] == [__file__]
    scale = Scale()
    for _ in range(12):  # of a function and a bound method in turn there is nothing to say
        optimizer.backward(sum_of_squares)
        optimizer.backward(scale.loss)
