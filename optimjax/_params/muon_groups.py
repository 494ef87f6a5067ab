"""Groups for Muon: which parameters of a model are the weight matrices of its layers, and along which axes."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from optimjax._core.foreign import is_nnx, is_variable, nnx
from optimjax._params.grouping import ParameterGroups, matcher, named_source, nothing_matches
from optimjax._params.parameter import Parameter
from optimjax._params.source import ModuleSource, Source
from optimjax._params.variable import VariableParameter

__all__ = ["muon_groups"]

Axes = tuple[tuple[int, ...], tuple[int, ...]]


def muon_groups(
    model: Any,
    *,
    exclude: Sequence[Any] = (),
    algorithm: Any = "Muon",
    matrices: Callable[[str, Any], Any] | None = None,
    blocks: Any = None,
    **options: Any,
) -> ParameterGroups:
    r"""Give the weight matrices of a model to Muon, and all else to the optimizer's own algorithm.

    The result is for the constructor of an optimizer::

        optimizer = optim.AdamW(optim.muon_groups(model, exclude=["head.*"], lr=0.02), lr=3e-4)

    In a ``flax.nnx`` model the type of the layer decides, never the number of axes alone, so the biases of stacked
    layers, of shape (layers, features), are not taken for matrices. There is one group for each ``matrix_axes``,
    and for each ``blocks`` of fused kernels:

    ===========================================  ==============================  =====================================
    layer                                        its matrix                      ``matrix_axes``
    ===========================================  ==============================  =====================================
    ``Linear``                                   (in, out)                       ``((-1,), (-2,))``
    ``LinearGeneral``                            (\*batch, \*in, \*out)          all of out, all of in
    ``MultiHeadAttention``: query, key, value    (in, heads, head)               ``((-2, -1), (-3,))``
    ``MultiHeadAttention``: out                  (heads, head, out)              ``((-1,), (-3, -2))``
    ``Einsum``                                   as ``einsum_str`` says          letters of the output that are not the
                                                                                 input's; letters that are summed over
    ``Conv``, grouped too                        (\*window, in, out)             ``((-1,), (..., -2))``, and ``blocks``
    ``ConvTranspose``                            (\*window, in, out)             ``((..., -1), (-2,))``
    the same, ``transpose_kernel=True``          (\*window, out, in)             ``((..., -2), (-1,))``
    ``LoRA``, ``LoRALinear``: each factor        (in, rank) and (rank, out)      ``((-1,), (-2,))``
    ``LSTMCell``, ``SimpleCell``: each kernel    (in, out)                       ``((-1,), (-2,))``
    ``OptimizedLSTMCell``: each kernel           (in, 4 gates of out)            the same, with ``blocks=4``
    ``GRUCell``: each kernel                     (in, 3 gates of out)            the same, with ``blocks=3``
    ===========================================  ==============================  =====================================

    Subclasses count as their base. All axes that are not named are a batch of matrices: the experts of an ``Einsum``,
    and the axes along which ``nnx.vmap`` or ``nnx.scan`` stacks layers. These axes are looked for in front first.

    Everything else forms the last group: embeddings, norms, biases, arrays without elements, the windows of depthwise
    convolutions, and parameters of layers of your own. A parameter that several layers hold is a matrix only if all of
    them ask for the same axes, so one that is tied to an embedding is not.

    The head and the routers of experts are ``Linear`` layers, too: name them in ``exclude``. A ``Linear`` does not say
    that it is several in one, as for query, key and value: name it in ``blocks``.

    Args:
      model: a ``flax.nnx`` module, or modules in lists and dicts; or a pytree (of Linen, Equinox or plain JAX), or
        ``(name, Parameter)`` pairs, for which ``matrices`` decides.
      exclude: which parameters are to be in the last group, too: globs, regular expressions or functions, as in
        :func:`optimjax.group_parameters`.
      algorithm: the class, or its name, of the matrices' algorithm; it has an option ``matrix_axes``, and ``blocks`` if
        there are fused kernels.
      matrices: a function ``(name, value) -> matrix_axes``, or ``None`` for what is not a matrix; see
        :class:`optimjax.Muon`. It is needed where there are no layers to ask. In a ``flax.nnx`` model it is asked
        first, for parameters of layers of your own; where it returns ``None``, the type of the layer decides.
      blocks: how the rows of fused kernels fall into matrices of their own, by glob, as in
        ``blocks={"*.qkv.kernel": 3}``, or one value for all matrices; see :class:`optimjax.Muon`. It goes before what
        the layers say.
      options: other options of ``algorithm``, the same for all matrices.

    Returns:
      Groups, as :func:`optimjax.group_parameters` returns them. A parameter that is frozen by ``requires_grad`` is in
      one of them and stays frozen.

    Raises:
      ValueError: an entry of ``exclude`` or ``blocks`` matches nothing, and the message names near misses; or
        an entry of ``blocks`` no matrix. There are no
        matrices. The sizes of a stacked kernel do not tell which axes are its layer's own. ``matrices`` returns
        something that is not a pair of tuples of axes.
      TypeError: ``matrices`` is missing, or not a function; an entry of ``exclude`` or an option of another kind.

    >>> from flax import nnx
    >>> import optimjax as optim
    >>> rngs = nnx.Rngs(0)
    >>> layers = {
    ...     "embed": nnx.Embed(16, 4, rngs=rngs),
    ...     "attention": nnx.MultiHeadAttention(2, 4, use_bias=False, rngs=rngs),
    ...     "mlp": nnx.Linear(4, 4, rngs=rngs),
    ...     "head": nnx.Linear(4, 16, use_bias=False, rngs=rngs),
    ... }
    >>> for group in optim.muon_groups(layers, exclude=["head.*"], lr=0.02):
    ...     print(group.get("matrix_axes"), [name for name, _ in group["params"]])
    ((-2, -1), (-3,)) ['attention.key.kernel', 'attention.query.kernel', 'attention.value.kernel']
    ((-1,), (-3, -2)) ['attention.out.kernel']
    ((-1,), (-2,)) ['mlp.kernel']
    None ['embed.embedding', 'head.kernel', 'mlp.bias']
    """
    source, named = named_source(model, "model")
    for key in ("params", "matrix_axes", "requires_grad"):
        if key in options:
            raise TypeError(f"muon_groups has no option {key!r}, got {options[key]!r}: {_INSTEAD[key]}")
    asked = _asked(source, matrices)
    excluded = set().union(*_matching("exclude", exclude, named))
    kept = [(name, parameter) for name, parameter in named if name not in excluded and parameter.size]
    found = {name: matrices_of for name, parameter in kept if (matrices_of := asked(name, parameter)) is not None}
    if not found:
        raise ValueError(_no_matrices(named, excluded, matrices))
    for name, value in _blocks_by_name(blocks, [(name, each) for name, each in kept if name in found]).items():
        found[name] = found[name]._replace(blocks=value)
    alike: dict[Matrices, list[tuple[str, Parameter]]] = {}
    for name, parameter in named:
        if name in found:
            alike.setdefault(found[name], []).append((name, parameter))
    groups = [{"algorithm": algorithm, **options, **each.options(), "params": alike[each]} for each in alike]
    if rest := [(name, parameter) for name, parameter in named if name not in found]:
        groups.append({"params": rest})
    return ParameterGroups(groups, source, [])


class Matrices(NamedTuple):
    """Where the matrices of a parameter are: the options of Muon."""

    axes: Axes
    blocks: int | tuple[int, ...] | None = None

    def options(self) -> dict[str, Any]:
        return {"matrix_axes": self.axes} | ({} if self.blocks is None else {"blocks": self.blocks})


_INSTEAD = {
    "params": "exclude says which parameters are not among the matrices",
    "matrix_axes": "the layers say it, or the function that is given as matrices",
    "requires_grad": "set that of the parameters",
}


def _matching(where: str, patterns: Any, named: list[tuple[str, Parameter]]) -> list[set[str]]:
    """For each pattern the names that it matches; each has to match one."""
    if isinstance(patterns, (str, re.Pattern)) or callable(patterns):
        raise TypeError(f"{where} must be a list, got {patterns!r}: write [{patterns!r}]")
    if not isinstance(patterns, (Sequence, Mapping)):
        raise TypeError(f"{where} must be a list of globs, regular expressions or functions, got {patterns!r}")
    found: list[set[str]] = []
    for index, pattern in enumerate(patterns):
        place = where if isinstance(patterns, Mapping) else f"{where}[{index}]"
        matches = matcher(pattern, place)
        found.append({name for name, parameter in named if matches(name, parameter.value)})
        if not found[-1]:
            raise ValueError(nothing_matches(place, pattern, matches, named))
    return found


def _blocks_by_name(given: Any, named: list[tuple[str, Parameter]]) -> dict[str, Any]:
    """Into which blocks the rows of matrices fall, for those of which the user says it."""
    if given is None:
        return {}
    by_glob = given if isinstance(given, Mapping) else {"*": given}
    values = {}
    for names, value in zip(_matching("blocks", by_glob, named), by_glob.values(), strict=True):
        values |= dict.fromkeys(sorted(names), tuple(value) if isinstance(value, list) else value)
    return values


def _no_matrices(named: list[tuple[str, Parameter]], excluded: set[str], matrices: Any) -> str:
    left = [name for name, _ in named if name not in excluded]
    if not left:
        return "exclude names all parameters, so there are no matrices"
    examples = ", ".join(left[:3])
    if matrices is not None:
        return f"there are no matrices: matrices(name, value) is None for all parameters, for example {examples}"
    return (
        f"there are no matrices: none of the parameters, for example {examples}, is a kernel in the table of "
        "help(optim.muon_groups). For layers of your own give list(optim.named_parameters(model)), and matrices="
    )


def _asked(source: Source, matrices: Any) -> Callable[[str, Any], Matrices | None]:
    """The function ``(name, parameter)`` that says where the matrices of a parameter are."""
    if isinstance(source, ModuleSource) and _modules(source.module):
        of_layers = _asked_of_layers(source.module)
        if matrices is None:
            return of_layers
        own = _asked_of_function(matrices)
        return lambda name, parameter: own(name, parameter) or of_layers(name, parameter)
    if matrices is None:
        raise TypeError(
            f"matrices must be a function (name, value) -> matrix_axes or None, got {matrices!r}: there are no layers "
            "of flax.nnx that would say which parameters are matrices"
        )
    return _asked_of_function(matrices)


def _asked_of_function(matrices: Any) -> Callable[[str, Any], Matrices | None]:
    """What a user's function asks for."""
    if not callable(matrices):
        raise TypeError(f"matrices must be a function (name, value) -> matrix_axes or None, got {matrices!r}")
    return lambda name, parameter: _checked(matrices(name, parameter.value), name, parameter.shape)


