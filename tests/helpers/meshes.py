"""Meshes of eight devices, and where the arrays of an optimizer lie on them."""

from typing import Any

import jax
import pytest
from jax.sharding import AxisType, NamedSharding

__all__ = ["assert_same_places", "every_kind", "mesh_of", "placed", "spread"]

KINDS = [AxisType.Auto, AxisType.Explicit]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])


def mesh_of(kind: Any) -> Any:
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))


def spread(tree: Any, mesh: Any, specs: Any) -> Any:
    return {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in tree.items()}


def placed(optimizer: Any) -> dict[Any, Any]:
    """Where everything is."""
    found: dict[Any, Any] = dict(optimizer.params)
    for index, box in enumerate(optimizer.param_groups[0]["params"]):
        for name, value in optimizer.state.get(box, {}).items():
            found |= {(index, name, place): leaf for place, leaf in enumerate(jax.tree.leaves(value))}
    return {key: (array.shape, array.sharding) for key, array in found.items() if isinstance(array, jax.Array)}


def assert_same_places(before: dict[Any, Any], after: dict[Any, Any]) -> None:
    assert before.keys() <= after.keys()  # the history of LBFGS grows
    for key, (shape, sharding) in before.items():
        assert len(sharding.device_set) == 8, key
        assert sharding.is_equivalent_to(after[key][1], len(shape)), key
