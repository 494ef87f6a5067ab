"""Where arrays are, as far as that is more than one device, or another memory than a device's own."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

__all__ = ["canonical", "pin", "pinned", "place", "sharding_of"]


def sharding_of(x: Any) -> Sharding | None:
    """The sharding of an array that somebody has placed: on several devices, or in another memory."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return None
    sharding = x.sharding
    if len(sharding.device_set) > 1:
        return sharding
    (device,) = sharding.device_set
    return None if sharding.memory_kind in (None, device.default_memory().kind) else sharding


def place(array: jax.Array, param: Any, present: Any = None) -> jax.Array:
    """Put what is kept for a parameter where it belongs.

    It stays where somebody has placed it; else it goes where the present one is, or its parameter.
    """
    if sharding_of(array) is not None:
        return array
    sharding = sharding_of(present)
    if sharding is None or present.shape != array.shape:
        sharding = _along(array.shape, param)
    return array if sharding is None else jax.device_put(array, sharding)


def _along(shape: tuple[int, ...], param: Any) -> Sharding | None:
    """The parameter's sharding, for an array of this shape.

    Axes that both have are distributed alike; along others, it is whole on each device.
    """
    sharding = sharding_of(param)
    if not isinstance(sharding, NamedSharding) or shape == param.shape:
        return sharding if shape == param.shape else None
    spec = [None] * len(shape)
    if len(shape) == len(param.shape):
        names = (*sharding.spec, *[None] * len(shape))
        spec = [name if size == own else None for name, size, own in zip(names, shape, param.shape, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def canonical(sharding: Any) -> Any:
    """The same sharding in the one form that compares equal: compiled programs leave trailing axes out of the spec."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[-1] is not None:
        return sharding
    names = list(sharding.spec)
    while names and names[-1] is None:
        names.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*names), memory_kind=sharding.memory_kind)


def pin(array: Any) -> NamedSharding | None:
    """Where an array must stay, if the compiler would decide otherwise: it lies on a mesh with automatic axes."""
    sharding = canonical(sharding_of(array))
    if isinstance(sharding, NamedSharding) and all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return sharding
    return None


def pinned(arrays: Any, pins: Any) -> Any:
    """The arrays, each of which stays at its pin."""
    return jax.tree.map(
        lambda pin, array: array if pin is None else jax.lax.with_sharding_constraint(array, pin),
        pins, arrays, is_leaf=lambda pin: pin is None,
    )  # fmt: skip
