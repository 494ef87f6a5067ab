"""State dicts in PyTorch's layout: out (:func:`pack`) and in (:func:`read`)."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimjax._core.containers import copied, plain
from optimjax._core.definition import Definition, names_of_others, of_group
from optimjax._core.reading import ShapeError, as_count, read_array, read_slot, reading
from optimjax._engine.state import ParameterState
from optimjax._params.parameter import Parameter

__all__ = ["IncompatibleKeys", "as_dict", "named", "pack", "read", "reader_of", "unknown_entry"]

Groups = Sequence[dict[str, Any]]
Reader = Callable[[Parameter, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


def pack(groups: Groups, state: Mapping[Any, Any]) -> dict[str, Any]:
    """``{'state': {0: {...}}, 'param_groups': [{..., 'params': [0, 1]}]}``; parameters are numbered in group order.

    What an optimizer keeps under other keys than parameters comes after their state, under its own keys. A snapshot:
    whatever can be edited in place is copied; arrays of JAX are immutable, and handing them out keeps the next step
    from updating them in place.
    """
    number: dict[Parameter, int] = {}
    packed = []
    for group in groups:
        for parameter in group["params"]:
            number.setdefault(parameter, len(number))
        packed.append(copied({**named(group), "params": [number[parameter] for parameter in group["params"]]}))
    kept = {number[key]: dict(entries) for key, entries in state.items() if key in number and entries}
    return {"state": copied(dict(sorted(kept.items())) | _others(state)), "param_groups": packed}


def named(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the name of its algorithm in place of the class."""
    return {key: getattr(value, "__name__", value) if key == "algorithm" else value for key, value in group.items()}


class IncompatibleKeys(NamedTuple):
    """What a state dict lacked and what it had alongside, as ``torch.nn.Module.load_state_dict`` returns it.

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


def read(
    state_dict: Any,
    groups: Groups,
    state: Mapping[Any, Any],
    own: Definition,
    defaults: Mapping[str, Any],
    reader: Callable[[dict[str, Any], str], Reader],
    *,
    strict: bool = True,
    in_order: str = "",
) -> tuple[list[dict[str, Any]], dict[Any, Any], IncompatibleKeys]:
    """The groups and the state that a state dict says, for an optimizer that has these; nothing is changed.

    Parameters are matched by name where both sides have names, else by order. Unless ``strict``, what has no match
    stays as it is.

    Args:
      state_dict: what was saved.
      groups: those of the optimizer.
      state: what the optimizer keeps.
      own: what updates the groups that have no ``algorithm``.
      defaults: options of such groups that were saved without them.
      reader: for a loaded group, and where it is, gives a function that reads the entries of a parameter.
      strict: whether everything must match.
      in_order: the name of an algorithm whose state needs the parameters in the saved order, or nothing.

    Returns:
      New groups, new state, and the names that did not match.

    Raises:
      ValueError: the state dict does not fit.
    """
    defaults_by_group = [_present(group, own) if "algorithm" in group else defaults for group in groups]
    with reading():
        saved_groups = _groups(as_dict(state_dict), defaults_by_group)
    ids, (missing, unexpected) = (_matched if strict else _found)(groups, saved_groups, own)
    with reading():
        saved_state, saved_others = _state(state_dict, saved_groups)
        saved_others = copied(saved_others, read_array)
    new_groups: list[dict[str, Any]] = []
    new_state: dict[Any, Any] = {}
    for index, (group, ids_of_group) in enumerate(zip(groups, ids, strict=True)):
        saved = saved_groups[index] if strict else _counterpart(index, group, saved_groups, own)
        merged = {**defaults_by_group[index], **saved, "params": list(group["params"])}
        for key in ("algorithm", "param_names", *(() if strict else of_group(group, own).of_parameters)):
            merged.pop(key, None)
            if key in group:
                merged[key] = copied(group[key])
        new_groups.append(merged)
        entries_of = reader(merged, f" of param_groups[{index}]")
        if in_order and list(ids_of_group) != list(saved["params"]):
            raise ValueError(
                f"{in_order} keeps one vector for all parameters, whose order must be that of the "
                f"loaded state dict: {saved['param_names']}, the optimizer has {group['param_names']}"
            )
        for position, (parameter, saved_id) in enumerate(zip(group["params"], ids_of_group, strict=True)):
            present = state.get(parameter, {})
            new_state[parameter] = present  # kept if nothing matches
            if saved_id is None:
                continue
            entries = saved_state.get(str(saved_id)) or {}
            try:
                new_state[parameter] = ParameterState(entries and entries_of(parameter, entries, present))
            except ShapeError as error:
                if strict or "param_names" not in group:
                    hint = (
                        "" if strict else "; strict=False needs names: make the optimizer from optim.named_parameters"
                    )
                    raise ValueError(f"{error}{hint}") from None
                missing = [*missing, group["param_names"][position]]
                unexpected = [*unexpected, group["param_names"][position]]
    kept = {parameter: entries for parameter, entries in new_state.items() if entries}
    others = ({} if strict else _others(state)) | saved_others
    return new_groups, kept | others, IncompatibleKeys(missing, unexpected)


def _present(group: Mapping[str, Any], own: Definition) -> dict[str, Any]:
    """The options that a group has now."""
    return {key: group[key] for key in of_group(group, own).hyperparameters.kinds if key in group}


def _counterpart(
    index: int, group: dict[str, Any], saved_groups: Sequence[dict[str, Any]], own: Definition
) -> dict[str, Any]:
    """The saved group that a group takes its options from, if not everything has to match; or the group itself.

    It is the one of the same algorithm that has most of the parameters, or else that of the same index.
    """
    names = set(group.get("param_names", ()))
    alike = [
        (len(names.intersection(saved.get("param_names", ()))), place == index, -place)
        for place, saved in enumerate(saved_groups)
        if _algorithm(saved, own) == of_group(group, own).name
    ]
    shared, here, place = max(alike, default=(0, False, 0))
    return saved_groups[-place] if shared or here else group


def _others(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is kept under other keys than parameters."""
    return {key: value for key, value in state.items() if not isinstance(key, Parameter)}


