"""State dicts of optimizers: PyTorch's names, axes and order into ours, and back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimjax._core.containers import plain
from optimjax._core.definition import package
from optimjax._core.reading import reading
from optimjax._facade.state_dict import as_dict
from optimjax.interop._torch_arrays import as_array, as_tensors, is_array
from optimjax.interop._torch_entries import join_entries, label, matrix_axes, shape_of, split_entries
from optimjax.interop._torch_layout import LayoutLike, Parts, parts_of
from optimjax.interop._torch_vectors import Entries, Member, is_joint, joint_to_ours, joint_to_torch

__all__ = ["from_torch", "is_state", "to_torch"]

Layouts = Mapping[str, LayoutLike] | None
SPLIT = "torch_group"  # the key that says which of PyTorch's groups a group is a part of
OURS = (
    "params",
    "param_names",
    "algorithm",
    "matrix_axes",
    SPLIT,
)  # what a group of PyTorch gets otherwise, or does not have


def from_torch(
    state_dict: Mapping[Any, Any],
    *,
    layout: Layouts = None,
    names: Sequence[str] | Mapping[Any, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The state dict of an optimizer of PyTorch as ours, which ``load_state_dict`` takes.

    Slots that have the parameter's shape get its axes, and are split where the parameter is. Those of Adafactor that
    are kept along rows and columns are exchanged where rows and columns are, and the vectors of LBFGS are put together
    from the parameters in their own axes. A group of Muon gets the ``matrix_axes`` that the layouts say; if they differ
    within it, it becomes several groups, which :func:`to_torch` makes one again.

    Args:
      state_dict: what ``torch.optim.Optimizer.state_dict()`` returned, with tensors or with arrays. For an optimizer
        here that has several algorithms, a dict of those of PyTorch's optimizers by the name of the class, such as
        ``{"Muon": ..., "AdamW": ...}``.
      layout: by PyTorch's name of a parameter, what it is here: what :func:`load_weights` returned, or a
        :class:`Layout`, a tuple of axes, or ``None`` for an array that stays as it is. What is not in it stays as it
        is, too, unless it would fit with its axes exchanged.
      names: PyTorch's names of all parameters in the order of ``state_dict``, if it has none:
        ``[name for name, _ in torch_model.named_parameters()]``, where the optimizer was made of
        ``torch_model.parameters()``. An optimizer made of ``named_parameters()`` saves them. Of several optimizers, a
        dict of such lists.

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
    if _are_several(state_dict):
        if not isinstance(names, Mapping | None):
            raise ValueError(f"of several state dicts, names is a dict with the same keys, got {names!r}")
        return _as_one(
            {key: from_torch(one, layout=layout, names=(names or {}).get(key)) for key, one in state_dict.items()}
        )
    if isinstance(names, Mapping):
        raise ValueError(f"names is a dict only for a dict of state dicts, got {names!r}")
    saved = _Saved(state_dict, layout, names)
    made = _Made(saved.others)
    for index, group in enumerate(saved.groups):
        members = [(name, _parts(layout, name), entries) for name, entries in saved.members(group)]
        if any(map(is_joint, (entries for _, _, entries in members))):
            made.add(group, joint_to_ours(members))
            continue
        by_axes: dict[Any, list[Member]] = {}
        for name, parts, entries in members:
            axes = matrix_axes(group, parts, name)
            by_axes.setdefault(axes, []).extend(split_entries(name, parts, entries))
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
) -> dict[Any, Any]:
    """Our state dict as one that PyTorch's ``load_state_dict`` takes: the way back of :func:`from_torch`.

    PyTorch goes by the order of the parameters, not by their names. Within each group it is that of ``names``. If the
    groups have several algorithms, the result is a dict of state dicts by the name of the class, ``None`` for groups
    without ``algorithm``.

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
    if several := _apart(state_dict):
        return {
            algorithm: to_torch(one, layout=layout, names=names, tensors=tensors) for algorithm, one in several.items()
        }
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
            made.add(group, [join_entries(name, parts, entries) for name, parts, entries in ordered])
    packed = made.state_dict()
    return as_tensors(packed) if tensors else packed


# --- Several optimizers in one --------------------------------------------------------------------------------------


def is_state(value: Any) -> bool:
    """Whether this is the state dict of an optimizer."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _are_several(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and not is_state(value) and all(map(is_state, value.values()))


def _as_one(states: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """One state dict of ours, whose groups name their algorithm."""
    known = [None, *(definition.name for definition in package)]
    if strange := [algorithm for algorithm in states if algorithm not in known]:
        raise ValueError(f"a dict of state dicts has the names of their optimizers' classes as keys, got {strange}")
    made = _Made({key: value for one in states.values() for key, value in one["state"].items() if type(key) is not int})
    for algorithm, one in states.items():
        named = {} if algorithm is None else {"algorithm": algorithm}
        for group in one["param_groups"]:
            names = group.get("param_names") or [None] * len(group["params"])
            entries = [one["state"].get(number, {}) for number in group["params"]]
            made.add({**group, **named}, list(map(Member, names, entries)))
    return made.state_dict()


def _apart(state_dict: Any) -> dict[Any, dict[str, Any]]:
    """The state dicts that were made one, by algorithm; none if there is one algorithm."""
    groups = state_dict["param_groups"] if is_state(state_dict) else ()
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        return {}
    of: dict[Any, list[dict[str, Any]]] = {}
    for group in groups:
        of.setdefault(group.get("algorithm"), []).append({**group, "algorithm": None})
    if len(of) < 2:
        return {}
    numbers = {name: {str(each) for group in part for each in group["params"]} for name, part in of.items()}
    return {
        name: {
            "state": {key: value for key, value in state_dict["state"].items() if str(key) in numbers[name]},
            "param_groups": part,
        }
        for name, part in of.items()
    }


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


def _check_matrix_axes(
    group: Mapping[str, Any], members: Sequence[Member], origin: Mapping[str, tuple[str, int, Parts]]
) -> None:
    """Muon's matrices must be PyTorch's, or the run was another one."""
    if "adjust_lr_fn" not in group:
        return
    for name, entries, given in members:
        parts = origin[name][2] if name is not None and name in origin else None
        expected = matrix_axes(group, parts, name) or ((-2,), (-1,))
        ndim = len(shape_of(entries))
        axes = tuple(tuple(axis % ndim - ndim for axis in part) for part in given or ((0,), (1,))) if ndim else expected
        if axes != expected:
            raise ValueError(f"{label(name)} has matrix_axes={given}, PyTorch's matrix is {expected} of it")
