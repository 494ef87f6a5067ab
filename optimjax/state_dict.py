"""State dicts in PyTorch's layout: out (:func:`pack`) and in (:func:`load`)."""

import copy
import functools
import itertools
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax.parameter import Parameter
from optimjax.placement import place, sharding_of
from optimjax.step import ParameterState
from optimjax.tree import from_tensor

if TYPE_CHECKING:
    from optimjax.optimizer import Optimizer

__all__ = ["IncompatibleKeys", "as_count", "as_dict", "copied", "load", "pack", "plain", "read_slot", "slot_array"]


def pack(optimizer: "Optimizer") -> dict[str, Any]:
    """``{'state': {0: {...}}, 'param_groups': [{..., 'params': [0, 1]}]}``; parameters are numbered in group order.

    What an optimizer keeps under other keys than parameters comes after their state, under its own keys. A snapshot:
    whatever can be edited in place is copied; arrays of JAX are immutable, and handing them out keeps the next step
    from updating them in place.
    """
    number: dict[Parameter, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for box in group["params"]:
            number.setdefault(box, len(number))
        groups.append(copied({**group, "params": [number[box] for box in group["params"]]}))
    state = {number[box]: dict(entries) for box, entries in optimizer.state.items() if box in number and entries}
    return {"state": copied(dict(sorted(state.items())) | _beside(optimizer.state)), "param_groups": groups}


class IncompatibleKeys(NamedTuple):
    """What a state dict lacked and what it had beside, as ``torch.nn.Module.load_state_dict`` returns it.

    Attributes:
      missing_keys: names of parameters whose state was not loaded.
      unexpected_keys: names of saved parameters whose state was not used. A name in both has another shape now.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not any(self):
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


class _ShapeError(ValueError):
    """Saved state has another shape than this parameter's."""


def load(optimizer: "Optimizer", state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
    """Set groups and state from a state dict, or raise and change nothing.

    Parameters are matched by name where both sides have names, else by order. Unless ``strict``, what has no match is
    left as it is.
    """
    with _reading():
        saved_groups = _groups(as_dict(state_dict), optimizer.defaults)
    ids, keys = (_matched if strict else _found)(optimizer.param_groups, saved_groups)
    with _reading():
        saved_state, saved_beside = _state(state_dict, saved_groups)
        saved_beside = copied(saved_beside, _array)
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = {}
    for index, (group, ids_of_group) in enumerate(zip(optimizer.param_groups, ids, strict=True)):
        where = f" of param_groups[{index}]"
        saved = saved_groups[index] if index < len(saved_groups) else group
        merged = {**optimizer.defaults, **saved, "params": list(group["params"])}
        if "param_names" in group:
            merged["param_names"] = list(group["param_names"])
        groups.append(merged)
        types = optimizer._slot_types(merged, where)
        if optimizer.joint_state and list(ids_of_group) != list(saved["params"]):
            raise ValueError(
                f"{type(optimizer).__name__} keeps one vector for all parameters, whose order must be that of the "
                f"loaded state dict: {saved['param_names']}, the optimizer has {group['param_names']}"
            )
        for position, (box, saved_id) in enumerate(zip(group["params"], ids_of_group, strict=True)):
            state[box] = optimizer.state.get(box, ParameterState())  # which stays where nothing fits
            if saved_id is None:
                continue
            entries = saved_state.get(str(saved_id)) or {}
            try:
                state[box] = ParameterState(entries and _entries(optimizer, box, entries, types))
            except _ShapeError as error:
                if strict or "param_names" not in group:
                    hint = (
                        "" if strict else "; strict=False needs names: make the optimizer from optim.named_parameters"
                    )
                    raise ValueError(f"{error}{hint}") from None
                for names in keys:
                    names.append(group["param_names"][position])

    state = {box: entries for box, entries in state.items() if entries}
    beside = ({} if strict else _beside(optimizer.state)) | saved_beside
    before = [dict(group) for group in optimizer.param_groups], dict(optimizer.state)
    try:
        _set(optimizer, groups, state | beside)
        # As in PyTorch: a subclass may complete here what an older version of it has saved.
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    except BaseException:
        _set(optimizer, *before)
        raise
    return keys


@contextmanager
def _reading() -> Iterator[None]:
    """What fails because a container holds itself, or an array was deleted, is an error of the state dict."""
    try:
        yield
    except (AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"the state dict cannot be read: {type(error).__name__}: {error}") from error


def _set(optimizer: "Optimizer", groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Give the groups, which stay the same objects, and the state these contents."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(values)
    optimizer.state.clear()
    optimizer.state.update(state)


def _beside(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is kept under other keys than parameters."""
    return {key: value for key, value in state.items() if not isinstance(key, Parameter)}


def as_dict(state_dict: Any) -> dict[str, Any]:
    """A shallow copy of a state dict, or ``ValueError`` where it is no dict."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a state dict is a dict, got {type(state_dict).__name__}: {state_dict!r}")
    return dict(state_dict)


def _groups(state_dict: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The saved groups, with plain values."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"a state dict has the keys 'state' and 'param_groups', got {sorted(map(str, state_dict))}")
    if not isinstance(state_dict["param_groups"], (list, tuple)):
        raise ValueError(f"'param_groups' of a state dict is a list, got {state_dict['param_groups']!r}")
    groups = []
    for index, saved in enumerate(state_dict["param_groups"]):
        where = f"param_groups[{index}]"
        if not isinstance(saved, Mapping):
            raise ValueError(f"loaded state dict has no dict in {where}, but {saved!r}")
        group = {key: plain(value, defaults.get(key)) for key, value in saved.items()}
        if "params" not in group:
            raise ValueError(f"loaded state dict has no 'params' in {where}, only {sorted(map(str, group))}")
        params, names = group["params"], group.get("param_names", [])
        if not isinstance(params, (list, tuple)) or not all(isinstance(each, (int, str)) for each in params):
            raise ValueError(f"loaded state dict has no list of numbers in 'params' of {where}, but {params!r}")
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"loaded state dict has no list of names in 'param_names' of {where}, but {names!r}")
        if "param_names" in group and len(names) != len(params):
            raise ValueError(f"loaded state dict has {len(names)} names for {len(params)} parameters in {where}")
        groups.append(group)
    return groups


def _state(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The saved state by parameter, and what was saved under other keys.

    Of JSON, and some checkpointers, the numbers of parameters come back as text.
    """
    state = state_dict["state"]
    if not isinstance(state, Mapping):
        raise ValueError(f"'state' of a state dict is a dict, got {state!r}")
    known = Counter(str(saved_id) for group in groups for saved_id in group["params"])
    if twice := [saved_id for saved_id, times in known.items() if times > 1]:
        raise ValueError(f"loaded state dict has parameters more than once in its groups: {', '.join(twice)}")
    beside = {key: value for key, value in state.items() if str(key) not in known}
    if unknown := [key for key in beside if isinstance(key, (int, np.integer)) or str(key).isdecimal()]:
        raise ValueError(f"loaded state dict has state for parameters that are in none of its groups: {unknown}")
    entries_of: dict[str, Any] = {}
    for key, entries in state.items():
        if key in beside:
            continue
        if str(key) in entries_of:
            raise ValueError(f"loaded state dict has the state of parameter {key} twice, under a number and as text")
        if entries is not None and not isinstance(entries, Mapping):
            raise ValueError(f"loaded state of parameter {key} is no dict, but {entries!r}")
        entries_of[str(key)] = entries
    return entries_of, beside


def _matched(groups: Sequence[Any], saved_groups: Sequence[Any]) -> tuple[list[Sequence[Any]], IncompatibleKeys]:
    """The saved ids in the order of each group's parameters; everything must have its counterpart."""
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    ids = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f" of param_groups[{index}]"
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"{len(saved['params'])} parameters, the optimizer has {len(group['params'])}{where}"
            )
        ours, theirs = group.get("param_names"), saved.get("param_names")
        if ours is None or theirs is None:
            ids.append(saved["params"])
            continue
        if set(ours) != set(theirs):
            missing = [name for name in ours if name not in theirs]
            unexpected = [name for name in theirs if name not in ours]
            raise ValueError(
                f"loaded state dict has other parameter names{where}: missing {missing}, unexpected {unexpected}; "
                "strict=False loads what both have"
            )
        by_name = dict(zip(theirs, saved["params"], strict=True))
        ids.append([by_name[name] for name in ours])
    return ids, IncompatibleKeys([], [])


def _found(groups: Sequence[Any], saved_groups: Sequence[Any]) -> tuple[list[Sequence[Any]], IncompatibleKeys]:
    """The saved ids in the order of each group's parameters, ``None`` where there is none, and what has no match.

    A name is looked for in the group of the same index; in the others only if it is one parameter's on both sides.
    """
    if not all("param_names" in group for group in [*groups, *saved_groups]):
        try:
            return _matched(groups, saved_groups)
        except ValueError as error:
            raise ValueError(
                f"{error}; strict=False needs names on both sides: make the optimizer from optim.named_parameters"
            ) from None
    saved = [dict(zip(group["param_names"], group["params"], strict=True)) for group in saved_groups]
    ours, theirs = (Counter(name for group in side for name in group["param_names"]) for side in (groups, saved_groups))
    anywhere = {name: saved_id for own in saved for name, saved_id in own.items() if ours[name] == theirs[name] == 1}
    ids, missing = [], []
    for group, own in zip(groups, itertools.chain(saved, itertools.repeat({})), strict=False):
        found = [own.get(name, anywhere.get(name)) for name in group["param_names"]]
        ids.append(found)
        missing += [name for name, saved_id in zip(group["param_names"], found, strict=True) if saved_id is None]
    used = set(itertools.chain.from_iterable(ids))
    unexpected = [name for own in saved for name, saved_id in own.items() if saved_id not in used]
    return ids, IncompatibleKeys(missing, unexpected)


def _entries(optimizer: "Optimizer", box: Parameter, saved: Mapping[str, Any], types: Any) -> dict[str, Any]:
    """The state of one parameter: slots as arrays of the saved dtype, and what the user keeps alongside as it is."""
    if types is None:  # an optimizer with a step of its own may keep anything
        return optimizer._checked(box, copied(dict(saved), functools.partial(_array, box=box)))
    of_parameter = f"loaded state of parameter {str(box)!r}"
    counts, expected = optimizer._rule().counts_steps, types(box)
    present = optimizer.state.get(box, {})
    strange = optimizer._names_of_others() - present.keys()
    entries: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, value in saved.items():
        where = f"{of_parameter}: {name!r}"
        if counts and name == "step":
            entries[name] = as_count(value, where)
        elif name in expected:
            if value is not None:
                entries[name] = read_slot(value, expected[name], box.value, where, present.get(name))
        elif name in strange and value is not None:
            raise ValueError(f"{of_parameter} has {name!r}, which {type(optimizer).__name__} does not keep")
        else:
            with _reading():
                own[name] = copied(value, functools.partial(_array, box=box))
    wanted = [name for name, type_ in expected.items() if type_ is not None]
    absent = [name for name in ["step"] * counts + wanted if name not in entries]
    if entries and absent:
        raise ValueError(f"{of_parameter} lacks {absent}")
    return entries | own


def read_slot(value: Any, type_: Any, param: jax.Array, where: str, present: Any = None) -> Any:
    """What a slot is given, loaded or edited by hand: arrays of the right structure, shapes and kinds.

    They keep their dtypes, and lie where they lie if that is on several devices; else where the present slot or the
    parameter does.

    Args:
      value: an array of JAX, NumPy or PyTorch, a number, or where the slot is a tree, a tree of these.
      type_: shape and dtype, or a tree of them; ``None`` for a slot that the parameter has not.
      param: the parameter's value.
      where: how messages begin.
      present: the slot's present value, if it has one.

    Raises:
      ValueError: it is of another structure, shape or kind, or was deleted.
    """
    if type_ is None:  # PyTorch may have saved it under other flags
        return _placed(slot_array(value, param.dtype, where), value, param, present)
    types, structure = jax.tree.flatten(type_)
    if jax.tree_util.treedef_is_leaf(structure):
        return _read_array(value, type_, param, where, present)
    try:
        values = structure.flatten_up_to(_tuples(value))
    except ValueError as error:
        raise ValueError(f"{where} has another structure: {error}") from None
    olds = jax.tree.leaves(present) if jax.tree.structure(present) == structure else [None] * len(types)
    return structure.unflatten(
        [
            _read_array(each, type_, param, f"{where}[{index}]", old)
            for index, (each, type_, old) in enumerate(zip(values, types, olds, strict=True))
        ]
    )


def _tuples(value: Any) -> Any:
    """Tuples in place of lists, which checkpointers make of them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_array(value: Any, type_: Any, param: jax.Array, where: str, present: Any) -> Any:
    if isinstance(value, Tracer):
        return value
    array = slot_array(value, type_.dtype, where)
    if array.shape != type_.shape:
        raise _ShapeError(f"{where} has shape {array.shape}, expected {type_.shape}")
    return _placed(array, value, param, present)


def _placed(array: jax.Array, given: Any, param: Any, present: Any = None) -> jax.Array:
    """What was given stays where somebody has placed it; else it goes where the present one is, or its parameter."""
    return array if sharding_of(given) is not None else place(array, param, present)


def as_count(value: Any, where: str) -> int:
    """A number of updates, or ``ValueError`` that begins with ``where``."""
    try:
        number = np.asarray(from_tensor(value)).item()
        # Infinity has no remainder; what is larger than any float cannot be computed with.
        if number >= 0 and number % 1 == 0 and float(number) >= 0:
            return int(number)
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError):
        pass
    raise ValueError(f"{where} is {reprlib.repr(value)}, which is not a whole number from 0 on")


def slot_array(value: Any, dtype: Any, where: str) -> jax.Array:
    """What is loaded into a slot of this dtype: an array of the same kind, which keeps its own dtype.

    Plain numbers, and lists of them, get the slot's dtype; real numbers will do for complex ones.

    Raises:
      ValueError: it is of another kind; the message begins with ``where``.
    """
    try:
        return _of_kind(from_tensor(value), dtype)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is {reprlib.repr(value)}, which cannot be loaded: {error}") from None


def _of_kind(value: Any, dtype: Any) -> jax.Array:
    value = _present(value)
    is_plain = isinstance(value, (int, float, complex, list, tuple))
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kind, most = _kind(array.dtype), _kind(dtype)
    least = min(most, _kind(jnp.int32 if is_plain else jnp.float32))
    if kind is None or not least <= kind <= most:
        raise TypeError(f"its dtype {array.dtype} is of another kind than {dtype}")
    if is_plain:
        array = array.astype(dtype)
    array = array if isinstance(array, jax.Array) else jnp.array(array)
    if kind == most:
        return array
    with jax.numpy_dtype_promotion("standard"):  # meant here, whatever is forbidden elsewhere
        return array.astype(jnp.promote_types(array.dtype, dtype))


_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)  # each can hold those before it


def _kind(dtype: Any) -> Any:
    return next((index for index, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), None)


def _array(value: Any, box: Parameter | None = None) -> Any:
    """A JAX array in place of one of PyTorch or NumPy, whose own dtype JAX keeps; anything else as it is."""
    given = value = _present(from_tensor(value))
    if isinstance(value, np.ndarray):
        try:
            array = jnp.array(value)
        except TypeError:  # of strings, objects, ...
            return _own(value)
        value = array if array.dtype == value.dtype else _own(value)
    return _placed(value, given, box.value) if isinstance(value, jax.Array) and box is not None else value


def _present(value: Any) -> Any:
    """The value; or ``ValueError`` where it is an array that was deleted."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted():
        raise ValueError(f"an array of shape {value.shape} has been deleted")
    return value


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def copied(value: Any, leaf: Callable[[Any], Any] = _own) -> Any:
    """A copy of nested containers, with ``leaf`` of what they hold; it shares nothing that can be edited in place."""
    if isinstance(value, Mapping):
        twin = copy.copy(value) if isinstance(value, dict) else dict(value)
        for key in twin:
            twin[key] = copied(twin[key], leaf)
        return twin
    if isinstance(value, tuple):
        items = [copied(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, MutableSequence):
        twin = copy.copy(value)
        for index, item in enumerate(value):
            twin[index] = copied(item, leaf)
        return twin
    return copy.copy(value) if isinstance(value, Set) else leaf(value)


def plain(value: Any, default: Any = None) -> Any:
    """Undo what checkpointers and other frameworks do to plain Python values in groups; shares nothing that changes."""
    value = copied(value, _plain_leaf)
    return tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value


def _plain_leaf(value: Any) -> Any:
    value = _own(_present(from_tensor(value)))
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value