def as_dict(state_dict: Any) -> dict[str, Any]:
    """A shallow copy of a state dict, or ``ValueError`` if it is not a dict."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a state dict is a dict, got {type(state_dict).__name__}: {state_dict!r}")
    return dict(state_dict)


def _algorithm(saved: Mapping[str, Any], own: Definition) -> str:
    """The name of the algorithm that a saved group, or one of the optimizer's, is updated by."""
    algorithm = saved.get("algorithm", own.name)
    return algorithm.__name__ if isinstance(algorithm, type) else str(algorithm)


def _groups(state_dict: Mapping[str, Any], defaults: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
        usual = defaults[index] if index < len(defaults) else {}
        group = {key: plain(value, usual.get(key)) for key, value in saved.items()}
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
    others = {key: value for key, value in state.items() if str(key) not in known}
    if unknown := [key for key in others if isinstance(key, (int, np.integer)) or str(key).isdecimal()]:
        raise ValueError(f"loaded state dict has state for parameters that are in none of its groups: {unknown}")
    entries_of: dict[str, Any] = {}
    for key, entries in state.items():
        if key in others:
            continue
        if str(key) in entries_of:
            raise ValueError(f"loaded state dict has the state of parameter {key} twice, under a number and as text")
        if entries is not None and not isinstance(entries, Mapping):
            raise ValueError(f"loaded state of parameter {key} is not a dict, but {entries!r}")
        entries_of[str(key)] = entries
    return entries_of, others


def _matched(
    groups: Sequence[Any], saved_groups: Sequence[Any], own: Definition
) -> tuple[list[Sequence[Any]], IncompatibleKeys]:
    """The saved ids in the order of each group's parameters; everything must have its counterpart."""
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    ids = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f" of param_groups[{index}]"
        if _algorithm(saved, own) != of_group(group, own).name:
            raise ValueError(
                f"loaded state dict has param_groups[{index}] of {_algorithm(saved, own)}, which here is updated by "
                f"{of_group(group, own).name}"
            )
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


def _found(
    groups: Sequence[Any], saved_groups: Sequence[Any], own: Definition
) -> tuple[list[Sequence[Any]], IncompatibleKeys]:
    """The saved ids in the order of each group's parameters, ``None`` where there is none, and what has no match.

    A name is looked for in the group of the same index; in the others only if it is one parameter's on both sides.
    State of another algorithm does not match.
    """
    if not all("param_names" in group for group in [*groups, *saved_groups]):
        try:
            return _matched(groups, saved_groups, own)
        except ValueError as error:
            raise ValueError(
                f"{error}; strict=False needs names on both sides: make the optimizer from optim.named_parameters"
            ) from None
    saved = [dict(zip(group["param_names"], group["params"], strict=True)) for group in saved_groups]
    ours, theirs = (Counter(name for group in side for name in group["param_names"]) for side in (groups, saved_groups))
    by_algorithm = [(_algorithm(group, own), ids) for group, ids in zip(saved_groups, saved, strict=True)]
    anywhere = {
        (algorithm, name): saved_id
        for algorithm, ids_of_group in by_algorithm
        for name, saved_id in ids_of_group.items()
        if ours[name] == theirs[name] == 1
    }
    ids, missing = [], []
    for index, group in enumerate(groups):
        algorithm = of_group(group, own).name
        here = by_algorithm[index][1] if index < len(saved) and by_algorithm[index][0] == algorithm else {}
        found = [here.get(name, anywhere.get((algorithm, name))) for name in group["param_names"]]
        ids.append(found)
        missing += [name for name, saved_id in zip(group["param_names"], found, strict=True) if saved_id is None]
    used = set(itertools.chain.from_iterable(ids))
    unexpected = [name for group in saved for name, saved_id in group.items() if saved_id not in used]
    return ids, IncompatibleKeys(missing, unexpected)


def reader_of(definition: Definition, group: Mapping[str, Any], where: str) -> Reader:
    """What reads the loaded entries of the parameters of a loaded group.

    Slots become arrays of the saved dtype; what the user keeps alongside stays as it is.

    Raises:
      ValueError, TypeError: an option of the group is not legal.
    """
    definition.hyperparameters.check_structural(group)
    _, flags = definition.resolve(group, where)
    rule = definition.rule
    if rule is None:  # an optimizer with a step of its own may keep anything
        return lambda parameter, saved, present: unknown_entry(parameter, dict(saved))

    def entries_of(parameter: Parameter, saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
        definition.check_param(parameter.value, flags, parameter.__str__)
        of_parameter = f"loaded state of parameter {str(parameter)!r}"
        types = definition.slot_types(flags, parameter.shape, parameter.dtype)
        strange = names_of_others(definition) - present.keys()
        entries: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, value in saved.items():
            one = f"{of_parameter}: {name!r}"
            if rule.counts_steps and name == "step":
                entries[name] = as_count(value, one)
            elif name in types:
                if value is not None:
                    entries[name] = read_slot(value, types[name], parameter.value, one, present.get(name))
            elif name in strange and value is not None:
                raise ValueError(f"{of_parameter} has {name!r}, which {definition.name} does not keep")
            else:
                own[name] = unknown_entry(parameter, value)
        wanted = [name for name, type_ in types.items() if type_ is not None]
        absent = [name for name in ["step"] * rule.counts_steps + wanted if name not in entries]
        if entries and absent:
            raise ValueError(f"{of_parameter} lacks {absent}")
        return entries | own

    return entries_of


def unknown_entry(parameter: Parameter, value: Any) -> Any:
    """An entry that no algorithm knows, or a tree of them: arrays become those of JAX, where the parameter is."""
    with reading():
        return copied(value, lambda leaf: read_array(leaf, parameter.value))
