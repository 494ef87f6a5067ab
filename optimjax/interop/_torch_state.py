"""State dicts of optimizers: PyTorch's names, axes and order into ours, and back."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from optimjax._core.containers import plain
from optimjax._core.contract import kinds_of_slots
from optimjax._core.definition import package
from optimjax._core.reading import reading
from optimjax._facade.state_dict import as_dict
from optimjax.interop._torch_arrays import as_array, as_tensors, is_array
from optimjax.interop._torch_layout import Layout, LayoutLike, Parts, ambiguous, join, parts_of, split
from optimjax.interop._torch_vectors import Entries, Member, is_joint, joint_to_ours, joint_to_torch

__all__ = ["from_torch", "to_torch"]

Layouts = Mapping[str, LayoutLike] | None
FACTORS = ("row_var", "col_var")  # of Adafactor: means along the last axis and along the last but one
SPLIT = "torch_group"  # the key that says which of PyTorch's groups a group is a part of
OURS = ("params", "param_names", "matrix_axes", SPLIT)  # what a group of PyTorch gets otherwise, or does not have
OTHER_RUN = (
    "so the run would be another one: train PyTorch's arrays as they are, as the page on PyTorch's checkpoints shows"
)


def from_torch(
    state_dict: Mapping[str, Any], *, layout: Layouts = None, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The state dict of an optimizer of PyTorch as ours, which ``load_state_dict`` takes.

    Slots that have the parameter's shape get its axes, and are split where the parameter is. Those of Adafactor that
    are kept along rows and columns are exchanged where rows and columns are, and the vectors of LBFGS are put together
    from the parameters in their own axes. A group of Muon gets the ``matrix_axes`` that the layouts say; if they differ
    within it, it becomes several groups, which :func:`to_torch` makes one again.

    Args:
      state_dict: what ``torch.optim.Optimizer.state_dict()`` returned, with tensors or with arrays.
      layout: by PyTorch's name of a parameter, what it is here: what :func:`load_weights` returned, or a
        :class:`Layout`, a tuple of axes, or ``None`` for an array that stays as it is. What is not in it stays as it
        is, too, unless it would fit with its axes exchanged.
      names: PyTorch's names of all parameters in the order of ``state_dict``, if it has none:
        ``[name for name, _ in torch_model.named_parameters()]``, where the optimizer was made of
        ``torch_model.parameters()``. An optimizer made of ``named_parameters()`` saves them.

    Raises:
      ValueError: it is not a state dict; the layout does not fit, or is needed and not given; or the run would not be
        the same, because the algorithm does not treat the array of PyTorch as it treats ours. The message names the
        parameter.

    >>> import numpy as np
    >>> from optimjax.interop.torch import Layout, from_torch
    >>> saved = {
    ...     "state": {0: {"momentum_buffer": np.ones((10, 32))}},
    ...     "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": [0], "param_names": ["fc.weight"]}],
    ... }
    >>> ours = from_torch(saved, layout={"fc.weight": Layout("fc.kernel", axes=(1, 0))})
    >>> print(ours["param_groups"][0]["param_names"], ours["state"][0]["momentum_buffer"].shape)
    ['fc.kernel'] (32, 10)
    """
    saved = _Saved(state_dict, layout, names)
    made = _Made(saved.others)
    for index, group in enumerate(saved.groups):
        members = [(name, _parts(layout, name), entries) for name, entries in saved.members(group)]
        if any(map(is_joint, (entries for _, _, entries in members))):
            made.add(group, joint_to_ours(members))
            continue
        by_axes: dict[Any, list[Member]] = {}
        for name, parts, entries in members:
            axes = _matrix_axes(group, parts, _label(name))
            by_axes.setdefault(axes, []).extend(_split(name, parts, entries))
        for axes, ours in by_axes.items():
            extra = {} if axes is None else {"matrix_axes": axes}
            made.add({**group, **extra, **({SPLIT: index} if len(by_axes) > 1 else {})}, ours)
        if not by_axes:
            made.add(group, [])
    return made.state_dict()


