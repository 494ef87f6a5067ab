"""Closures work as scripts of PyTorch write them, and one that lacks something is told what to write."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses import square

import optimjax as optim


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", ["Adam", "SGD", "Rprop", "ASGD", "RMSprop"])
def test_a_closure_calls_backward_itself(name: str, keyword: bool, torch: Any) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs = getattr(torch.optim, name)([w], lr=0.1)
    ours = getattr(optim, name)([optim.Parameter(jnp.array([1.0, -2.0]))], lr=0.1)
    calls: list[Any] = []
    ours.register_step_pre_hook(lambda _, args, kwargs: calls.append((len(args), set(kwargs))))

    def torch_closure() -> Any:
        theirs.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    for _ in range(3):

        def closure() -> Any:
            ours.zero_grad()
            return ours.backward(square)

        loss = ours.step(closure=closure) if keyword else ours.step(closure)
        np.testing.assert_allclose(loss, theirs.step(torch_closure).item(), rtol=1e-6)
    np.testing.assert_allclose(ours.params[0], w.detach().numpy(), rtol=1e-6)
    assert calls == [(1, {"closure"}) if keyword else (2, set())] * 3


def test_closures_that_are_made_again_each_time_compile_once(compilations: Any) -> None:
    optimizer = optim.SGD([jnp.ones(2)], lr=0.1)
    for index in range(12):  # nobody warns of copies, because nothing is compiled for them

        def closure() -> Any:
            optimizer.zero_grad()
            return optimizer.backward(square)

        optimizer.step(closure)
        if index == 1:
            before = compilations()
    assert compilations() == before


def test_a_loss_function_by_the_name_closure() -> None:
    optimizer, twin = (optim.SGD({"w": jnp.ones(2)}, lr=0.1) for _ in range(2))
    assert optimizer.step(closure=square) == twin.step(square)
    np.testing.assert_array_equal(optimizer.params["w"], twin.params["w"])
    with pytest.raises(TypeError, match="by position or by name, not both"):
        optimizer.step(square, closure=square)


def test_a_closure_that_only_returns_the_loss_is_told_what_to_write() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)

    def forgetful() -> Any:
        return square(optimizer.params)

    with pytest.raises(RuntimeError, match=r"forgetful\(\) has left no gradient.*backward.*step\(loss_fn"):
        optimizer.step(forgetful)
    np.testing.assert_array_equal(optimizer.params["w"], [1, 1])


def test_a_closure_of_an_optimizer_of_a_modules_parameters() -> None:
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(optim.parameters(model), lr=0.1)

    def closure() -> Any:
        optimizer.zero_grad()
        return optimizer.backward(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2), model)

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_the_model_is_asked_for_where_a_loss_takes_too_little() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)

    def loss() -> Any:
        return 0.0

    with pytest.raises(TypeError, match=r"as in def loss\(model\)"):
        optimizer.backward(loss)
    with pytest.raises(TypeError, match="too many positional arguments"):
        optimizer.step(lambda params, *, x: 0.0, jnp.ones(2))
