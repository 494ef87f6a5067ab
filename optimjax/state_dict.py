"""State dicts in PyTorch's layout: out (:func:`pack`) and in (:func:`load`)."""

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimjax.parameter import Parameter
from optimjax.tree import from_tensor

if TYPE_CHECKING:
    from optimjax.optimizer import Optimizer

__all__ = ["IncompatibleKeys", "load", "pack", "plain"]


def pack(optimizer: "Optimizer") -> dict[str, Any]:
    """``{'state': {0: {...}}, 'param_groups': [{..., 'params': [0, 1]}]}``; parameters are numbered in group order.

    A snapshot: arrays are immutable, and handing them out keeps the next step from updating them in place.
    """
    number: dict[Parameter, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for box in group["params"]:
            number.setdefault(box, len(number))
        packed = {key: list(value) if isinstance(value, list) else value for key, value in group.items()}
        groups.append(packed | {"params": [number[box] for box in group["params"]]})
    state = {number[box]: dict(entries) for box, entries in optimizer.state.items() if box in number and entries}
    return {"state": dict(sorted(state.items())), "param_groups": groups}


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
    saved_groups = _groups(state_dict, optimizer.defaults)
    ids, keys = (_matched if strict else _found)(optimizer.param_groups, saved_groups)
    saved_state = _state(state_dict, saved_groups)
    groups: list[dict[str, Any]] = []
    state: dict[Parameter, Mapping[str, Any]] = {}
    for index, (group, ids_of_group) in enumerate(zip(optimizer.param_groups, ids, strict=True)):
        where = f" of param_groups[{index}]"
        saved = saved_groups[index] if index < len(saved_groups) else group
        merged = {**optimizer.defaults, **saved, "params": list(group["params"])}
        if "param_names" in group:
            merged["param_names"] = list(group["param_names"])
        groups.append(merged)
        shapes = optimizer._slot_shapes(merged, where)
        if optimizer.joint_state and list(ids_of_group) != list(saved["params"]):
            raise ValueError(
                f"{type(optimizer).__name__} keeps one vector for all parameters, whose order must be that of the "
                f"loaded state dict: {saved['param_names']}, the optimizer has {group['param_names']}"
            )
        for position, (box, saved_id) in enumerate(zip(group["params"], ids_of_group, strict=True)):
            if saved_id is None:
                state[box] = optimizer.state.get(box, {})
                continue
            entries = saved_state.get(str(saved_id))
            try:
                state[box] = _entries(optimizer, box, entries, shapes) if entries else {}
            except _ShapeError as error:
                if strict or "param_names" not in group:
                    hint = (
                        "" if strict else "; strict=False needs names: make the optimizer from optim.named_parameters"
                    )
                    raise ValueError(f"{error}{hint}") from None
                state[box] = optimizer.state.get(box, {})
                for names in keys:
                    names.append(group["param_names"][position])

    # Nothing can fail from here on.
    for group, merged in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(merged)
    state = {box: dict(entries) for box, entries in state.items() if entries}
    optimizer.state.clear()
    for box, entries in state.items():
        optimizer.state[box].update(entries)
    return keys


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


def _state(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved state by parameter. Of JSON, and some checkpointers, the numbers of parameters come back as text."""
    state = state_dict["state"]
    if not isinstance(state, Mapping):
        raise ValueError(f"'state' of a state dict is a dict, got {state!r}")
    known = {str(saved_id) for group in groups for saved_id in group["params"]}
    unknown = [key for key in state if str(key) not in known]
    if unknown:
        raise ValueError(f"loaded state dict has state for parameters that are in none of its groups: {unknown}")
    for key, entries in state.items():
        if entries is not None and not isinstance(entries, Mapping):
            raise ValueError(f"loaded state of parameter {key} is no dict, but {entries!r}")
    return {str(key): entries for key, entries in state.items()}


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


def _entries(optimizer: "Optimizer", box: Parameter, saved: Mapping[str, Any], shapes: Any) -> dict[str, Any]:
    """The state of one parameter, as arrays of the saved dtype."""
    entries = {}
    convert = functools.partial(_array, box=box)
    if shapes is None:  # an optimizer with a step of its own may keep lists, or any trees
        convert = functools.partial(jax.tree.map, convert)
    for name, value in saved.items():
        if value is not None:
            try:
                entries[name] = int(np.asarray(value)) if name == "step" else convert(value)
            except (TypeError, ValueError) as error:
                what = "a number" if name == "step" else "an array"
                message = f"loaded state of parameter {str(box)!r}: {name!r} is {value!r}, which is not {what}: {error}"
                raise ValueError(message) from None
    if shapes is None:
        return optimizer._checked(box, entries)
    expected = shapes(box)
    for name, value in entries.items():
        if name == "step" and optimizer._rule().counts_steps:
            continue
        if name not in expected:
            raise ValueError(
                f"loaded state of parameter {str(box)!r} has {name!r}, which {type(optimizer).__name__} does not keep"
            )
        if expected[name] is not None and isinstance(value, (bool, int, float)):
            entries[name] = value = jnp.asarray(value, jnp.float32)  # as JSON and older PyTorch have scalars
        if expected[name] is not None and value.shape != expected[name]:
            raise _ShapeError(
                f"loaded state of parameter {str(box)!r}: {name!r} has shape {value.shape}, expected {expected[name]}"
            )
    wanted = [name for name, shape in expected.items() if shape is not None]
    absent = [name for name in ["step"] * optimizer._rule().counts_steps + wanted if name not in entries]
    if entries and absent:
        raise ValueError(f"loaded state of parameter {str(box)!r} lacks {absent}")
    return entries


def _array(value: Any, box: Parameter) -> Any:
    """A JAX array of the saved dtype, placed like the parameter; plain numbers stay as they are."""
    if isinstance(value, (bool, int, float)):
        return value
    array = jnp.array(from_tensor(value))
    sharding = getattr(box.value, "sharding", None)
    if array.shape == box.shape and not isinstance(sharding, (jax.sharding.SingleDeviceSharding, type(None))):
        array = jax.device_put(array, sharding)
    return array


def plain(value: Any, default: Any = None) -> Any:
    """Undo what checkpointers and other frameworks do to plain Python values in groups."""
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(default, tuple) else type(value))(map(plain, value))
    value = from_tensor(value)
    if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0:
        return value.item()
    return value
