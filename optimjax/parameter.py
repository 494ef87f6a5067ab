"""Parameters: the boxes that the facade works on, and how what a user hands in becomes boxes.

Three kinds of things can be handed in, each a *source*: a pytree (:class:`TreeSource`), a ``flax.nnx`` module
(:class:`ModuleSource`), boxes (:class:`BoxSource`). A source lists its boxes, shows the user's view of them
(``optimizer.params``) and brings gradients of that view into the order of the boxes.
"""

import copy
import operator
import sys
import weakref
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax.tree import check_gradient, dotted, is_inexact_array, match, names, structure_error

__all__ = ["Parameter", "named_parameters", "parameters"]


class Parameter:
    """A mutable box for one array, with its gradient: what ``torch.nn.Parameter`` is to an optimizer.

    Usable wherever ``jax.numpy`` takes an array, and with the arithmetic operators.

    Args:
      value: a real or complex floating array of any shape (or a Python float).
      name: shown in messages and used to match saved state.
      requires_grad: ``False`` freezes the parameter for :meth:`optimjax.Optimizer.backward`.

    Raises:
      TypeError: the value is no floating array.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> w = optim.Parameter(jnp.array([3.0, 4.0]), name="w")
    >>> w.grad = 2 * w.value
    >>> optim.SGD([w], lr=0.1).step()
    >>> print(f"{jnp.sum(w):.1f}", w.shape)
    5.6 (2,)
    """

    __slots__ = ("__weakref__", "_grad", "_signature", "_value", "name", "requires_grad")

    def __init__(self, value: Any, *, name: str | None = None, requires_grad: bool = True):
        self._value = _floating(value, name)
        self._grad: Array | None = None
        self._signature: tuple[Any, Any] = (None, None)
        self.name = name
        self.requires_grad = requires_grad

    @property
    def value(self) -> Array:
        """The array. Setting checks shape and dtype: ``ValueError`` or ``TypeError`` where they differ."""
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self.write(self._checked(value))

    def write(self, value: Array) -> None:
        """Set the value without checks."""
        self._value = value

    @property
    def grad(self) -> Array | None:
        """The gradient, ``None`` until there is one. Setting checks shape and kind."""
        return self._grad

    @grad.setter
    def grad(self, grad: Any) -> None:
        if grad is not None:
            check_gradient(self.__str__, self, grad)
            grad = jnp.asarray(grad)
        self._grad = grad

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the value."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.value.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.value.size

    def signature(self, value: Array) -> tuple[Any, ...]:
        """Shape, dtype and sharding of the present value: parameters that agree in it compile alike."""
        # An update changes none of the three, so the answer is kept for as long as the step itself wrote the value.
        if self._signature[0] is not value:
            self._signature = (value, (value.shape, value.dtype, getattr(value, "sharding", None)))
        return self._signature[1]

    def write_updated(self, value: Array) -> None:
        """Set a value that has the signature of the present one."""
        self.write(value)
        self._signature = (value, self._signature[1])

    def _checked(self, value: Any) -> Array:
        array = jnp.asarray(value)
        if array.shape != self.shape:
            raise ValueError(f"value of parameter {str(self)!r} must keep shape {self.shape}, got {array.shape}")
        if array.dtype != self.dtype:
            raise TypeError(f"value of parameter {str(self)!r} must keep dtype {self.dtype}, got {array.dtype}")
        return array

    __array_priority__ = 100  # `numpy_array @ box` is the box's business

    def __jax_array__(self) -> Array:
        return self.value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.value, dtype=dtype)

    def __getitem__(self, index: Any) -> Array:
        return self.value[index]

    def __len__(self) -> int:
        return len(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        return self.name or "parameter"

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        frozen = "" if self.requires_grad else ", requires_grad=False"
        return f"Parameter({name}{self.value!r}{frozen})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parameter":
        # The arrays are immutable, so the copy may share them.
        twin = Parameter(self.value, name=self.name, requires_grad=self.requires_grad)
        twin._grad = self._grad
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        return _restore_parameter, (self.value, self.name, self.requires_grad, self._grad)


def _restore_parameter(value: Any, name: str | None, requires_grad: bool, grad: Any) -> Parameter:
    parameter = Parameter(value, name=name, requires_grad=requires_grad)
    parameter.grad = grad
    return parameter


def _add_operators() -> None:
    """`w * x`, `x @ w`, `-w`, ...: a box in an expression stands for its value. Equality stays identity."""

    def forward(function: Any) -> Any:
        return lambda self, other: function(self.value, _value(other))

    def reflected(function: Any) -> Any:
        return lambda self, other: function(_value(other), self.value)

    def unary(function: Any) -> Any:
        return lambda self: function(self.value)

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
        setattr(Parameter, f"__{name}__", forward(getattr(operator, name)))
        setattr(Parameter, f"__r{name}__", reflected(getattr(operator, name)))
    for name in ("lt", "le", "gt", "ge"):
        setattr(Parameter, f"__{name}__", forward(getattr(operator, name)))
    for name in ("neg", "pos", "abs"):
        setattr(Parameter, f"__{name}__", unary(getattr(operator, name)))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Parameter) else x


