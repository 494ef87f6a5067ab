"""Updates in place leave what others hold valid, what is dropped is freed, and buffers of NumPy may be filled again."""

import copy
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms_of_step import FORMS, by_gradients, by_loss, contents

import optimjax as optim
from optimjax.swa_utils import AveragedModel

# --- Parameters that are updated in place ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [by_loss, by_gradients], ids=["loss", "gradients"])
def test_copies_and_averages_stay_valid_under_donate(step: Any) -> None:
    optimizer = FORMS["loss"].optimizer(True)
    averaged = AveragedModel(optimizer.params)
    for _ in range(2):
        step(optimizer)
        averaged.update_parameters(optimizer.params)
    best = copy.deepcopy(optimizer)
    kept = contents(best)
    step(optimizer)
    jax.tree.map(np.testing.assert_array_equal, contents(best), kept)
    before = contents(optimizer)
    step(best)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), before)
    step(optimizer)
    assert np.isfinite(averaged.module["a"]).all()


def test_one_array_for_two_parameters_under_donate() -> None:
    def optimizer(donate: bool) -> Any:
        same = jnp.array([1.0, -2.0])
        made = optim.SGD({"a": same, "b": same, "c": jnp.ones(100)}, lr=0.1, momentum=0.9)
        made.donate = donate
        return made

    def product(params: Any) -> Any:
        return jnp.sum(params["a"] * params["b"] ** 2) + jnp.sum(params["c"] ** 2)

    ours, expected = optimizer(True), optimizer(False)
    for each in (ours, expected):
        each.step(product)
        each.step(jax.grad(product)(each.params))
    jax.tree.map(np.testing.assert_array_equal, contents(ours), contents(expected))


@pytest.mark.parametrize("name", ["gradients", "loss", "LBFGS", "optax, gradients", "optax, loss"])
def test_a_parameter_as_gradient_or_argument_under_donate(name: str) -> None:
    def distance(params: Any, old: Any) -> Any:
        return sum(jnp.sum((2 * a - b) ** 2) for a, b in zip(params.values(), old.values(), strict=True))

    results = []
    for donate in (True, False):
        optimizer = FORMS[name].optimizer(donate)
        for _ in range(2):
            params = optimizer.params
            optimizer.step(params) if "gradients" in name else optimizer.step(distance, params)
        results.append(contents(optimizer))
    jax.tree.map(np.testing.assert_array_equal, *results)


# --- Memory ----------------------------------------------------------------------------------------------------------


def from_optax(params: Any) -> Any:
    return optim.FromOptax(params, optax.adam(0.1))


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("form", ["loss", "backward", "LBFGS", "FromOptax", "method", "partial"])
def test_a_loss_is_freed_with_what_it_closes_over(form: str) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.data = jnp.ones((100, 100))

        def loss(self, params: Any) -> Any:
            return ((self.data @ params["w"]) ** 2).mean()

    def trial() -> None:
        trainer = Trainer()
        optimizer = {"LBFGS": optim.LBFGS, "FromOptax": from_optax}.get(form, optim.Adam)({"w": jnp.ones(100)})
        data = trainer.data
        loss: Any = lambda params: ((data @ params["w"]) ** 2).mean()  # noqa: E731
        if form == "method":
            loss = trainer.loss
        if form == "partial":
            loss = functools.partial(lambda data, params: ((data @ params["w"]) ** 2).mean(), data)
        if form == "backward":
            optimizer.backward(loss)
        optimizer.step(*[loss] * (form != "backward"))

    trial()
    before = live_bytes()
    for _ in range(3):
        trial()
    assert live_bytes() == before


def test_an_optimizer_is_freed_without_the_cycle_collector() -> None:
    def trial(cls: Any) -> None:
        optimizer = cls({"w": jnp.ones(10)})
        loss = lambda params: jnp.sum(params["w"] ** 2)  # noqa: E731
        for _ in range(2):
            optimizer.step(loss)
        if cls is not optim.LBFGS:
            optimizer.step({"w": jnp.ones(10)})
            optimizer.backward(loss)
        optimizer.state_dict()
        optimizer.step(loss)

    for cls in (optim.Adam, optim.Adagrad, optim.LBFGS, from_optax):
        trial(cls)
        before = live_bytes()
        gc.disable()
        try:
            trial(cls)
            assert sum(array.nbytes for array in jax.live_arrays()) == before
        finally:
            gc.enable()


@pytest.mark.parametrize("form", ["partial", "lambda", "jitted"])
def test_copies_of_one_loss_function_are_warned_of(form: str) -> None:
    optimizer = optim.SGD({"w": jnp.ones(())}, lr=0.1)

    def square(params: Any, k: float = 1.0) -> Any:
        return k * params["w"] ** 2

    def copies() -> Iterator[Any]:
        for _ in range(10):
            yield {
                "partial": functools.partial(functools.partial(square), k=2.0),
                "lambda": lambda params: square(params),
                "jitted": jax.jit(lambda params: square(params)),
            }[form]

    with pytest.warns(UserWarning, match="8 copies of the loss function '(square|<lambda>)'.*and kept") as warned:
        losses = [optimizer.step(copied) for copied in copies()]
    assert len(losses) == 10
    assert [warning.filename for warning in warned] == [__file__]


def test_a_bound_method_and_equal_objects_are_one_loss_function(compilations: Any) -> None:
    @dataclass(frozen=True)
    class Scaled:
        k: float

        def __call__(self, params: Any) -> Any:
            return self.k * jnp.sum(params["w"] ** 2)

        def method(self, params: Any) -> Any:
            return self(params)

    one = Scaled(2.0)
    first, second = (optim.SGD({"w": jnp.ones(2)}, lr=0.1) for _ in range(2))
    first.step(one.method)
    first.step(Scaled(3.0))
    before = compilations()
    for optimizer in (first, second):
        for _ in range(2):
            optimizer.step(one.method)
            optimizer.step(Scaled(3.0))
    assert compilations() == before


# --- Memory of NumPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["step(grads)", "step(loss)", "backward"])
def test_a_buffer_of_numpy_may_be_filled_again(form: str) -> None:
    optimizer = optim.SGD({"w": jnp.zeros(10**6)}, lr=1.0)
    buffer = np.empty(10**6, np.float32)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(params["w"] * x)

    for _ in range(4):
        buffer[:] = 1
        if form == "step(grads)":
            optimizer.step({"w": buffer})
        elif form == "step(loss)":
            optimizer.step(loss, buffer)
        else:
            optimizer.zero_grad()
            optimizer.backward(loss, buffer)
            optimizer.step()
        buffer[:] = -1e6
    np.testing.assert_array_equal(optimizer.params["w"], -4)
