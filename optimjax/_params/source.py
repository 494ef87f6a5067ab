"""What a user hands in as ``params``, and how it becomes parameters.

Three kinds of things can be handed in, each a *source*: a pytree (:class:`TreeSource`), a ``flax.nnx`` module
(:class:`ModuleSource`), parameters (:class:`ParameterSource`). A source lists its parameters, shows the user's view of
them (``optimizer.params``) and brings gradients of that view into the order of the parameters.
"""

import copy
import reprlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

import jax

from optimjax._core.foreign import OPAQUE, holds_nnx, is_nnx, is_torch_module, is_variable, nnx
from optimjax._core.sparse import is_sparse
from optimjax._core.tree import distinct_names, dotted, is_inexact_array, match, names, structure_error
from optimjax._params.parameter import Parameter, value_of
from optimjax._params.variable import VariableParameter, module_parameters, parameter_of

__all__ = [
    "ModuleSource",
    "ParameterSource",
    "Source",
    "TreeSource",
    "is_single",
    "named_parameters",
    "not_parameters",
    "parameters",
    "source_of",
]


def named_parameters(module: Any) -> Iterator[tuple[str, Parameter]]:
    """Iterate the parameters of a ``flax.nnx`` module, or of a pytree, as ``(dotted name, Parameter)``.

    Those of a module are bound to it, and are the *same* objects each time. Those of a pytree are the Parameters in it,
    or new ones with its arrays; leaves that are not floating-point arrays are left out. An optimizer gives its own.

    Raises:
      TypeError: a leaf that would be passed over although it is meant to be trained: an array alongside modules, a
        PyTorch tensor or module, a generator; an ``nnx.Param`` that holds a tree of arrays; something that is neither a
        module nor a tree.

    >>> from flax import nnx
    >>> import optimjax as optim
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> [(name, parameter.shape) for name, parameter in optim.named_parameters(layer)]
    [('bias', (3,)), ('kernel', (2, 3))]
    """
    if hasattr(module, "param_groups"):  # an optimizer
        for group in module.param_groups:
            names = group.get("param_names") or map(str, group["params"])
            yield from zip(names, group["params"], strict=True)
    elif holds_nnx(module):
        for path, leaf in _checked_leaves(module, lambda x: isinstance(x, Parameter) or is_nnx(x))[0]:
            if is_inexact_array(leaf) or isinstance(leaf, Parameter):
                kind = "an optim.Parameter" if isinstance(leaf, Parameter) else "an array"
                raise TypeError(
                    f"parameter {dotted(path)!r} is {kind} alongside flax.nnx modules, which are updated in place: "
                    "make it an nnx.Param"
                )
        yield from module_parameters(module)
    else:
        alone = module is None or jax.tree_util.all_leaves([module])
        if alone and not (is_inexact_array(module) or isinstance(module, Parameter)):
            raise TypeError(not_parameters("what is given", module))
        source = TreeSource(module)
        yield from zip(source.names or (), source.parameters, strict=True)


def not_parameters(what: str, x: Any) -> str:
    """The message for something that has no parameters, and can have none."""
    got = f"{what} must hold parameters, got {type(x).__name__}: {reprlib.repr(x)}"
    if is_torch_module(x):
        return (
            f"{got}. It is a PyTorch module, whose tensors cannot be trained here: write the model in flax.nnx, Linen, "
            "Equinox or plain JAX, see the page Coming from PyTorch"
        )
    return f"{got}; give a flax.nnx module or a pytree of floating-point arrays"


def parameters(module: Any) -> Iterator[Parameter]:
    """Iterate the parameters of a ``flax.nnx`` module, or of a pytree; see :func:`named_parameters`."""
    return (parameter for _, parameter in named_parameters(module))


class Source:
    """What was handed in as ``params``, whole or of one group.

    Attributes:
      parameters: its parameters, in order.
      names: their names, or ``None`` where the user gave none.
    """

    parameters: list[Parameter]
    names: Sequence[str] | None = None

    @property
    def bound(self) -> bool:
        """Whether the parameters belong to a module that the caller passes to the loss function explicitly."""
        return False

    def view(self) -> Any:
        """What ``optimizer.params`` shows."""
        raise NotImplementedError

    def with_parameters(self) -> Any:
        """The view with parameters in place of the arrays to be differentiated."""
        raise NotImplementedError

    def arranged(self, values: Mapping[Parameter, Any]) -> Any:
        """The view with these values for the parameters and ``None`` for all else; of a module its ``nnx.State``."""
        raise NotImplementedError

    def gradients(self, grads: Any) -> list[Any]:
        """Gradients of the view, in the order of ``parameters``; ``None`` where missing.

        Raises:
          ValueError: their structure is another one.
        """
        raise NotImplementedError


