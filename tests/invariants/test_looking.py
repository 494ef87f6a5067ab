"""Whoever looks during a step, from the loss or from another thread, sees one moment, or an error."""

import copy
import pickle
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms_of_step import FORMS, by_loss, contents, loss_fn

import optimjax as optim

LOOKS = {
    "state": lambda optimizer: dict(optimizer.state[optimizer.param_groups[0]["params"][0]]),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).state_dict(),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).state_dict(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("name", ["loss", "backward", "LBFGS"])
@pytest.mark.parametrize("when", ["traced", "run"])
def test_looking_from_the_loss(look: Any, name: str, when: str) -> None:
    """It sees what was before the step, and what it has seen stays valid."""
    form = FORMS[name]
    optimizer, twin = form.optimizer(False), form.optimizer(False)
    seen: list[Any] = []

    def looking(params: Any) -> Any:
        if when == "traced":
            with jax.ensure_compile_time_eval():
                seen.append(look(optimizer))
        else:
            jax.debug.callback(lambda: seen.append(look(optimizer)))
        return loss_fn(params)

    def step(optimizer: Any, loss: Any) -> None:
        if name == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss)
            optimizer.step()
        else:
            optimizer.step(loss)

    for _ in range(2):
        form.step(optimizer)
        form.step(twin)
    for _ in range(3):
        step(optimizer, looking)
        form.step(twin)
    jax.effects_barrier()
    assert seen
    assert jax.tree.leaves(seen)
    for leaf in jax.tree.leaves(seen):
        np.asarray(leaf)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), contents(optimizer), contents(twin)
    )


def test_looking_where_it_cannot_be_right_raises_at_once() -> None:
    """A program that is compiled again in the middle of a step, because JAX was told to forget it."""
    optimizer, twin = FORMS["loss"].optimizer(False), FORMS["loss"].optimizer(False)
    errors: list[str] = []

    def looking(params: Any) -> Any:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            errors.append(str(error))
        return loss_fn(params)

    optimizer.step(looking)
    optimizer.step(looking)
    assert not errors
    jax.clear_caches()
    optimizer.step(looking)
    assert "in the middle of a step" in errors[0]
    for _ in range(3):
        by_loss(twin)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("name", ["loss", "gradients", "LBFGS"])
def test_looking_from_another_thread(look: Any, name: str) -> None:
    form = FORMS[name]
    optimizer, twin = form.optimizer(False), form.optimizer(False)
    seen: list[Any] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(look(optimizer))
            del seen[:-3]

    form.step(optimizer)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for _ in range(20):
            form.step(optimizer)
    finally:
        stop.set()
        thread.join()
    for leaf in jax.tree.leaves(seen):
        np.asarray(leaf)
    for _ in range(21):
        form.step(twin)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


def test_a_state_dict_taken_while_another_thread_steps_is_of_one_moment() -> None:
    params = {str(index): jnp.ones(2) for index in range(20)}
    optimizer = optim.Adam(params, lr=0.1)
    optimizer.step(params)
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            optimizer.step(params)

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for _ in range(30):
            state = optimizer.state_dict()["state"]
            assert len({entry["step"] for entry in state.values()}) == 1
            copied = copy.deepcopy(optimizer)
            assert len({copied.state[box]["step"] for box in copied.param_groups[0]["params"]}) == 1
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("callback", [False, True])
def test_two_threads_that_step_one_optimizer_take_turns(callback: bool) -> None:
    optimizer = optim.SGD({"w": jnp.zeros(2)}, lr=1.0, momentum=0.0)
    optimizer.donate = True

    def loss(params: Any) -> Any:
        if callback:
            jax.debug.callback(lambda: None)
        return jnp.sum(params["w"])

    optimizer.step(loss)
    threads = [threading.Thread(target=lambda: [optimizer.step(loss) for _ in range(40)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(optimizer.params["w"], [-121, -121])
