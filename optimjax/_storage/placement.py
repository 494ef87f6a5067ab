"""Where arrays are, as far as that is more than one device, or another memory than a device's own."""

import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

__all__ = [
    "along",
    "automatic",
    "canonical",
    "divided",
    "explicit",
    "pin",
    "pinned",
    "place",
    "resharded",
    "sharding_of",
    "whole",
]

P = ParamSpec("P")
R = TypeVar("R")


def sharding_of(x: Any) -> Sharding | None:
    """The sharding of an array that somebody has placed: on several devices, or in another memory."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return None
    sharding = x.sharding
    if len(sharding.device_set) > 1:
        return sharding
    (device,) = sharding.device_set
    return None if sharding.memory_kind in (None, device.default_memory().kind) else sharding


def explicit(x: Any) -> NamedSharding | None:
    """The sharding that is part of an array's type, also while it is traced, on a mesh with explicit axes."""
    # JAX compares shardings by Python code, and makes another error of an interrupt there: it is asked only if need be.
    if isinstance(x, jax.Array) and not isinstance(x, Tracer) and not isinstance(x.sharding, NamedSharding):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def resharded(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """The array with this sharding in its type."""
    return array if sharding in (None, explicit(array)) else jax.sharding.reshard(array, sharding)


def automatic(function: Callable[P, R], like: R) -> Callable[P, R]:
    """The function, whose work the compiler distributes, also over explicit axes; its results are sharded like these.

    With explicit axes each operation must say where its result lies, which not all can.
    """
    shardings = jax.tree.map(explicit, like)
    if not jax.tree.leaves(shardings):
        return function
    spread: Any = jax.sharding.auto_axes(function, out_sharding=shardings)
    return spread


def place(array: jax.Array, param: Any, present: Any = None) -> jax.Array:
    """Put what is kept for a parameter where the present one is; or else as the parameter is."""
    if isinstance(param, Tracer):
        return resharded(array, along(array.shape, param.shape, explicit(param)))
    sharding = sharding_of(present)
    if sharding is None or present.shape != array.shape:
        sharding = along(array.shape, param.shape, sharding_of(param))
    return array if sharding is None else jax.device_put(array, sharding)


def whole(param: Any) -> Sharding | None:
    """Where an array lies whole on each device that a parameter was put on; ``None`` if nobody has put it anywhere."""
    if isinstance(param, Tracer) or not getattr(param, "committed", False):
        return None
    if isinstance(param.sharding, NamedSharding):
        return NamedSharding(param.sharding.mesh, PartitionSpec())
    return param.sharding if len(param.sharding.device_set) == 1 else None


def along(shape: tuple[int, ...], of_param: tuple[int, ...], sharding: Any) -> Any:
    """A parameter's sharding, for an array of this shape; ``None`` where that says nothing.

    Axes that both have are distributed alike; along others, it is whole on each device.
    """
    if not isinstance(sharding, NamedSharding) or shape == of_param:
        return sharding if shape == of_param else None
    spec = [None] * len(shape)
    if len(shape) == len(of_param):
        names = (*sharding.spec, *[None] * len(shape))
        spec = [name if size == own else None for name, size, own in zip(names, shape, of_param, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def canonical(sharding: Any) -> Any:
    """The same sharding in the one form that compares equal: compiled programs leave trailing axes out of the spec."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[-1] is not None:
        return sharding
    names = list(sharding.spec)
    while names and names[-1] is None:
        names.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*names), memory_kind=sharding.memory_kind)


def divided(array: jax.Array, count: int, where: NamedSharding | None) -> jax.Array:
    """Parts of an array along its first axis, which is then the second one; of a random key, so many keys.

    Each part lies on all devices that the array lies on, or most of them would wait for those that have the part.

    Args:
      array: traced.
      count: of the parts.
      where: the array's pin.
    """
    if not array.ndim:
        return jax.random.split(array, count)
    sharding = explicit(array)
    if sharding is not None:  # whose first axis cannot be divided while it is distributed
        array = resharded(array, sharding.update(spec=PartitionSpec(None, *sharding.spec[1:])))
    parts = array.reshape(count, array.shape[0] // count, *array.shape[1:])
    if sharding is not None:
        return resharded(parts, _of_parts(sharding, parts.shape))
    return parts if where is None else jax.lax.with_sharding_constraint(parts, _of_parts(where, parts.shape))


def _of_parts(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of parts of an array that had this one; an axis that does not divide any more is whole."""
    names: list[Any] = [None, *sharding.spec, *[None] * (len(shape) - 1 - len(sharding.spec))]
    first = names[1] if isinstance(names[1], tuple) else (names[1],)
    if names[1] is not None and shape[1] % math.prod(sharding.mesh.shape[name] for name in first):
        names[1] = None
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
