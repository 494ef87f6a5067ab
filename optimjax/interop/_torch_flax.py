"""The layouts of the layers of ``flax.nnx``: under which name, and with which axes, PyTorch keeps their arrays."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from optimjax._core.foreign import nnx
from optimjax.interop._torch_layout import Layout, LayoutLike, Parts, ambiguous, parts_of, torch_shape_of

__all__ = ["Rename", "flax_layout", "variables"]

Rename = Mapping[str, str] | Callable[[str], str] | None
Found = dict[str, Parts | str]  # by PyTorch's name within a layer; text says why there is no counterpart


def flax_layout(
    model: Any,
    names: Mapping[str, Any] | Iterable[str],
    *,
    rename: Rename = None,
    layout: Mapping[str, LayoutLike] | None = None,
) -> dict[str, Parts]:
    """For each of PyTorch's names, what it is in a ``flax.nnx`` module, by the types of the module's layers.

    Both models must have the same structure: ``encoder.fc.weight`` is the kernel of the layer ``encoder.fc``. What the
    index of an ``nnx.Sequential`` or ``nnx.List`` is, is that of a ``torch.nn.Sequential`` or ``ModuleList``.

    ===============================================  ================================================================
    ``flax.nnx``                                     ``torch.nn``
    ===============================================  ================================================================
    ``Linear``, ``LinearGeneral``                    ``Linear``
    ``Conv``, ``ConvTranspose``                      ``Conv1d`` to ``3d``, ``ConvTranspose1d`` to ``3d``
    ``Embed``                                        ``Embedding``
    ``BatchNorm``, with its statistics               ``BatchNorm1d`` to ``3d``
    ``LayerNorm``, ``RMSNorm``, ``GroupNorm``,       the same
    ``InstanceNorm``, ``PReLU``
    ``MultiHeadAttention``                           ``MultiheadAttention``, with its fused ``in_proj``; or ``Linear``
                                                     layers ``query``, ``key``, ``value`` and ``out``
    ``LSTMCell``, ``OptimizedLSTMCell``,             ``LSTMCell``, ``GRUCell``, ``RNNCell``
    ``GRUCell``, ``SimpleCell``
    ``RNN`` and ``Bidirectional`` of these           ``LSTM``, ``GRU``, ``RNN`` of one layer; ``rename={"rnn.l1":
                                                     "second.l0"}`` says where a further layer is
    ===============================================  ================================================================

    PyTorch's cells have two biases, those of Flax one, and two biases train differently from one. Give the cell its
    second one when you make it: ``cell.dense_i = nnx.Linear(inputs, 4 * hidden, rngs=rngs)`` in an
    ``OptimizedLSTMCell``, ``cell.dense_h = nnx.Linear(hidden, 3 * hidden, rngs=rngs)`` in a ``GRUCell``.

    Parameters that are in no such layer keep their name and their axes, if no two axes have the same size; else
    ``layout`` must say what they are.

    Args:
      model: the ``flax.nnx`` module.
      names: PyTorch's names; best ``model.state_dict()``, whose shapes are checked.
      rename: where the structures differ: PyTorch's names, or the beginning of them, and what takes their place, as in
        ``{"encoder.layers": "blocks"}`` or, of a model that was wrapped, ``{"module": ""}``; or a function of a name.
      layout: what the types of layers do not say, by PyTorch's name: a :class:`Layout`, or a tuple of axes; ``()`` for
        an array that the module does not have.

    Returns:
      For each name, in the same order, a tuple of layouts: of one, of several where PyTorch's array falls along its
      first axis into several of ours, of none where the module has no such array (``num_batches_tracked``).

    Raises:
      ValueError: a name or a shape has no counterpart, or two names have the same; the message names them.
      TypeError: ``model`` is not a ``flax.nnx`` module.

    >>> from flax import nnx
    >>> from optimjax.interop.torch import flax_layout
    >>> model = nnx.Dict(fc=nnx.Linear(32, 10, rngs=nnx.Rngs(0)))
    >>> flax_layout(model, ["fc.weight", "fc.bias"])["fc.weight"]
    (Layout(name='fc.kernel', axes=(1, 0), shape=(10, 32), flip=()),)
    """
    if nnx() is None or not isinstance(model, nnx().Pytree):
        raise TypeError(f"a layout is derived from a flax.nnx module, got {type(model).__name__}")
    shapes = (
        {name: getattr(value, "shape", None) for name, value in names.items()} if isinstance(names, Mapping) else {}
    )
    known, own = _expected(model), {name: variable.get_value() for name, variable in variables(model).items()}
    found: dict[str, Parts] = {}
    for name in names:
        if layout is not None and name in layout:
            found[name] = parts_of(layout[name], name)
            continue
        parts = _counterpart(name, _renamed(name, rename), known, own, shapes.get(name))
        expected, shape = torch_shape_of(parts), shapes.get(name)
        if shape is not None and expected is not None and tuple(shape) != expected:
            ours = ", ".join(f"{part.name!r} of shape {part.our_shape}" for part in parts)
            raise ValueError(f"{name!r} has shape {tuple(shape)}, but {ours} asks for {expected}")
        found[name] = parts
    if layout is not None and (strange := [name for name in layout if name not in found]):
        raise ValueError(f"layout has {strange}, which are not among PyTorch's names")
    _check_distinct(found)
    return found


def variables(model: Any) -> dict[str, Any]:
    """The parameters and statistics of a module by dotted name."""
    kinds = nnx().Param, nnx().BatchStat
    flat = nnx().to_flat_state(nnx().state(model, lambda path, variable: isinstance(variable, kinds)))
    return {".".join(map(str, path)): variable for path, variable in flat}


def _check_distinct(found: Mapping[str, Parts]) -> None:
    owner: dict[str, str] = {}
    for name, parts in found.items():
        for part in parts:
            ours = part.name or name
            if ours in owner:
                raise ValueError(f"{owner[ours]!r} and {name!r} of PyTorch are both {ours!r}: leave one out")
            owner[ours] = name


def _counterpart(name: str, renamed: str, known: Found, own: Mapping[str, Any], shape: Any) -> Parts:
    parts = known.get(renamed)
    if isinstance(parts, str):
        raise ValueError(f"{name!r} has no counterpart: {parts}")
    if parts is not None:
        return parts
    if renamed not in own:
        near = [other for other in known if other.rpartition(".")[2] == renamed.rpartition(".")[2]]
        raise ValueError(
            f"{name!r} of PyTorch has no counterpart in the module"
            + (f", which has {', '.join(near[:4])}" * bool(near))
            + ": rename says where it is, layout={...: ()} leaves it out"
        )
    ours = tuple(own[renamed].shape)
    if shape is not None and tuple(shape) != ours:
        raise ValueError(f"{name!r} has shape {tuple(shape)}, ours {ours}: name it in layout, with its axes")
    if ambiguous(ours):
        raise ValueError(
            f"{name!r} of shape {ours} is in no layer of flax.nnx, and would fit with its axes exchanged, too: name it "
            f"in layout, as it is: {{{name!r}: {tuple(range(len(ours)))}}}"
        )
    return (Layout(renamed, None, ours),)


_GATE = re.compile(r"(?:(.*)\.)?((?:weight|bias)_(?:ih|hh))_(l\d+(?:_reverse)?)")


def _renamed(name: str, rename: Rename) -> str:
    """PyTorch's name as the module's structure has it; of ``rnn.weight_ih_l0`` the cell is ``rnn.l0``."""
    if gate := _GATE.fullmatch(name):
        name = ".".join(filter(None, (gate[1], gate[3], gate[2])))
    if callable(rename):
        return rename(name)
    fits = [key for key in rename or () if name == key or name.startswith(f"{key}.")]
    longest = max(fits, key=len, default=None)
    if longest is None or rename is None:
        return name
    return (rename[longest] + name.removeprefix(longest)).removeprefix(".")


def _expected(model: Any) -> Found:
    """All names that PyTorch's twin of a module may have."""
    nodes = {path: node for path, node in nnx().iter_graph(model) if isinstance(node, nnx().Pytree)}
    expected: Found = {}
    for path, node in nodes.items():
        ours = ".".join(map(str, path))
        for name, parts in _of_layer(node).items():
            if not isinstance(parts, str):
                parts = tuple(
                    Layout(".".join(filter(None, (ours, part.name))), part.axes, part.shape, part.flip)
                    for part in parts
                )
            for place in _places(path, nodes):
                expected[".".join(filter(None, (place, name)))] = parts
    return expected


