"""``python -m optimjax convert``: a checkpoint of PyTorch as one of ours, and back."""

import argparse
import dataclasses
import fnmatch
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimjax._facade import files
from optimjax.interop._torch_arrays import as_array, is_array
from optimjax.interop._torch_file import load, save
from optimjax.interop._torch_flax import flax_layout
from optimjax.interop._torch_layout import Layout, Parts, ambiguous, parts_of, split
from optimjax.interop._torch_state import from_torch, is_state, to_torch
from optimjax.interop._torch_weights import weights

__all__ = ["add_arguments", "run"]

Layouts = dict[str, Parts]
OURS = ".safetensors"
THEIRS = (".pt", ".pth", ".bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("source", metavar="IN", type=Path, help="a .pt file, or .safetensors of weights or of ours")
    parser.add_argument("target", metavar="OUT", type=Path, help=f"{OURS} for ours, {', '.join(THEIRS)} for PyTorch's")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns the flax.nnx module; its layers say names and axes",
    )
    parser.add_argument("--layout", type=Path, help="a JSON file with the layout of each parameter, by PyTorch's name")
    parser.add_argument("--layout-out", type=Path, help="where to write the layout that was used, for the way back")
    parser.add_argument("--transpose", metavar="GLOB", action="append", default=[], help="matrices to transpose")
    parser.add_argument("--keep", metavar="GLOB", action="append", default=[], help="arrays that stay as they are")
    parser.add_argument(
        "--names", type=Path, help="a file with PyTorch's names, one a line, in the order of the optimizer's parameters"
    )


def run(options: argparse.Namespace) -> None:
    """Convert one file, and print what became of each parameter.

    Raises:
      ValueError, TypeError: something does not fit; nothing was written then.
      OSError: a file cannot be read or written.
      ImportError: the module of ``--model`` cannot be imported.
    """
    back = _suffix(options.target) in THEIRS
    if not back and _suffix(options.target) != OURS:
        raise ValueError(f"{str(options.target)!r} must end in {OURS}, or for PyTorch in {', '.join(THEIRS)}")
    content = _content(options.source, back)
    names = options.names and [line.strip() for line in options.names.read_text().splitlines() if line.strip()]
    layout = _layout(options, content, names, back)
    converted = _converted(content, layout, names, back)
    if options.layout_out:
        options.layout_out.write_text(json.dumps({name: _as_json(parts) for name, parts in layout.items()}, indent=1))
    (save if back else files.save)(options.target, converted)
    print("\n".join([*_mapped(content, layout, back), *_summary(converted, ""), f"wrote {options.target}"]))


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _content(path: Path, back: bool) -> Any:
    if not back:
        return load(path)
    if _suffix(path) != OURS:
        raise ValueError(f"{str(path)!r} must end in {OURS}: what optim.save has written is converted to PyTorch's")
    return files.load(path)


# --- What is in a checkpoint ------------------------------------------------------------------------------------------


def _is_weights(value: Any) -> bool:
    """A dict of arrays by name, as ``state_dict()`` of a model is."""
    return isinstance(value, Mapping) and bool(value) and all(map(is_array, value.values()))


def _parts(value: Any) -> Iterator[tuple[Any, bool]]:
    """The optimizers' states and the weights in nested dicts; for each whether it is weights."""
    if is_state(value) or _is_weights(value):
        yield value, not is_state(value)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _parts(entry)


def _names(content: Any) -> list[str]:
    """All names of parameters and weights, each once."""
    found: dict[str, None] = {}
    for part, is_weights in _parts(content):
        groups = [part] if is_weights else [group.get("param_names") or () for group in part["param_groups"]]
        found |= {str(name): None for names in groups for name in names}
    return list(found)


# --- The layout -------------------------------------------------------------------------------------------------------