def _checked(axes: Any, name: str, shape: tuple[int, ...]) -> Matrices | None:
    """The axes that a user's function returns for a parameter, as tuples."""
    if axes is None:
        return None
    ndim = len(shape)

    def are_axes(part: Any) -> bool:
        return isinstance(part, (tuple, list)) and all(isinstance(axis, int) and -ndim <= axis < ndim for axis in part)

    if isinstance(axes, (tuple, list)) and len(axes) == 2 and all(map(are_axes, axes)):
        named = [axis % ndim for part in axes for axis in part]
        if len(set(named)) == len(named):
            return Matrices((tuple(axes[0]), tuple(axes[1])))
    raise ValueError(
        f"matrices(name, value) must return None or a pair of tuples of different axes, (rows, columns), got {axes!r} "
        f"for {name!r} of shape {shape}"
    )


class Kernel(NamedTuple):
    """The matrix of one layer, as it is where layers are not stacked.

    Attributes:
      shape: of its axes, ``None`` where the layer does not say.
      rows: the axes that are the output's.
      columns: the axes that are the input's.
      blocks: how many matrices the rows are of, where a layer keeps several in one array.
    """

    shape: tuple[int | None, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    blocks: int | None = None


def _linear(layer: Any) -> Mapping[str, Kernel]:
    return {"kernel": Kernel((layer.in_features, layer.out_features), (1,), (0,))}


def _linear_general(layer: Any) -> Mapping[str, Kernel]:
    shape = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    first, last = len(layer.batch_axis), len(shape) - len(layer.out_features)
    return {"kernel": Kernel(shape, tuple(range(last, len(shape))), tuple(range(first, last)))}


def _einsum(layer: Any) -> Mapping[str, Kernel]:
    operands, _, output = (layer.einsum_str or "").replace(" ", "").partition("->")
    inputs, _, letters = operands.partition(",")
    # An ellipsis hides which axes of the kernel the letters are; a letter that is there twice takes a diagonal.
    if "." in letters or len(set(letters)) < len(layer.kernel_shape):
        return {}
    rows = [axis for axis, letter in enumerate(letters) if letter in output and letter not in inputs]
    columns = [axis for axis, letter in enumerate(letters) if letter not in output]
    return {"kernel": Kernel(tuple(layer.kernel_shape), tuple(rows), tuple(columns))}


def _conv(layer: Any) -> Mapping[str, Kernel]:
    last, groups = len(layer.kernel_shape) - 1, layer.feature_group_count
    if groups == 1:
        return {"kernel": Kernel(tuple(layer.kernel_shape), (last,), tuple(range(last)))}
    if layer.kernel_shape[last] == groups:  # one row for each group, which is a vector
        return {}
    return {"kernel": Kernel(tuple(layer.kernel_shape), (last,), tuple(range(last)), groups)}


def _conv_transpose(layer: Any) -> Mapping[str, Kernel]:
    """The transpose of a convolution: one position of the input is spread over a window of the output."""
    window = tuple(range(len(layer.kernel_size)))
    inputs, output = (len(window) + position for position in ((1, 0) if layer.transpose_kernel else (0, 1)))
    return {"kernel": Kernel(tuple(layer.kernel_shape), (*window, output), (inputs,))}


def _lora(layer: Any) -> Mapping[str, Kernel]:
    return {
        "lora_a": Kernel((layer.in_features, None), (1,), (0,)),
        "lora_b": Kernel((None, layer.out_features), (1,), (0,)),
    }


_LAYERS = {
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "LoRA": _lora,
}
_GATES = {"OptimizedLSTMCell": 4, "GRUCell": 3}  # of which each ``Linear`` in the cell has a matrix


def _kernels(layer: Any) -> Mapping[str, Kernel]:
    """The attributes of a layer that are matrices; without rows or columns it is a vector for each element."""
    for name, kernels in _LAYERS.items():
        if isinstance(layer, getattr(nnx(), name)):
            return {key: kernel for key, kernel in kernels(layer).items() if kernel.rows and kernel.columns}
    return {}


def _asked_of_layers(tree: Any) -> Callable[[str, Any], Matrices | None]:
    """What the layers in a tree of modules ask for."""
    claims = _claims(tree)

    def asked(name: str, parameter: VariableParameter) -> Matrices | None:
        kernels = claims.get(id(parameter.variable), {None})
        kernel = next(iter(kernels)) if len(kernels) == 1 else None
        axes = None if kernel is None else _placed(kernel, name, parameter.shape)
        return None if kernel is None or axes is None else Matrices(axes, kernel.blocks)

    return asked


def _claims(tree: Any) -> Mapping[int, set[Kernel | None]]:
    """What all that hold a variable say that it is, by its id; ``None`` says that it is not a matrix."""
    claims: dict[int, set[Kernel | None]] = defaultdict(set)
    nodes = [node for module in _modules(tree) for _, node in nnx().iter_graph(module)]
    gates = {
        id(layer): count
        for name, count in _GATES.items()
        for cell in nodes
        if isinstance(cell, getattr(nnx(), name))
        for layer in (cell.dense_i, cell.dense_h)
    }
    for node in nodes:
        kernels = _kernels(node)
        for key, variable in _held(node):
            kernel = kernels.get(key)
            claims[id(variable)].add(kernel and kernel._replace(blocks=gates.get(id(node), kernel.blocks)))
    return claims


def _modules(tree: Any) -> list[Any]:
    """The modules and containers of ``flax.nnx`` in a tree; variables that stand alone are in none."""
    leaves = jax.tree.leaves(tree, is_leaf=is_nnx)
    return [leaf for leaf in leaves if is_nnx(leaf) and not is_variable(leaf)]


def _held(node: Any) -> Iterator[tuple[Any, Any]]:
    """The variables that a module or a plain container holds itself, with their attribute or place."""
    items: Any = ()
    if isinstance(node, nnx().Pytree):
        items = vars(node).items()
    elif isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    return ((key, value) for key, value in items if is_variable(value))


def _placed(kernel: Kernel, name: str, shape: tuple[int, ...]) -> Axes | None:
    """The axes of the matrices in a kernel that may be stacked, counted from the end.

    Raises:
      ValueError: it has more axes than its layer says, and its sizes do not tell which are the layer's own.
    """
    own = len(kernel.shape)
    if len(shape) < own:
        return None

    def fits(places: tuple[int, ...]) -> bool:
        return all(size in (None, shape[place]) for size, place in zip(kernel.shape, places, strict=True))

    places = tuple(range(-own, 0))
    if len(shape) > own and not fits(places):  # stacked along an axis that is not in front, as MaxText does
        others = list(filter(fits, itertools.combinations(range(-len(shape), 0), own)))
        if len(others) != 1:
            raise ValueError(
                f"the kernel {name!r} has shape {shape}, in which its layer's own axes, {kernel.shape}, cannot be told "
                "from those along which layers are stacked: name it in exclude"
            )
        places = others[0]
    return tuple(places[axis] for axis in kernel.rows), tuple(places[axis] for axis in kernel.columns)