def _places(path: tuple[Any, ...], nodes: Mapping[tuple[Any, ...], Any]) -> Iterator[str]:
    """Where PyTorch's twin may have the layer that is here."""
    yield ".".join(map(str, path))
    parents = [nodes.get(path[:end]) for end in range(len(path))]
    in_sequence = [isinstance(parent, nnx().Sequential) for parent in parents]
    short = [str(key) for key, skip in zip(path, in_sequence, strict=True) if not (skip and key == "layers")]
    yield ".".join(short)
    if path[-1:] == ("cell",) and isinstance(parents[-1], nnx().RNN):
        yield ".".join([*short[:-1], "l0"])
        if len(parents) > 1 and isinstance(parents[-2], nnx().Bidirectional):
            yield ".".join([*short[:-2], "l0" if path[-2] == "forward_rnn" else "l0_reverse"])


# --- The layers -----------------------------------------------------------------------------------------------------


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.get_value().shape)


def _held(layer: Any, **names: str) -> Found:
    """Arrays that are the same in both, by PyTorch's name; those that the layer has."""
    there = {theirs: ours for theirs, ours in names.items() if getattr(layer, ours, None) is not None}
    return {theirs: (Layout(ours, None, _shape(getattr(layer, ours))),) for theirs, ours in there.items()}