def to_torch(
    state_dict: Mapping[str, Any],
    *,
    layout: Layouts = None,
    names: Sequence[str] | None = None,
    tensors: bool = True,
) -> dict[str, Any]:
    """Our state dict as one that PyTorch's ``load_state_dict`` takes: the way back of :func:`from_torch`.

    PyTorch goes by the order of the parameters, not by their names. Within each group it is that of ``names``.

    Args:
      state_dict: what ``state_dict()`` of an optimizer with names returned: one of a module or of a tree.
      layout: the same as for :func:`from_torch`.
      names: PyTorch's names in the order in which its optimizer has the parameters. Unless given, the order is that of
        ``layout``, which for a layout derived from a PyTorch model's ``state_dict()`` is that of its parameters.
      tensors: whether to make tensors of PyTorch; else arrays are NumPy's, which :func:`save` writes as tensors.

    Raises:
      ValueError: as in :func:`from_torch`; or what is one array in PyTorch has not all of its parts in one group, or
        they have different counts.
      ImportError: tensors are asked for, and PyTorch is not installed.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> from optimjax.interop.torch import Layout, to_torch
    >>> optimizer = optim.SGD({"fc": {"kernel": jnp.ones((32, 10))}}, lr=0.1, momentum=0.9)
    >>> optimizer.step({"fc": {"kernel": jnp.ones((32, 10))}})
    >>> layout = {"fc.weight": Layout("fc.kernel", axes=(1, 0))}
    >>> theirs = to_torch(optimizer.state_dict(), layout=layout, tensors=False)
    >>> print(theirs["param_groups"][0]["param_names"], theirs["state"][0]["momentum_buffer"].shape)
    ['fc.weight'] (10, 32)
    """
    saved = _Saved(state_dict, layout, None)
    origin = _origin(layout)
    order = {name: place for place, name in enumerate(names if names is not None else layout or ())}
    made = _Made(saved.others)
    for group, members in _whole_groups(saved):
        whole = _whole(origin, members)
        if order and (unknown := [name for name, _, _ in whole if name not in order]):
            raise ValueError(f"where in PyTorch's order {unknown} are is not known: give all names in order, as names=")
        _check_matrix_axes(group, members, origin)
        ordered = sorted(whole, key=lambda member: order[member[0]]) if order else whole
        if any(is_joint(member.entries) for member in members):
            made.add(group, joint_to_torch(members, ordered))
        else:
            made.add(group, [_join(name, parts, entries) for name, parts, entries in ordered])
    packed = made.state_dict()
    return as_tensors(packed) if tensors else packed


# --- What was saved, and what is made of it -------------------------------------------------------------------------


class _Saved:
    """A state dict taken apart: groups, and by parameter its name and its entries."""

    def __init__(self, state_dict: Any, layout: Layouts, names: Sequence[str] | None):
        state_dict = as_dict(state_dict)
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"a state dict has the keys 'state' and 'param_groups', got {sorted(map(str, state_dict))}"
            )
        state, groups = state_dict["state"], state_dict["param_groups"]
        if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
            raise ValueError("'state' of a state dict is a dict, 'param_groups' a list")
        for index, group in enumerate(groups):
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
                raise ValueError(f"param_groups[{index}] is not a dict with a list of 'params', but {group!r}")
        self.groups: list[dict[str, Any]] = [dict(group) for group in groups]
        ids = [str(each) for group in self.groups for each in group["params"]]
        by_id = {str(key): value for key, value in state.items()}  # of JSON they come back as text
        self._entries = {each: dict(by_id.get(each) or {}) for each in ids}
        self.others = {key: value for key, value in state.items() if str(key) not in self._entries}
        self._names: dict[str, str | None] = dict.fromkeys(ids)
        if names is not None:
            if len(names) != len(ids):
                raise ValueError(f"names has {len(names)} names for {len(ids)} parameters")
            self._names = dict(zip(ids, names, strict=True))
        for group in self.groups:
            given = group.get("param_names")
            if given is not None and len(given) != len(group["params"]):
                raise ValueError(f"{len(given)} names for {len(group['params'])} parameters in a group: {given}")
            if given is not None and names is None:
                self._names |= dict(zip(map(str, group["params"]), given, strict=True))
        nameless = [each for each, name in self._names.items() if name is None]
        if nameless and layout is not None:
            raise ValueError(
                f"the state dict has no names for its parameters {', '.join(nameless)}, by which layout goes: "
                "from_torch takes them as names="
            )

    def members(self, group: Mapping[str, Any]) -> Iterator[tuple[Any, Entries]]:
        """The parameters of a group: name and entries, with arrays of NumPy or JAX."""
        for each in group["params"]:
            entries = self._entries[str(each)]
            with reading():
                yield self._names[str(each)], {key: _arrays(value) for key, value in entries.items()}


class _Made:
    """A state dict in the making; its parameters are numbered as they come."""

    def __init__(self, others: Mapping[Any, Any]):
        self._others, self._groups, self._state, self._count = dict(others), [], {}, 0

    def add(self, group: Mapping[str, Any], members: Sequence[Member]) -> None:
        first, self._count = self._count, self._count + len(members)
        options = {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        names = [member.name for member in members]
        named = {"param_names": names} if names and None not in names else {}
        self._groups.append({**options, "params": list(range(first, self._count)), **named})
        self._state |= {first + place: entries for place, (_, entries, *_) in enumerate(members) if entries}

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._state | self._others, "param_groups": self._groups}


