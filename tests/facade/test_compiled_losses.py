"""A loss is compiled once for each signature, and what is remembered of its calls holds no arrays."""

import gc
import inspect
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses import Net, Scale, X, Y, boxes_of, loss_fn

import optimjax as optim


@pytest.mark.parametrize("form", ["backward", "step"])
def test_a_loss_is_compiled_once(form: str, compilations: Any) -> None:
    traces = 0

    def loss(params: Any, x: Any, scale: Any) -> Any:
        nonlocal traces
        traces += 1
        return scale * jnp.sum(params["w"] * x)

    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1, momentum=0.9)

    def run(step: int) -> None:
        if form == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss, np.full(3, step, np.float32), float(step))
            optimizer.step()
        else:
            optimizer.step(loss, np.full(3, step, np.float32), float(step))

    run(0)
    first = traces
    run(1)
    before = compilations()
    for step in range(2, 5):
        run(step)
    assert traces == first == 1
    assert compilations() == before


def test_a_module_loss_is_compiled_once(compilations: Any) -> None:
    model = Net()
    optimizer = optim.Adam(model)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(loss_fn, X, Y)
        optimizer.step()
        optimizer.step(loss_fn, X, Y)
    before = compilations()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(loss_fn, X, Y)
        optimizer.step()
        optimizer.step(loss_fn, X, Y)
    assert compilations() == before
    model.eval()
    optimizer.step(loss_fn, X, Y)
    evaluated = compilations()
    assert evaluated > before
    model.train()
    optimizer.step(loss_fn, X, Y)
    model.eval()
    optimizer.step(loss_fn, X, Y)
    assert compilations() == evaluated  # both modes are remembered


def test_static_arguments_are_compiled_in() -> None:
    def loss(params: Any, x: Any, reduction: str, activation: Any) -> Any:
        values = activation(params["w"] * x)
        return jnp.sum(values) if reduction == "sum" else jnp.mean(values)

    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    assert float(optimizer.backward(loss, jnp.ones(2), "sum", jnp.abs)) == 2.0
    assert float(optimizer.backward(loss, jnp.ones(2), "mean", jnp.abs)) == 1.0
    assert float(optimizer.backward(loss, jnp.ones(2), "mean", jnp.negative)) == -1.0


def test_random_keys_and_trees_are_arguments() -> None:
    def loss(params: Any, key: Any, batch: Any) -> Any:
        return jnp.sum(params["w"] * jax.random.normal(key, (2,)) * batch["x"])

    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    for key in (jax.random.key(0), jax.random.PRNGKey(1)):
        optimizer.zero_grad()
        optimizer.backward(loss, key, {"x": jnp.ones(2)})
        np.testing.assert_allclose(boxes_of(optimizer)[0].grad, jax.random.normal(key, (2,)), rtol=1e-6)


class Scaled(nnx.Module):
    """A module with an array that is in no variable."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.array([1.0, 2.0]))
        self.scale = jnp.array(3.0)

    def __call__(self) -> Any:
        return jnp.sum(self.weight[...] * self.scale)


def test_arrays_of_a_module_are_read_at_every_call() -> None:
    model = Scaled()
    optimizer = optim.SGD(model, lr=0.1)
    loss = lambda model: model()  # noqa: E731
    assert optimizer.step(loss) == 9
    model.scale = jnp.array(-1.0)
    np.testing.assert_allclose(optimizer.step(loss), -(0.7 + 1.7), rtol=1e-6)


def test_assigning_such_an_array_inside_the_loss_raises() -> None:
    def loss(model: Any) -> Any:
        model.scale = model.scale + 1
        return model()

    model = Scaled()
    with pytest.raises(ValueError, match=r"in no nnx\.Variable"):
        optim.SGD(model, lr=0.1).step(loss)
    np.testing.assert_array_equal(model.weight[...], [1, 2])


def test_a_module_that_changes_is_cut_again() -> None:
    model = Scaled()
    optimizer = optim.SGD(model, lr=0.0)
    loss = lambda model: model() + (model.extra[...].sum() if hasattr(model, "extra") else 0.0)  # noqa: E731
    assert optimizer.step(loss) == 9
    model.extra = nnx.Param(jnp.ones(4))
    assert optimizer.step(loss) == 13
    del model.extra
    assert optimizer.step(loss) == 9


@pytest.mark.parametrize("form", ["backward", "step"])
def test_the_signatures_of_losses_in_turn_are_looked_at_once(form: str, monkeypatch: Any) -> None:
    """As of a GAN."""
    optimizer, scale = optim.SGD({"w": jnp.ones(())}, lr=0.1), Scale()
    losses = [lambda params: params["w"], lambda params: params["w"] ** 2, lambda params: -params["w"]]
    for loss in (*losses, scale.loss):
        getattr(optimizer, form)(loss)
    looked_at = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda function: looked_at.append(function) or signature(function))
    for loss in (*losses, scale.loss) * 2:
        getattr(optimizer, form)(loss)
    assert not {*losses, scale.loss} & set(looked_at)  # JAX looks at its own
    with pytest.raises(TypeError, match=r"cannot be: too many .* leave it out"):
        getattr(optimizer, form)(losses[0], 1.0)
    assert losses[0] in looked_at


@pytest.mark.parametrize("form", ["backward", "step"])
def test_what_is_remembered_of_a_call_holds_no_arrays(form: str) -> None:
    """Old parameters and the last batch would take memory while the model is evaluated."""
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    batch = jnp.ones(3)
    held = [weakref.ref(optimizer.params["w"]), weakref.ref(batch)]
    getattr(optimizer, form)(lambda params, x: jnp.sum(params["w"] * x), batch)
    if form == "backward":
        optimizer.step()
    del batch
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_plain_flag_is_compiled_in() -> None:
    optimizer = optim.SGD({"w": jnp.array(2.0)}, lr=0.0)
    loss = lambda params, positive: params["w"] if positive else -params["w"]  # noqa: E731
    assert [float(optimizer.step(loss, flag)) for flag in (True, False, True)] == [2, -2, 2]