def _linear(layer: Any) -> Found:
    inputs, outputs = _shape(layer.kernel)
    return {"weight": (Layout("kernel", (1, 0), (outputs, inputs)),)} | _held(layer, bias="bias")


def _linear_general(layer: Any) -> Found:
    """A matrix in PyTorch, whose rows and columns may be several axes here."""
    inputs, outputs = tuple(layer.in_features), tuple(layer.out_features)
    if layer.batch_axis:
        return {}
    places = range(len(inputs) + len(outputs))
    found: Found = {
        "weight": (Layout("kernel", (*places[len(outputs) :], *places[: len(outputs)]), (outputs, inputs)),)
    }
    if layer.bias is not None:
        found["bias"] = (Layout("bias", None, (outputs,)),)
    return found


def _conv(layer: Any) -> Found:
    *window, inputs, outputs = _shape(layer.kernel)
    axes = (*range(2, 2 + len(window)), 1, 0)
    return {"weight": (Layout("kernel", axes, (outputs, inputs, *window)),)} | _held(layer, bias="bias")


def _conv_transpose(layer: Any) -> Found:
    """PyTorch turns the window around, which Flax does only with ``transpose_kernel``."""
    *window, first, second = _shape(layer.kernel)
    spatial = tuple(range(len(window)))
    behind = tuple(axis + 2 for axis in spatial)
    if layer.transpose_kernel:
        weight = Layout("kernel", (*behind, 1, 0), (second, first, *window))
    else:
        weight = Layout("kernel", (*behind, 0, 1), (first, second, *window), flip=spatial)
    return {"weight": (weight,)} | _held(layer, bias="bias")


def _embed(layer: Any) -> Found:
    return _held(layer, weight="embedding")


def _norm(layer: Any) -> Found:
    return _held(layer, weight="scale", bias="bias")