def _arrays(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_arrays, value))
    return as_array(value) if is_array(value) else value


def _label(name: str | None) -> str:
    """A parameter as messages name it."""
    return "a parameter without a name" if name is None else repr(name)


def _parts(layout: Layouts, name: str | None) -> Parts | None:
    """What a parameter of PyTorch is here; ``None`` where the layout does not say it."""
    if layout is None or name is None or name not in layout:
        return None
    parts = parts_of(layout[name], name)
    if not parts:
        raise ValueError(f"{name!r} has no counterpart here, so its state cannot be converted")
    return parts


def _origin(layout: Layouts) -> dict[str, tuple[str, int, Parts]]:
    """For each of our names PyTorch's, and which of its parts it is."""
    pairs = [(name, parts_of(value, name)) for name, value in (layout or {}).items()]
    return {part.name or name: (name, place, parts) for name, parts in pairs for place, part in enumerate(parts)}


def _whole_groups(saved: _Saved) -> Iterator[tuple[dict[str, Any], list[Member]]]:
    """The groups as PyTorch has them, with the members of all that one of its groups has become."""
    algorithms = {str(named.get("algorithm")) for named in map(dict, saved.groups)}
    if len(algorithms) > 1:
        raise ValueError(
            f"the groups have the algorithms {sorted(algorithms)}, and an optimizer of PyTorch has one: use an "
            "optimizer for each here, too"
        )
    whole: dict[Any, tuple[dict[str, Any], list[Member]]] = {}
    for index, group in enumerate(saved.groups):
        if group.get("blocks") is not None:
            raise ValueError(f"param_groups[{index}] has blocks={group['blocks']}, which PyTorch's Muon lacks")
        options = {key: value for key, value in group.items() if key not in OURS}
        key = ("split", group[SPLIT]) if SPLIT in group else index
        first, members = whole.setdefault(key, (options, []))
        if other := sorted(name for name in first.keys() | options.keys() if first.get(name) != options.get(name)):
            raise ValueError(f"param_groups[{index}] was one with another group in PyTorch, and differs in {other} now")
        axes = group.get("matrix_axes")
        members += [Member(name, entries, axes) for name, entries in saved.members(group)]
    yield from whole.values()


def _whole(
    origin: Mapping[str, tuple[str, int, Parts]], members: Sequence[Member]
) -> list[tuple[Any, Parts | None, list[Entries]]]:
    """PyTorch's parameters, each with the entries of all of its parts."""
    found: dict[Any, tuple[Parts | None, dict[int, Entries]]] = {}
    for name, entries, *_ in members:
        theirs, place, parts = origin.get(name or "", (name, 0, None))
        key = theirs if theirs is not None else len(found)
        found.setdefault(key, (parts, {}))[1][place] = entries
    whole = []
    for key, (parts, by_place) in found.items():
        count = len(parts or (None,))
        if missing := [part.name for place, part in enumerate(parts or ()) if place not in by_place]:
            raise ValueError(f"{key!r} of PyTorch is one array, but {missing} are not in the group of its other parts")
        whole.append((key if isinstance(key, str) else None, parts, [by_place[place] for place in range(count)]))
    return whole


# --- The entries of a parameter -------------------------------------------------------------------------------------


def _is_shaped(name: str) -> bool | None:
    """Whether a slot has the parameter's shape, in any algorithm of the package; ``None`` if none knows it."""
    kinds = [kinds_of_slots(each.rule.slots) for each in package if each.rule is not None]
    fixed = [kind[name].fixed for kind in kinds if name in kind]
    return None if not fixed else not all(fixed)


def _shape_of(entries: Mapping[str, Any]) -> tuple[int, ...]:
    """The parameter's shape, as far as its entries tell."""
    if all(name in entries for name in FACTORS):
        return (*np.shape(entries["row_var"])[:-1], np.shape(entries["col_var"])[-1])
    return next((np.shape(value) for name, value in entries.items() if _is_shaped(name)), ())


def _split(name: str | None, parts: Parts | None, entries: Entries) -> list[Member]:
    """What a parameter of PyTorch is here, with its entries."""
    label = _label(name)
    parts = _certain(label, parts, entries)
    _check_same_run(label, parts, entries)
    made: list[Entries] = [{} for _ in parts]
    for key, value in entries.items():
        if _moves(label, key, value, parts):
            values = _fitting(label, key, lambda key=key, value=value: split(_for(key, parts), value))
        else:
            values = [value] * len(parts)
        for one, each in zip(made, values, strict=True):
            one[key] = each
    return [Member(part.name or name, _exchanged(one, parts)) for part, one in zip(parts, made, strict=True)]


