"""A parameter can be used as the array that it holds, and a buffer of NumPy that it is made of can be filled again."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim
from optimjax.swa_utils import AveragedModel


@pytest.mark.parametrize("bound", [False, True])
def test_a_parameter_has_the_methods_of_its_array(bound: bool) -> None:
    value = jnp.arange(6.0).reshape(2, 3)
    p: Any = optim.Parameter(value)
    if bound:
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        model.kernel.set_value(value)
        p = dict(optim.named_parameters(model))["kernel"]
    np.testing.assert_array_equal(p.T, value.T)
    np.testing.assert_array_equal(p.at[0].set(1), value.at[0].set(1))
    np.testing.assert_array_equal(p.reshape(-1), value.reshape(-1))
    assert p.mean() == 2.5
    assert p.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert p.sum().item() == 15
    assert p[0, 1].item() == 1
    assert {"T", "mean", "at", "value", "grad"} <= set(dir(p))
    assert not hasattr(p, "detach")  # it is not a tensor
    assert not hasattr(p, "anything")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data", r"p\.value"),
        ("clone", "immutable"),
        ("backward", r"optimizer\.backward"),
        ("add_", r"p \+= x"),
        ("to", "device_put"),
    ],
)
def test_what_a_tensor_has_is_pointed_to(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=f"a Parameter has no attribute '{name}': .*{hint}"):
        getattr(optim.Parameter(1.0), name)


def _by_gradient(optimizer: Any, parameter: Any, buffer: np.ndarray) -> None:
    parameter.grad = buffer
    optimizer.step()


def _by_operator(optimizer: Any, parameter: Any, buffer: np.ndarray) -> None:
    parameter -= buffer


@pytest.mark.parametrize("how", [_by_gradient, _by_operator], ids=["grad", "operator"])
def test_a_buffer_of_numpy_can_be_filled_again(how: Callable[..., None]) -> None:
    """JAX reads the memory of NumPy's arrays after it has returned."""
    size = 10**6
    for _ in range(3):
        optimizer = optim.SGD({"w": jnp.zeros(size)}, lr=1.0)
        (parameter,) = optimizer.param_groups[0]["params"]
        buffer = np.empty(size, np.float32)
        for _ in range(4):
            buffer[:] = 1
            how(optimizer, parameter, buffer)
            buffer[:] = -1e6
        np.testing.assert_allclose(parameter.value, -4, rtol=1e-5)


def test_what_is_made_of_a_buffer_has_memory_of_its_own() -> None:
    buffer = np.ones(10**6, np.float32)
    parameter, averaged = optim.Parameter(buffer), AveragedModel({"w": jnp.ones(10**6)})
    optimizer = optim.SGD({"w": buffer})
    for _ in range(2):
        averaged.update_parameters({"w": buffer})
    buffer[:] = 5
    for array in (parameter.value, optimizer.params["w"], averaged.module["w"]):
        np.testing.assert_array_equal(array, 1)


def test_deleted_arrays_are_not_taken_over() -> None:
    grads = {"w": jnp.ones(3)}
    optimizer = optim.Adam({"w": jnp.ones(3)}, lr=0.1)
    optimizer.donate = True
    optimizer.step(grads)
    snapshot = optimizer.functional_state()
    optimizer.step(grads)
    before = np.asarray(optimizer.params["w"])
    with pytest.raises(ValueError, match=r"'params\.w' cannot be taken over: an array .* deleted"):
        optimizer.load_functional_state(*snapshot)
    np.testing.assert_array_equal(optimizer.params["w"], before)
    optimizer.step(grads)
    (parameter,) = optimizer.param_groups[0]["params"]
    with pytest.raises(ValueError, match="has been deleted"):
        parameter.value = snapshot[0]["w"]
