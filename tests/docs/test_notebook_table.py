"""A notebook shows an optimizer as a table with a row for each group."""

import xml.etree.ElementTree as ET
from typing import Any

import jax.numpy as jnp
import numpy as np

import optimjax as optim


def cells(optimizer: Any) -> list[list[str]]:
    root = ET.fromstring(optimizer._repr_html_())  # well-formed
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def test_a_row_for_each_group() -> None:
    params = {"a": jnp.ones((2, 3)), "b<c": jnp.ones(4)}
    optimizer = optim.Adam(optim.group_parameters(params, [{"params": "a", "name": "big", "lr": 0.5}]), amsgrad=True)
    assert cells(optimizer) == [
        ["group", "parameters", "elements", "state bytes", "lr", "amsgrad"],
        ["big", "a", "6", "0", "0.5", "True"],
        ["1", "b<c", "4", "0", "0.001", "True"],
    ]
    optimizer.step({"a": jnp.ones((2, 3)), "b<c": None})
    assert [row[3] for row in cells(optimizer)] == ["state bytes", "72", "0"]


def test_long_groups_are_cut_and_arrays_are_numbers() -> None:
    optimizer = optim.SGD([jnp.ones(1000)] + [jnp.ones(2)] * 5, lr=jnp.array(0.25))
    (row,) = cells(optimizer)[1:]
    assert row == ["0", "0, 1, 2, and 3 more", "1,010", "0", "0.25"]


def test_looking_does_not_cost_a_copy() -> None:
    optimizer = optim.SGD([jnp.ones(4)], lr=0.1, momentum=0.9)
    optimizer.step([jnp.ones(4)])
    optimizer._repr_html_()
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert state.place is not None
    np.testing.assert_array_equal(state["momentum_buffer"], np.ones(4))


def test_options_of_any_group_are_shown_and_those_that_nobody_can_set_are_not() -> None:
    optimizer = optim.AdamW([optim.Parameter(jnp.ones((2, 3))), optim.Parameter(1.0, name="w")])
    optimizer.add_param_group({"params": [], "initial_lr": 0.5})
    assert cells(optimizer) == [
        ["group", "parameters", "elements", "state bytes", "lr", "initial_lr"],
        ["0", "(2, 3), w", "7", "0", "0.001", ""],
        ["1", "", "0", "0", "0.001", "0.5"],
    ]
