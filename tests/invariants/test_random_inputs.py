"""Random nonsense in the place of values works, or raises an error that says so and changes nothing."""

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY, Case
from hypothesis import given
from hypothesis import strategies as st

NONSENSE = [
    None,
    "fast",
    "",
    b"1",
    [],
    {},
    (),
    [1.0],
    (0.9,),
    (0.9, "x"),
    (None, None),
    (0.9, 0.9, 0.9),
    {"lr": 1.0},
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    2,
    0,
    0.5,
    True,
    1j,
    np.float64(0.5),
    np.ones(2),
    np.ones(()),
    np.array("fast"),
    np.zeros((0,)),
    jnp.ones(()),
    jnp.ones(3),
    jnp.ones((), int),
    [[1, 0]] * 3,
    np.ones((3, 2), int),
    np.ones((3, 2), bool),
    np.ones((3, 2), complex),
    1.5,
    {0: {}, "0": {}},
    [0, 0],
    object(),
    int,
    len,
]
nonsense = st.sampled_from(NONSENSE)
every_case = pytest.mark.parametrize("case", EVERY, ids=str)


def plain(x: Any) -> Any:
    return (str(x.dtype), x.shape, np.asarray(x).tobytes()) if hasattr(x, "dtype") else x


def contents(optimizer: Any) -> Any:
    boxes = [box for group in optimizer.param_groups for box in group["params"]]
    groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    state = [jax.tree.map(plain, dict(optimizer.state.get(box, {}))) for box in boxes]
    return copy.deepcopy(
        ([{k: plain(v) for k, v in g.items()} for g in groups], state, [plain(b.value) for b in boxes])
    )


def square(params: Any) -> Any:
    return sum(jnp.sum(value**2) for part in params for value in part.values())


def build(case: Case) -> Any:
    params = {"a": jnp.ones((3, 2)), "b": jnp.full((2, 2), 0.5)}, {"c": jnp.ones((2, 2))}
    groups = [{"params": part} for part in params[: 1 if case.takes_loss else 2]]
    optimizer = case.optimizer(groups, **case.variants()[1])
    step(optimizer)
    return optimizer


def step(optimizer: Any) -> None:
    optimizer.step(square)


def raises_or_works(optimizer: Any, call: Any) -> None:
    before = contents(optimizer)
    try:
        call()
    except (ValueError, TypeError, RuntimeError):
        assert contents(optimizer) == before
    step(optimizer)


@every_case
@given(data=st.data(), value=nonsense)
def test_options(case: Case, data: Any, value: Any) -> None:
    name = data.draw(st.sampled_from(sorted(case.optimizer.definition.hyperparameters.kinds)))
    params = {"a": jnp.ones((2, 2))}
    try:
        optimizer = case.optimizer(params, **{name: value})
    except (ValueError, TypeError, RuntimeError):
        pass
    else:
        optimizer.step(lambda params: jnp.sum(params["a"] ** 2))
        repr(optimizer), optimizer._repr_html_()
    if not case.takes_loss:
        optimizer = build(case)
        raises_or_works(optimizer, lambda: optimizer.add_param_group({"params": params, name: value}))


@every_case
@given(data=st.data(), value=nonsense, delete=st.booleans())
def test_state_dicts(case: Case, data: Any, value: Any, delete: bool) -> None:
    optimizer = build(case)
    saved = copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    node: Any = saved
    while True:  # down to an entry; any level may be the one
        key = data.draw(st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node))))
        deeper = isinstance(node[key], (dict, list, tuple)) and len(node[key]) > 0
        if not deeper or isinstance(node[key], tuple) or data.draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    if delete:
        del node[key]
    else:
        node[key] = value
    raises_or_works(optimizer, lambda: optimizer.load_state_dict(saved, strict=data.draw(st.booleans())))