class TreeSource(Source):
    """A pytree: the optimizer has its own parameters; leaves that are not floating-point arrays pass through."""

    def __init__(self, tree: Any):
        paths, self._treedef = _checked_leaves(tree, lambda x: isinstance(x, Parameter))
        names = distinct_names([path for path, _ in paths])
        self._leaves = [
            Parameter(leaf, name=name) if is_inexact_array(leaf) else leaf
            for name, (_, leaf) in zip(names, paths, strict=True)
        ]
        named = [(name, leaf) for name, leaf in zip(names, self._leaves, strict=True) if isinstance(leaf, Parameter)]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]

    def __reduce__(self) -> Any:
        # Rebuild from the tree: treedefs may hold objects that do not pickle, such as the sentinels of Equinox.
        return TreeSource, (self.with_parameters(),)

    def view(self) -> Any:
        """The tree with the present values."""
        return self._treedef.unflatten([value_of(leaf) for leaf in self._leaves])

    def with_parameters(self) -> Any:
        """The tree with parameters as leaves."""
        return self._treedef.unflatten(self._leaves)

    def arranged(self, values: Mapping[Parameter, Any]) -> Any:
        """The tree with these values."""
        return self._treedef.unflatten([values.get(x) if isinstance(x, Parameter) else None for x in self._leaves])

    def gradients(self, grads: Any) -> list[Any]:
        """See :meth:`Source.gradients`; what stands in the place of other leaves is not looked at."""
        leaves = match(self._treedef, grads, lambda: self.names or ())
        return [grad for grad, leaf in zip(leaves, self._leaves, strict=True) if isinstance(leaf, Parameter)]


class ModuleSource(Source):
    """A ``flax.nnx`` module, or a tree of modules: updates go into their ``nnx.Param`` variables."""

    def __init__(self, module: Any):
        self.module = module
        named = list(named_parameters(module))
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._treedef: Any = None  # of gradients seen before, and where each parameter's is among their leaves
        self._order: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleSource":
        for leaf in filter(is_variable, jax.tree.leaves(self.module, is_leaf=is_nnx)):
            memo.setdefault(id(leaf), leaf.copy())  # of one that is in no module, deepcopy makes a bare array
        return ModuleSource(copy.deepcopy(self.module, memo))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        list(named_parameters(self.module))  # the parameters know their module again

    def view(self) -> Any:
        """The module."""
        return self.module

    def with_parameters(self) -> Any:
        """The module; its variables are found in it."""
        return self.module

    def arranged(self, values: Mapping[Parameter, Any]) -> Any:
        """An ``nnx.State`` of the module's ``nnx.Param`` variables, as ``nnx.grad`` returns, with these values."""
        present = {id(p.variable): value for p, value in values.items() if isinstance(p, VariableParameter)}
        flat = nnx().to_flat_state(nnx().state(self.module, nnx().Param))
        return nnx().from_flat_state([(path, var.replace(present.get(id(var)))) for path, var in flat])

    def gradients(self, grads: Any) -> list[Any]:
        """See :meth:`Source.gradients`; takes what ``nnx.grad`` returns."""
        leaves, treedef = jax.tree.flatten(grads)
        if self._treedef is None or treedef != self._treedef:
            found = self._by_name(grads)
            order = _order(leaves, found)
            if None not in order:  # where one is missing, sparse or a tree
                self._treedef, self._order = treedef, order
            return found
        return [leaves[index] for index in self._order]

    def _by_name(self, grads: Any) -> list[Any]:
        variable = nnx().Variable
        paths, _ = jax.tree_util.tree_flatten_with_path(
            grads, is_leaf=lambda x: x is None or is_sparse(x) or isinstance(x, variable)
        )
        found = {dotted(path): leaf.get_value() if isinstance(leaf, variable) else leaf for path, leaf in paths}
        wanted = self.names or ()
        if found.keys() != set(wanted):
            raise structure_error(wanted, list(found))
        return [found[name] for name in wanted]


