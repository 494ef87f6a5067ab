"""Muon refuses what is not a matrix, axes that do not fit, and what PyTorch refuses."""

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax import functional as F

PARAMS = {"layers": [{"kernel": jnp.ones((2, 3))}]}
FACES: dict[str, Callable[..., Any]] = {
    "class": lambda params, **options: optim.Muon(params, **options),
    "group": lambda params, **options: optim.Muon([{"params": params, **options}]),
    "factory": lambda params, **options: F.muon(**options).init(params),
}
faces = pytest.mark.parametrize("make", FACES.values(), ids=FACES)


@faces
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
def test_not_a_matrix(torch: Any, make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    message = r"^Muon only supports 2D parameters whereas we found a parameter with size: "
    with pytest.raises(ValueError, match=message):
        torch.optim.Muon([torch.ones(shape)])
    with pytest.raises(ValueError, match=message + re.escape(f"{shape}; ") + r".*\('layers\.1\.odd'\)$"):
        make({"layers": [*PARAMS["layers"], {"odd": jnp.ones(shape)}]})


@faces
@pytest.mark.parametrize("axes", [((0,), (0,)), ((0,), (-2,)), ((2,), (0,)), ((-3,), (1,)), ((0, 1), (1,))], ids=str)
def test_axes_that_do_not_fit(make: Callable[..., Any], axes: Any) -> None:
    message = f"matrix_axes must name different axes of the parameter, got {axes} for shape (2, 3) ('layers.0.kernel')"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(PARAMS, matrix_axes=axes)


@faces
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"matrix_axes": (1, 0)}, ValueError, "matrix_axes must be None or a pair of tuples .*, got (1, 0)"),
        ({"matrix_axes": ((0,),)}, ValueError, "matrix_axes must be None or a pair of tuples .*, got ((0,),)"),
        ({"matrix_axes": ((0,), (1.0,))}, ValueError, "matrix_axes must be None or a pair .*, got ((0,), (1.0,))"),
        ({"matrix_axes": "ab"}, ValueError, "matrix_axes must be None or a pair of tuples .*, got 'ab'"),
        ({"ns_dtype": "float16"}, ValueError, "ns_dtype must be one of None, 'bfloat16', .*, got 'float16'"),
        ({"ns_dtype": jnp.float32}, TypeError, "ns_dtype decides what is compiled: .*, got <class "),
        ({"ns_steps": -1}, ValueError, "Number of steps must be at least 0, got -1"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be an integer, got 2.5"),
        ({"eps": -1e-7}, ValueError, "Invalid epsilon value: -1e-07"),
    ],
    ids=str,
)
def test_what_pytorch_lacks_or_takes(
    make: Callable[..., Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + re.escape(message).replace(re.escape(".*"), ".*")):
        make(PARAMS, **options)


@faces
@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({"ns_steps": 100}, ", got 100"),
        ({"ns_coefficients": (1.0, 2.0)}, ", got (1.0, 2.0)"),
        ({"ns_coefficients": (1.0, 2.0, 3.0, 4.0)}, ", got (1.0, 2.0, 3.0, 4.0)"),
    ],
    ids=str,
)
def test_what_pytorch_refuses_in_its_first_step(
    torch: Any, make: Callable[..., Any], options: dict[str, Any], added: str
) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    theirs = torch.optim.Muon([parameter], **options)
    with pytest.raises(ValueError, match=r".+") as refusal:
        theirs.step()
    message = str(refusal.value)
    if make is not FACES["factory"]:
        message += added
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(PARAMS, **options)


def test_a_group_edited_to_axes_that_do_not_fit() -> None:
    optimizer = optim.Muon(PARAMS)
    optimizer.step(PARAMS)
    before = jax.tree.map(np.asarray, (optimizer.params, optimizer.state_dict()["state"]))
    optimizer.param_groups[0]["matrix_axes"] = ((2,), (0,))
    with pytest.raises(ValueError, match=r"got \(\(2,\), \(0,\)\) for shape \(2, 3\)"):
        optimizer.step(PARAMS)
    chex.assert_trees_all_equal((optimizer.params, optimizer.state_dict()["state"]), before)
    optimizer.param_groups[0]["matrix_axes"] = ((1,), (0,))
    optimizer.step(PARAMS)
    assert not np.array_equal(optimizer.params["layers"][0]["kernel"], before[0]["layers"][0]["kernel"])


def test_loaded_axes_that_do_not_fit_change_nothing() -> None:
    optimizer = optim.Muon(PARAMS)
    optimizer.step(PARAMS)
    before = optimizer.state_dict()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["matrix_axes"] = ((2,), (0,))
    with pytest.raises(ValueError, match=r"got \(\(2,\), \(0,\)\) for shape \(2, 3\)"):
        optimizer.load_state_dict(saved)
    chex.assert_trees_all_equal(optimizer.state_dict()["state"], before["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
