"""A damaged or hostile state dict raises an error that names the entry, and changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim


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