_add_operators()


# `__jax_array__` alone does not satisfy jnp.sum(box) on JAX 0.10; a registered node passes.
def _flatten(box: Parameter) -> tuple[tuple[Array], tuple[str | None, bool]]:
    return (box.value,), (box.name, box.requires_grad)


def _unflatten(aux: tuple[str | None, bool], children: Any) -> Any:
    # JAX unflattens with tracers and with placeholders of any type, so nothing may be checked here.
    box = Parameter.__new__(Parameter)
    (box._value,), box._grad, box._signature = children, None, (None, None)
    box.name, box.requires_grad = aux
    return box


jax.tree_util.register_pytree_node(Parameter, _flatten, _unflatten)


def _floating(value: Any, name: str | None) -> Array:
    try:
        array = jnp.asarray(_value(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"parameter {name or ''!r} must be a floating array, got {value!r}") from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"parameter {name or ''!r} must be a floating array, got {array.dtype}: {value!r}")
    return array


# --- flax.nnx -------------------------------------------------------------------------------------------------------


class VariableParameter(Parameter):
    """A box bound to a ``flax.nnx`` variable: reading and writing reach into the module."""

    __slots__ = ("root", "variable")

    def __init__(self, variable: Any, name: str, root: Any = None):
        super().__init__(variable.get_value(), name=name)
        del self._value  # the variable has it
        self.variable = variable
        self.root = weakref.ref(root) if root is not None else lambda: None  # of the path that is the name

    @property
    def value(self) -> Array:
        """The variable's array."""
        return self.variable.get_value()

    @value.setter
    def value(self, value: Any) -> None:
        self.write(self._checked(value))

    def write(self, value: Array) -> None:
        """Set the variable's array without checks."""
        self.variable.set_value(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariableParameter":
        # The copy belongs to the copy of the module: the one made in the same deepcopy, if there is one.
        root = self.root()
        if root is not None:
            copied = _module_parameters(copy.deepcopy(root, memo))
            for (_, box), (_, twin) in zip(_module_parameters(root), copied, strict=True):
                memo[id(box)] = twin._like(box)
        if id(self) not in memo:
            memo[id(self)] = VariableParameter(self.variable.copy(), str(self))._like(self)
        return memo[id(self)]

    def _like(self, other: Parameter) -> "VariableParameter":
        self._grad, self.requires_grad = other.grad, other.requires_grad
        return self

    def __reduce__(self) -> Any:
        return _restore_variable_parameter, (self.variable, self.name, self.requires_grad, self._grad)


def _restore_variable_parameter(variable: Any, name: str, requires_grad: bool, grad: Any) -> VariableParameter:
    box = VariableParameter(variable, name)
    box.requires_grad, box._grad = requires_grad, grad
    return box


# In a tree of tracers it is a plain box: JAX must not write into the module.
jax.tree_util.register_pytree_node(VariableParameter, _flatten, _unflatten)


def nnx() -> Any:
    """``flax.nnx`` if anyone has imported it, else ``None``: only then can an object be one of its modules."""
    return sys.modules.get("flax.nnx")


def is_nnx(x: Any) -> bool:
    """Whether this is a ``flax.nnx`` module, container or variable."""
    flax_nnx = nnx()
    return flax_nnx is not None and isinstance(x, (flax_nnx.Pytree, flax_nnx.Variable))


# The same variable always has the same box, so that `set(map(id, optim.parameters(module)))` selects as in PyTorch.
# Variables take neither attributes nor weak references, so a box lives as long as a module that holds its variable:
# the box keeps the variable (its id stays taken), the module's entry in `_keepers` keeps the box.
_boxes: "weakref.WeakValueDictionary[int, VariableParameter]" = weakref.WeakValueDictionary()
_keepers: "weakref.WeakKeyDictionary[Any, dict[int, VariableParameter]]" = weakref.WeakKeyDictionary()


def _box_of(variable: Any, name: str, root: Any, owner: Any) -> VariableParameter:
    box = _boxes.get(id(variable))
    if box is None:
        box = _boxes[id(variable)] = VariableParameter(variable, name, root)
    elif name.count(".") > str(box).count("."):  # seen before from inside: the whole path is the better name
        box.name, box.root = name, weakref.ref(root)
    _keepers.setdefault(owner, {})[id(variable)] = box
    return box


def _module_parameters(module: Any) -> Iterator[tuple[str, VariableParameter]]:
    flax_nnx = nnx()
    nodes = {path: node for path, node in flax_nnx.iter_graph(module) if isinstance(node, flax_nnx.Pytree)}
    # nnx.state orders and names variables as nnx.grad does; a variable held twice appears once.
    for path, variable in flax_nnx.to_flat_state(flax_nnx.state(module, flax_nnx.Param)):
        owner = next(nodes[path[:end]] for end in range(len(path), -1, -1) if path[:end] in nodes)
        if is_inexact_array(variable.get_value()):
            yield ".".join(map(str, path)), _box_of(variable, ".".join(map(str, path)), module, owner)


def named_parameters(module: Any) -> Iterator[tuple[str, Parameter]]:
    """Iterate the parameters of a ``flax.nnx`` module, or of a pytree, as ``(dotted name, box)``.

    Boxes of a module are bound to it, and are the *same* objects each time. Boxes of a pytree are new ones with its
    arrays; leaves that are not floating arrays are left out.

    >>> from flax import nnx
    >>> import optimjax as optim
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> [(name, box.shape) for name, box in optim.named_parameters(layer)]
    [('bias', (3,)), ('kernel', (2, 3))]
    """
    if is_nnx(module):
        yield from _module_parameters(module)
    else:
        yield from ((box.name or "", box) for box in TreeSource(module).parameters)


def parameters(module: Any) -> Iterator[Parameter]:
    """Iterate the parameters of a ``flax.nnx`` module, or of a pytree, as boxes; see :func:`named_parameters`."""
    return (box for _, box in named_parameters(module))


# --- Sources --------------------------------------------------------------------------------------------------------


class Source:
    """What was handed in as ``params``, whole or of one group.

    Attributes:
      parameters: its boxes, in order.
      names: their names, or ``None`` where the user gave none.
      bound: whether the boxes belong to a module that the user passes to the loss function himself.
    """

    parameters: list[Parameter]
    names: Sequence[str] | None = None
    bound: ClassVar[bool] = False

    def view(self) -> Any:
        """What ``optimizer.params`` shows."""
        raise NotImplementedError

    def boxed(self) -> Any:
        """The view with boxes in place of the arrays to be differentiated."""
        raise NotImplementedError

    def gradients(self, grads: Any) -> list[Any]:
        """Gradients of the view, in the order of ``parameters``; ``None`` where missing.

        Raises:
          ValueError: their structure is another one.
        """
        raise NotImplementedError


class TreeSource(Source):
    """A pytree: the optimizer has its own boxes; leaves that are no floating arrays pass through untouched."""

    def __init__(self, tree: Any):
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        self._leaves = [Parameter(leaf, name=dotted(path)) if is_inexact_array(leaf) else leaf for path, leaf in paths]
        self.parameters = [leaf for leaf in self._leaves if isinstance(leaf, Parameter)]
        self.names = [box.name or "" for box in self.parameters]

    def view(self) -> Any:
        """The tree with the present values."""
        return self._treedef.unflatten([_value(leaf) for leaf in self._leaves])

    def boxed(self) -> Any:
        """The tree with boxes as leaves."""
        return self._treedef.unflatten(self._leaves)

    def gradients(self, grads: Any) -> list[Any]:
        """See :meth:`Source.gradients`; what stands in the place of other leaves is not looked at."""
        leaves = match(self._treedef, grads, lambda: self.names or ())
        return [grad for grad, leaf in zip(leaves, self._leaves, strict=True) if isinstance(leaf, Parameter)]


class ModuleSource(Source):
    """A ``flax.nnx`` module: updates go into its ``nnx.Param`` variables."""

    def __init__(self, module: Any):
        self.module = module
        named = list(named_parameters(module))
        self.names = [name for name, _ in named]
        self.parameters = [box for _, box in named]
        self._treedef: Any = None  # of gradients seen before, and where each parameter's is among their leaves
        self._order: list[int] = []

    def view(self) -> Any:
        """The module."""
        return self.module

    def boxed(self) -> Any:
        """The module; its variables are found in it."""
        return self.module

    def gradients(self, grads: Any) -> list[Any]:
        """See :meth:`Source.gradients`; takes what ``nnx.grad`` returns."""
        leaves, treedef = jax.tree.flatten(grads)
        if self._treedef is None or treedef != self._treedef:  # the first time, and whenever a gradient is missing
            leaves = self._by_name(grads)
            if all(leaf is not None for leaf in leaves):
                self._treedef, self._order = treedef, _order(jax.tree.leaves(grads), leaves)
            return leaves
        return [leaves[index] for index in self._order]

    def _by_name(self, grads: Any) -> list[Any]:
        variable = nnx().Variable
        paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: x is None or isinstance(x, variable))
        found = {dotted(path): leaf.get_value() if isinstance(leaf, variable) else leaf for path, leaf in paths}
        wanted = self.names or ()
        if found.keys() != set(wanted):
            raise structure_error(wanted, list(found))
        return [found[name] for name in wanted]