def _layout(options: argparse.Namespace, content: Any, names: Sequence[str] | None, back: bool) -> Layouts:
    given = {} if options.layout is None else _read_layout(options.layout)
    here = [] if back and (given or names) else _names(content)  # of ours only where they are PyTorch's, too
    known: list[str] = list(dict.fromkeys([*(names or ()), *here, *given]))
    for globs, layout in ((options.transpose, Layout(axes=(1, 0))), (options.keep, Layout())):
        for glob in globs:
            if not (matches := fnmatch.filter(known, glob)):
                raise ValueError(f"{glob!r} matches none of the names {known}")
            given |= dict.fromkeys(matches, (layout,))
    if options.model is None:
        return given
    if back:
        raise ValueError("--model does not know PyTorch's names: give --layout, which --layout-out has written")
    arrays = {name: array for part, is_weights in _parts(content) if is_weights for name, array in part.items()}
    return flax_layout(_model(options.model), arrays or known, layout=given)


def _read_layout(path: Path) -> Layouts:
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{str(path)!r} has no object from names to layouts, but {given!r}")
    return {name: parts_of(value, name) for name, value in given.items()}


def _as_json(parts: Parts) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in dataclasses.asdict(part).items() if value is not None and value != ()}
        for part in parts
    ]


def _model(place: str) -> Any:
    module, colon, function = place.partition(":")
    if not colon:
        raise ValueError(f"--model must be MODULE:FUNCTION, got {place!r}")
    made = getattr(importlib.import_module(module), function, None)
    if not callable(made):
        raise ValueError(f"{module} has no function {function!r}")
    return made()


# --- Converting -------------------------------------------------------------------------------------------------------


def _converted(value: Any, layout: Layouts, names: Sequence[str] | None, back: bool) -> Any:
    if is_state(value):
        if back:
            return to_torch(value, layout=layout or None, names=names, tensors=False)
        return from_torch(value, layout=layout or None, names=names)
    if _is_weights(value):
        return _weights_back(value, layout) if back else _weights(value, layout)
    if isinstance(value, Mapping):
        return {key: _converted(entry, layout, names, back) for key, entry in value.items()}
    return value


def _weights(value: Mapping[str, Any], layout: Layouts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, array in value.items():
        parts = layout.get(name)
        if parts is None:
            _check_certain(name, array)
            parts = (Layout(),)
        try:
            arrays = split(parts, as_array(array))
        except ValueError as error:
            raise ValueError(f"{name!r} {error}") from None
        found |= {part.name or name: each for part, each in zip(parts, arrays, strict=True)}
    return found


def _weights_back(value: Mapping[str, Any], layout: Layouts) -> dict[str, Any]:
    ours = {part.name or name for name, parts in layout.items() for part in parts}
    there = {name: parts for name, parts in layout.items() if any((part.name or name) in value for part in parts)}
    rest = {name: array for name, array in value.items() if name not in ours}
    for name, array in rest.items():
        _check_certain(name, array)
    return weights(value, there) | rest


def _check_certain(name: str, array: Any) -> None:
    if ambiguous(np.shape(array)):
        raise ValueError(
            f"{name!r} of shape {tuple(np.shape(array))} would fit with its axes exchanged, too: name it in --layout, "
            "--transpose or --keep, or give the --model"
        )


# --- What is printed --------------------------------------------------------------------------------------------------


def _mapped(content: Any, layout: Layouts, back: bool) -> Iterator[str]:
    """A line for each parameter: PyTorch's name, and what it is here."""
    ours = {part.name or name for name, parts in layout.items() for part in parts}
    for name, parts in layout.items():
        yield f"{name} {'<-' if back else '->'} {', '.join(_described(name, part) for part in parts) or 'left out'}"
    for name in _names(content):
        if name not in (ours if back else layout):
            yield f"{name} stays as it is"


def _described(name: str, part: Layout) -> str:
    axes = f" (axes {', '.join(map(str, part.axes))})" if part.axes is not None else ""
    return (part.name or name) + axes


def _summary(value: Any, path: str) -> Iterator[str]:
    """A line for each optimizer and each set of weights."""
    label = path.removeprefix(".") or "the file"
    if is_state(value):
        groups = value["param_groups"]
        count = sum(len(group["params"]) for group in groups)
        yield f"{label}: state of {count} parameters in {len(groups)} group{'s' * (len(groups) != 1)}"
    elif _is_weights(value):
        yield f"{label}: {len(value)} arrays"
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _summary(entry, f"{path}.{key}")
