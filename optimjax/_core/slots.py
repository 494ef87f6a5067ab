"""The slots before the first update, of many parameters at once.

Programs that make zeros, one for each shape, once took as long to compile as the step itself. So none is compiled where
the slots are repeated numbers and the parameters lie in the memory of the host: NumPy writes them there. Everywhere
else one program makes all slots.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal
from jax.sharding import NamedSharding

from optimjax._core.contract import Rule
from optimjax._core.tracing import is_top_level, trace_state
from optimjax._core.tree import by_key
from optimjax._storage.placement import along, place, sharding_of

__all__ = ["all_initial_slots", "initial_slots"]

ALIGNED = 64  # bytes: what XLA asks of memory that it takes over


def initial_slots(rule: Rule, param: Array, hyper: Any, flags: Any) -> Any:
    """The slots of one parameter before the first update, each an array of its own.

    A step updates slots in place, so none may be the parameter itself (an average that starts from it) or another slot.
    On a mesh they are distributed as the parameter is.
    """
    seen = {id(param)}

    def own(slot: Array) -> Array:
        slot = jnp.copy(slot) if id(slot) in seen else slot
        seen.add(id(slot))
        return place(slot, param)

    return jax.tree.map(own, rule.init(param, hyper, flags))


def all_initial_slots(rule: Rule, params: Sequence[Array], hypers: Sequence[Any], flags: Sequence[Any]) -> list[Any]:
    """The same for each of these parameters."""
    each = list(zip(params, hypers, flags, strict=True))
    if not is_top_level(trace_state()) or not jax.sharding.get_abstract_mesh().empty:
        return [initial_slots(rule, *one) for one in each]
    made: list[Any] = [None] * len(each)
    filled: dict[int, Any] = {}
    known: dict[Any, Any] = {}
    for index, (param, hyper, flag) in enumerate(each):
        if _is_on_host(param):
            key = param.shape, param.dtype, id(hyper), flag
            if key not in known:
                known[key] = _fills(rule, *key[:2], hyper, flag)
            if known[key] is not None:
                filled[index] = known[key]
    for index, slots in _filled(filled, params):
        made[index] = slots
    where = [(getattr(param.sharding, "mesh", None) or frozenset(param.devices()), param.committed) for param in params]
    for rest in by_key(where, [index for index in range(len(each)) if index not in filled]).values():
        for index, slots in zip(rest, _compiled(rule, [each[index] for index in rest]), strict=True):
            made[index] = slots
    return made


# --- On the host ------------------------------------------------------------------------------------------------------


class Fill(NamedTuple):
    """An array of which all elements are one number."""

    shape: tuple[int, ...]
    dtype: Any
    value: Any


def _is_fill(node: Any) -> bool:
    return isinstance(node, Fill)


def _is_on_host(param: Array) -> bool:
    """Whether it lies in the memory of one CPU device, into which NumPy's arrays are copied at once."""
    return sharding_of(param) is None and all(device.platform == "cpu" for device in param.devices())


def _fills(rule: Rule, shape: tuple[int, ...], dtype: Any, hyper: Any, flags: Any) -> Any:
    """The slots as Fills, or ``None`` where the rule computes some of them.

    A traced rule tells: what it returns are literals, or broadcasts of literals.
    """
    param = jax.ShapeDtypeStruct(shape, dtype)
    traced, shapes = jax.make_jaxpr(lambda param: rule.init(param, hyper, flags), return_shape=True)(param)
    equations = {variable: equation for equation in traced.jaxpr.eqns for variable in equation.outvars}
    fills = []
    for result, type_ in zip(traced.jaxpr.outvars, jax.tree.leaves(shapes), strict=True):
        equation = None if isinstance(result, Literal) else equations.get(result)
        if equation is not None and equation.primitive.name == "broadcast_in_dim":
            (result,) = equation.invars
        if not isinstance(result, Literal):
            return None
        fills.append(Fill(type_.shape, type_.dtype, np.asarray(result.val, type_.dtype)[()]))
    return jax.tree.unflatten(jax.tree.structure(shapes), fills)