def _order(leaves: list[Any], wanted: list[Any]) -> list[int]:
    position = {id(leaf): index for index, leaf in enumerate(leaves)}
    return [position[id(leaf)] for leaf in wanted]


class BoxSource(Source):
    """Boxes that the user made, or took from a module with :func:`parameters`."""

    def __init__(self, boxes: Iterable[Any]):
        items = list(boxes)
        named = [item for item in items if isinstance(item, tuple)]
        if named and len(named) != len(items):
            raise ValueError("all optimizer params should be with/without names. Some param names are missing")
        self.parameters = [item[1] for item in items] if named else items
        self.names = [item[0] for item in items] if named else None
        if len(set(self.names or ())) != len(self.names or ()):
            raise ValueError(f"parameter names must differ from each other, got {self.names}")
        for box in self.parameters:
            if not isinstance(box, Parameter):
                raise TypeError(f"optimizer can only optimize Parameters, but one of the params is {box!r}")

    @property
    def bound(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the boxes are a module's."""
        return any(isinstance(box, VariableParameter) for box in self.parameters)

    def view(self) -> Any:
        """The list of values, or a dict by name."""
        values = [box.value for box in self.parameters]
        return dict(zip(self.names, values, strict=True)) if self.names else values

    def boxed(self) -> Any:
        """The list of boxes, or a dict by name."""
        return dict(zip(self.names, self.parameters, strict=True)) if self.names else list(self.parameters)

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
      TypeError: a single box, an unordered set, or something that holds no arrays at all.
    """
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering in sets changes "
            f"between runs: use a list instead of {params!r}"
        )
    if is_nnx(params):
        return ModuleSource(params)
    if isinstance(params, (Iterator, KeysView, ValuesView, ItemsView)):
        params = list(params)
    if isinstance(params, (list, tuple)) and any(map(_is_box_or_named, params)):
        return BoxSource(params)
    boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Parameter))
    if any(isinstance(leaf, Parameter) for leaf in boxes):
        raise TypeError(
            "Parameters must come as an iterable of Parameter or of (name, Parameter), "
            f"not inside a {type(params).__name__}; a dict of them can be given as its .items()"
        )
    return TreeSource(params)


def _is_box_or_named(item: Any) -> bool:
    return isinstance(item, Parameter) or (
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Parameter)
    )