def _checked_leaves(tree: Any, is_leaf: Callable[[Any], bool]) -> tuple[list[tuple[Any, Any]], Any]:
    """The leaves with their paths, and the structure.

    Raises:
      TypeError: a leaf is or may hold what is meant to be trained, and would be passed over in silence.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, lambda x: is_leaf(x) or isinstance(x, OPAQUE))
    for path, leaf in leaves:
        if path and is_torch_module(leaf):
            raise TypeError(not_parameters(repr(dotted(path)), leaf))
        if hasattr(leaf, "is_floating_point") and (leaf.is_floating_point() or leaf.is_complex()):
            name = dotted(path) or "params"
            raise TypeError(
                f"parameter {name!r} is a PyTorch tensor, which would not be trained: convert it, for example with "
                "jnp.asarray(tensor.detach().numpy())"
            )
        if isinstance(leaf, OPAQUE) or (isinstance(leaf, Set) and any(map(_is_parameter, leaf))):
            name = dotted(path) or "params"
            raise TypeError(
                f"{name!r} is a {type(leaf).__name__}, and what is in it would not be trained: give the modules or "
                "arrays themselves, or nothing but parameters, as in [*optim.parameters(a), *optim.parameters(b)]"
            )
    return leaves, treedef


def _is_parameter(x: Any) -> bool:
    return isinstance(x, Parameter) or is_nnx(x) or (isinstance(x, tuple) and any(map(_is_parameter, x)))


def _order(leaves: list[Any], wanted: list[Any]) -> list[Any]:
    """The position of each among the leaves, ``None`` for what is not a leaf."""
    position = {id(leaf): index for index, leaf in enumerate(leaves)}
    return [position.get(id(leaf)) for leaf in wanted]


class ParameterSource(Source):
    """Parameters that the user made, or took from a module with :func:`parameters`."""

    def __init__(self, parameters: Iterable[Any]):
        items = list(parameters)
        named = [item for item in items if isinstance(item, tuple)]
        if named and len(named) != len(items):
            raise ValueError("all optimizer params should be with/without names. Some param names are missing")
        self.parameters = [item[1] for item in items] if named else items
        self.names = [item[0] for item in items] if named else None
        if len(set(self.names or ())) != len(self.names or ()):
            raise ValueError(f"parameter names must differ from each other, got {self.names}")
        for index, parameter in enumerate(self.parameters):
            if not isinstance(parameter, Parameter):
                what = type(parameter).__name__ if is_nnx(parameter) else repr(parameter)
                raise TypeError(
                    f"optimizer can only optimize Parameters, but one of the params is {what}, at place {index}"
                )
        for name, parameter in zip(self.names or (), self.parameters, strict=False):
            parameter.name = parameter.name or name  # for messages

    def following(self, group: Mapping[str, Any], where: str) -> "ParameterSource":
        """A source of the parameters that a group has now, after its list was edited.

        Raises:
          ValueError: the group has another number of names than of parameters.
        """
        names, parameters = group.get("param_names"), group["params"]
        if names is None:
            return ParameterSource(parameters)
        if len(names) != len(parameters):
            raise ValueError(f"{len(parameters)} parameters have {len(names)} names{where}: edit 'param_names', too")
        return ParameterSource(zip(names, parameters, strict=True))

    @property
    def bound(self) -> bool:
        """Whether any of the parameters is a module's."""
        return any(isinstance(parameter, VariableParameter) for parameter in self.parameters)

    def view(self) -> Any:
        """The list of values, or a dict by name."""
        return self.arranged({p: p.value for p in self.parameters})

    def with_parameters(self) -> Any:
        """The list of parameters, or a dict by name."""
        return self.arranged({p: p for p in self.parameters})

    def arranged(self, values: Mapping[Parameter, Any]) -> Any:
        """The list of these values, or a dict by name."""
        present = [values.get(parameter) for parameter in self.parameters]
        return dict(zip(self.names, present, strict=True)) if self.names else present

    def gradients(self, grads: Any) -> list[Any]:
        """See :meth:`Source.gradients`."""
        view = self.view()
        leaves = match(jax.tree.structure(view), grads, lambda: names(view))
        if self.names:  # a dict's leaves come in sorted order
            by_name = dict(zip(sorted(self.names), leaves, strict=True))
            return [by_name[name] for name in self.names]
        return leaves


def source_of(params: Any) -> Source:
    """The source of what a user handed in as ``params`` of an optimizer or of one group.

    Raises:
      TypeError: an unordered set, parameters inside a tree, arrays alongside ``flax.nnx`` modules, PyTorch tensors,
        generators in a list or dict; an ``nnx.Param`` that holds a tree.
    """
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering in sets changes "
            f"between runs: use a list instead of {params!r}"
        )
    if isinstance(params, (Iterator, KeysView, ValuesView, ItemsView)):
        params = list(params)
    if isinstance(params, (list, tuple)):
        parameters = list(map(_as_parameter, params))
        if any(map(_is_parameter_or_named, parameters)):
            return ParameterSource(parameters)
    if holds_nnx(params):
        return ModuleSource(params)
    source = TreeSource(params)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Parameter))
    if any(isinstance(leaf, Parameter) for leaf in leaves):
        raise TypeError(
            "Parameters must come as an iterable of Parameter or of (name, Parameter), "
            f"not inside a {type(params).__name__}; a dict of them can be given as its .items()"
        )
    return source


def is_single(params: Any) -> bool:
    """Whether this is one parameter, or one ``flax.nnx`` variable, and nothing that has parameters."""
    return isinstance(params, Parameter) or is_variable(params)


def _as_parameter(item: Any) -> Any:
    """The parameter of a variable, with its name where it has one; anything else as it is."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return item[0], _as_parameter(item[1])
    return parameter_of(item) if is_variable(item) else item


def _is_parameter_or_named(item: Any) -> bool:
    return isinstance(item, Parameter) or (
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Parameter)
    )