def _batch_norm(layer: Any) -> Found:
    return _norm(layer) | _held(layer, running_mean="mean", running_var="var") | {"num_batches_tracked": ()}


def _prelu(layer: Any) -> Found:
    return {"weight": (Layout("negative_slope", None, ((),)),)}


def _attention(layer: Any) -> Found:
    """The fused in-projection of PyTorch is query, key and value, one under the other."""
    found: Found = {}
    inside = {name: _linear_general(getattr(layer, name)) for name in ("query", "key", "value", "out")}
    for kind, ours in (("weight", "kernel"), ("bias", "bias")):
        if kind not in inside["out"]:
            continue
        parts = {name: Layout(f"{name}.{ours}", *_rest(found_of[kind])) for name, found_of in inside.items()}
        found[f"out_proj.{kind}"] = (parts.pop("out"),)
        if len({part.torch_shape for part in parts.values()}) == 1:
            found[f"in_proj_{kind}"] = tuple(parts.values())
        if kind == "weight":
            found |= {f"{name[0]}_proj_weight": (part,) for name, part in parts.items()}
    return found


def _rest(parts: Parts | str) -> tuple[Any, Any]:
    (part,) = parts
    assert isinstance(part, Layout)
    return part.axes, part.shape


_BIAS = (
    "PyTorch trains two biases where this cell has one, and the run would not be the same; give the cell its second "
    "one when you make it: cell.{name} = nnx.Linear(..., rngs=rngs)"
)
_SIDES = {"ih": "i", "hh": "h"}


def _cell(layer: Any) -> Found:
    """Gates side by side, in PyTorch's order."""
    found: Found = {}
    for theirs, side in _SIDES.items():
        name = f"dense_{side}"
        linear = _linear(getattr(layer, name))
        found[f"weight_{theirs}"] = (Layout(f"{name}.kernel", *_rest(linear["weight"])),)
        bias = linear.get("bias")
        found[f"bias_{theirs}"] = _BIAS.format(name=name) if bias is None else (Layout(f"{name}.bias", *_rest(bias)),)
    return found


def _lstm_cell(layer: Any) -> Found:
    """One layer for each gate; ``if`` is a word of Python."""
    found: Found = {}
    for theirs, side in _SIDES.items():
        gates = [f"{side}{gate}" + "_" * (side + gate == "if") for gate in "ifgo"]
        linears = [_linear(getattr(layer, gate)) for gate in gates]
        for kind, ours in (("weight", "kernel"), ("bias", "bias")):
            found[f"{kind}_{theirs}"] = (
                tuple(
                    Layout(f"{gate}.{ours}", *_rest(linear[kind])) for gate, linear in zip(gates, linears, strict=True)
                )
                if all(kind in linear for linear in linears)
                else _BIAS.format(name=" and ".join(gates))
            )
    return found


_LAYERS: dict[str, Callable[[Any], Found]] = {
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": _embed,
    "BatchNorm": _batch_norm,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "GroupNorm": _norm,
    "InstanceNorm": _norm,
    "PReLU": _prelu,
    "MultiHeadAttention": _attention,
    "OptimizedLSTMCell": _cell,
    "GRUCell": _cell,
    "SimpleCell": _cell,
    "LSTMCell": _lstm_cell,
}


def _of_layer(layer: Any) -> Found:
    """What the twin of a layer has, if its type is known; a stacked one, whose arrays have more axes, has no twin."""
    for name, found in _LAYERS.items():
        if isinstance(layer, getattr(nnx(), name, ())):  # an older Flax may lack one
            return {} if _stacked(layer) else found(layer)
    return {}


def _stacked(layer: Any) -> bool:
    kernel = getattr(layer, "kernel", None)
    if not isinstance(kernel, nnx().Variable):
        return False
    if isinstance(layer, nnx().Linear):
        own = 2
    elif isinstance(layer, nnx().LinearGeneral):
        own = len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    else:
        own = len(layer.kernel_shape)
    return len(_shape(kernel)) != own
