"""The state of LBFGS, which keeps one vector for all parameters: in our axes and order, and in PyTorch's."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimjax.interop._torch_layout import Parts, join, split, torch_shape_of

__all__ = ["Entries", "Member", "is_joint", "joint_to_ours", "joint_to_torch"]

Entries = dict[str, Any]
VECTORS = ("d", "prev_flat_grad")
HISTORIES = ("old_dirs", "old_stps")  # lists of vectors
SCRATCH = "al"  # which PyTorch overwrites in each call


class Member(NamedTuple):
    """A parameter in a group, with its state, and for Muon where its matrices are."""

    name: str | None
    entries: Entries
    matrix_axes: Any = None


def is_joint(entries: Entries) -> bool:
    """Whether these are the entries of LBFGS, which the first parameter has for all."""
    return "func_evals" in entries


def joint_to_ours(members: Sequence[tuple[str | None, Parts | None, Entries]]) -> list[Member]:
    """Our parameters, of which the first has the entries.

    Raises:
      ValueError: the layout does not say the shape of a parameter, or the vectors are of another length.
    """
    known = [(name, _known(name, parts)) for name, parts, _ in members]
    shapes = [_torch_shape(name, parts) for name, parts in known]

    def ours(vector: Any) -> Any:
        pieces = _pieces(vector, shapes)
        return _flat(array for piece, (_, parts) in zip(pieces, known, strict=True) for array in split(parts, piece))

    names = [part.name or name for name, parts in known for part in parts]
    return _members(names, next(entries for _, _, entries in members if entries), ours)


def joint_to_torch(members: Sequence[Member], ordered: Sequence[tuple[str | None, Parts | None, Any]]) -> list[Member]:
    """PyTorch's parameters, of which the first has the entries.

    Args:
      members: ours, in our order.
      ordered: PyTorch's with their layouts, in PyTorch's order.

    Raises:
      ValueError: as :func:`joint_to_ours`.
    """
    known = [(name, _known(name, parts)) for name, parts, _ in ordered]
    for name, parts in known:
        _torch_shape(name, parts)  # says what is missing
    shape_of = {part.name or name: part.our_shape or () for name, parts in known for part in parts}
    shapes = [shape_of[member.name] for member in members]

    def theirs(vector: Any) -> Any:
        array_of = dict(zip((member.name for member in members), _pieces(vector, shapes), strict=True))
        return _flat(join(parts, [array_of[part.name or name] for part in parts]) for name, parts in known)

    entries = next(member.entries for member in members if member.entries)
    return _members([name for name, _ in known], entries, theirs)


def _members(names: Sequence[str | None], entries: Entries, convert: Callable[[Any], Any]) -> list[Member]:
    made = {key: value for key, value in entries.items() if key != SCRATCH}
    made |= {key: convert(made[key]) for key in VECTORS if key in made}
    made |= {key: list(map(convert, made[key])) for key in HISTORIES if key in made}
    return [Member(name, {} if place else made) for place, name in enumerate(names)]


def _known(name: str | None, parts: Parts | None) -> Parts:
    if name is None or parts is None:
        raise ValueError(
            f"LBFGS keeps one vector for all parameters, so the layout must name each of them, and does not name "
            f"{'one' if name is None else repr(name)}"
        )
    return parts


def _torch_shape(name: str | None, parts: Parts) -> tuple[int, ...]:
    shape = torch_shape_of(parts)
    if shape is None:
        raise ValueError(
            f"LBFGS keeps one vector for all parameters, and the layout does not say the shape of {name!r}: give a "
            "Layout with shape=, or one that was derived from a module"
        )
    return shape


def _pieces(vector: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    sizes = list(map(math.prod, shapes))
    if np.shape(vector) != (sum(sizes),):
        raise ValueError(f"a vector of LBFGS has shape {np.shape(vector)}, its parameters have {sum(sizes)} elements")
    ends = np.cumsum(sizes)
    parts = [vector[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(arrays: Iterator[Any]) -> Any:
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])