def _filled(fills: dict[int, Any], params: Sequence[Array]) -> Iterator[tuple[int, Any]]:
    """The arrays, where their parameters are: one transfer for each device."""
    wanted, structure = jax.tree.flatten(fills, is_leaf=_is_fill)
    homes = [
        _home(fill.shape, params[at])
        for at, of_one in fills.items()
        for fill in jax.tree.leaves(of_one, is_leaf=_is_fill)
    ]
    arrays: list[Any] = [None] * len(wanted)
    for positions in by_key(homes).values():
        moved = jax.device_put(_sources([wanted[at] for at in positions]), homes[positions[0]])
        for at, array in zip(positions, moved, strict=True):
            arrays[at] = array
    yield from structure.unflatten(arrays).items()


def _sources(fills: Sequence[Fill]) -> list[np.ndarray]:
    """The arrays as NumPy has them, those of one number in the same memory.

    It begins at an address that XLA does not take over without copying: each slot gets memory of its own.
    """
    sizes: defaultdict[Any, int] = defaultdict(int)
    for shape, dtype, value in fills:
        sizes[dtype, value] = max(sizes[dtype, value], math.prod(shape))
    memory = {}
    for (dtype, value), size in sizes.items():
        raw = np.zeros((size + 1) * dtype.itemsize + ALIGNED, np.uint8)
        start = -raw.ctypes.data % ALIGNED + dtype.itemsize
        memory[dtype, value] = raw[start : start + size * dtype.itemsize].view(dtype)
        if value != 0:
            memory[dtype, value].fill(value)
    return [memory[dtype, value][: math.prod(shape)].reshape(shape) for shape, dtype, value in fills]


# --- By one program ---------------------------------------------------------------------------------------------------


def _compiled(rule: Rule, each: Sequence[tuple[Array, Any, Any]]) -> list[Any]:
    """The slots of each parameter, made by one program; all parameters lie on the same devices."""
    params, hypers, flags = zip(*each, strict=True)
    if any(sharding_of(param) is not None and not isinstance(param.sharding, NamedSharding) for param in params):
        return [initial_slots(rule, *one) for one in each]  # where only an array that exists can be put
    leaves, structures = zip(*map(jax.tree.flatten, hypers), strict=True)
    arrays = [[leaf if _is_array(leaf) else None for leaf in row] for row in leaves]
    numbers = tuple(tuple(None if _is_array(leaf) else leaf for leaf in row) for row in leaves)
    make = functools.partial(_slots_of_all, rule=rule, structures=structures, numbers=numbers, flags=flags)
    homes = [
        jax.tree.map(lambda slot, param=param: _home(slot.shape, param), slots)
        for param, slots in zip(params, jax.eval_shape(make, params, arrays), strict=True)
    ]
    static = "rule", "structures", "numbers", "flags"
    program = jax.jit(_slots_of_all, static_argnames=static, out_shardings=homes)
    return program(params, arrays, **make.keywords)


def _slots_of_all(params: Any, arrays: Any, rule: Rule, structures: Any, numbers: Any, flags: Any) -> list[Any]:
    """The slots of each parameter, the hyperparameters of which are arrays or else numbers that are compiled in."""
    made = []
    for param, row, structure, plain, flag in zip(params, arrays, structures, numbers, flags, strict=True):
        leaves = [number if array is None else array for array, number in zip(row, plain, strict=True)]
        made.append(initial_slots(rule, param, structure.unflatten(leaves), flag))
    return made


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray))


# --- Where they belong ------------------------------------------------------------------------------------------------


def _home(shape: tuple[int, ...], param: Array) -> Any:
    """Where a slot of this shape is bound to be; ``None`` where it follows whatever it is used with."""
    sharding = param.sharding if param.committed else None
    return along(shape, param.shape, sharding) if isinstance(sharding, NamedSharding) else sharding