def _join(name: str | None, parts: Parts | None, entries: Sequence[Entries]) -> Member:
    """What :func:`_split` came from."""
    label = _label(name)
    parts = _certain(label, parts, entries[0])
    _check_same_run(label, parts, entries[0])
    if len({frozenset(each) for each in entries}) > 1:
        raise ValueError(f"the parts of {label} have different state: {[sorted(each) for each in entries]}")
    joined: Entries = {}
    for key in entries[0]:
        values = [each[key] for each in entries]
        if _moves(label, key, values[0], parts):
            joined[key] = _fitting(label, key, lambda key=key, values=values: join(_for(key, parts), values))
        elif all(_same(values[0], value) for value in values[1:]):
            joined[key] = values[0]
        else:
            raise ValueError(f"the parts of {label} differ in {key!r}: {values}")
    return Member(name, _exchanged(joined, parts))


def _certain(label: str, parts: Parts | None, entries: Entries) -> Parts:
    """The layout; where there is none, the array stays, if it could not be meant otherwise."""
    if parts is not None:
        return parts
    shape = _shape_of(entries)
    if ambiguous(shape):
        raise ValueError(
            f"the state of {label} has shape {shape}, which would fit with its axes exchanged, too: name it in layout, "
            "with its axes, or with None if it stays as it is"
        )
    return (Layout(),)


def _check_same_run(label: str, parts: Parts, entries: Entries) -> None:
    """Refuse what works on an array as a whole where PyTorch has another array than we."""
    if not {*FACTORS, "variance"} & entries.keys():
        return
    first, *others = parts
    axes = first.axes or ()
    if others or not first.keeps_axes or sorted(axes[-2:]) != list(range(len(axes)))[-2:]:
        raise ValueError(f"Adafactor keeps means along the last two axes of {label}, which ours has not, {OTHER_RUN}")


def _moves(label: str, key: str, value: Any, parts: Parts) -> bool:
    """Whether an entry has the parameter's axes. What no algorithm knows can only stay as it is."""
    if value is not None and (_is_shaped(key) or key in FACTORS):
        return True
    first, *others = parts
    if getattr(value, "ndim", 0) and (others or first.axes or not first.keeps_axes):
        raise ValueError(f"{key!r} of {label} is a slot of one's own, so its layout does not say what becomes of it")
    return False


def _for(key: str, parts: Parts) -> Parts:
    """The layout of a slot: factors have the parameter's axes, but not its sizes."""
    return tuple(dataclasses.replace(part, shape=None) for part in parts) if key in FACTORS else parts


def _exchanged(entries: Entries, parts: Parts) -> Entries:
    """The factors by each other's name, where the last two axes have changed places."""
    first, *_ = parts
    axes = first.axes or ()
    if axes[-2:] != (len(axes) - 1, len(axes) - 2) or not set(FACTORS) <= entries.keys():
        return entries
    rows, columns = FACTORS
    return {**entries, rows: entries[columns], columns: entries[rows]}


def _fitting(label: str, key: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ValueError as error:
        raise ValueError(f"{key!r} of {label} {error}") from None


def _same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other)) if is_array(one) or is_array(other) else one == other


# --- Muon -----------------------------------------------------------------------------------------------------------


def _matrix_axes(group: Mapping[str, Any], parts: Parts | None, label: str) -> Any:
    """Where Muon finds in our array the matrix that it finds in PyTorch's; ``None`` for other algorithms."""
    if "adjust_lr_fn" not in group or parts is None:
        return None
    first, *others = parts
    if others:
        raise ValueError(f"Muon works on {label} as one matrix, which is several parameters here, {OTHER_RUN}")
    try:
        return first.matrix_axes()
    except ValueError as error:
        raise ValueError(f"Muon: {label} {error}") from None


def _check_matrix_axes(
    group: Mapping[str, Any], members: Sequence[Member], origin: Mapping[str, tuple[str, int, Parts]]
) -> None:
    """Muon's matrices must be PyTorch's, or the run was another one."""
    if "adjust_lr_fn" not in group:
        return
    for name, entries, given in members:
        parts = origin[name][2] if name is not None and name in origin else None
        expected = _matrix_axes(group, parts, _label(name)) or ((-2,), (-1,))
        ndim = len(_shape_of(entries))
        axes = tuple(tuple(axis % ndim - ndim for axis in part) for part in given or ((0,), (1,))) if ndim else expected
        if axes != expected:
            raise ValueError(f"{_label(name)} has matrix_axes={given}, PyTorch's matrix is {expected} of it")
