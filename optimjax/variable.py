"""Boxes bound to the variables of ``flax.nnx`` modules."""

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import jax
from jax import Array

from optimjax.parameter import Parameter, flatten, unflatten
from optimjax.tree import dotted, is_inexact_array

__all__ = ["VariableParameter", "box_of", "holds_nnx", "is_nnx", "is_variable", "module_parameters", "nnx"]


class VariableParameter(Parameter):
    """A box bound to a ``flax.nnx`` variable: reading and writing reach into the module."""

    __slots__ = ("root", "variable")

    def __init__(self, variable: Any, name: str | None, root: Any = None):
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
        # The copy belongs to the copy of its module: of one that the same deepcopy has copied before, else of the root.
        # The memo lists them under its own id; flax.nnx copies submodules without the memo, so it does not have them.
        kept: Any = memo.get(id(memo), ())
        before = [x for x in kept if is_nnx(x) and not isinstance(x, nnx().Variable)]
        for module in (*before, self.root()):
            if module is not None and id(self) not in memo:
                copied = module_parameters(copy.deepcopy(module, memo))
                for (_, box), (_, twin) in zip(module_parameters(module), copied, strict=True):
                    memo.setdefault(id(box), twin._like(box))
        if id(self) not in memo:
            memo[id(self)] = box_of(memo.setdefault(id(self.variable), self.variable.copy()), self.name)._like(self)
        return memo[id(self)]

    def _like(self, other: Parameter) -> "VariableParameter":
        self._grad, self.requires_grad = other.grad, other.requires_grad
        return self

    def __reduce__(self) -> Any:
        return _restore_variable_parameter, (self.variable, self.name, self.requires_grad, self._grad)


def _restore_variable_parameter(variable: Any, name: str, requires_grad: bool, grad: Any) -> VariableParameter:
    box = _boxes.get(id(variable))  # made already, if the module's parameters have been listed
    if box is None:
        box = _boxes[id(variable)] = VariableParameter(variable, name)
    box.requires_grad, box._grad = requires_grad, grad
    return box


# In a tree of tracers it is a plain box: JAX must not write into the module.
jax.tree_util.register_pytree_node(VariableParameter, flatten, unflatten)


def nnx() -> Any:
    """``flax.nnx`` if anyone has imported it, else ``None``: only then can an object be one of its modules."""
    return sys.modules.get("flax.nnx")


def is_variable(x: Any) -> bool:
    """Whether this is a ``flax.nnx`` variable."""
    return nnx() is not None and isinstance(x, nnx().Variable)


def is_nnx(x: Any) -> bool:
    """Whether this is a ``flax.nnx`` module, container or variable."""
    return nnx() is not None and isinstance(x, (nnx().Pytree, nnx().Variable))


def holds_nnx(tree: Any) -> bool:
    """Whether there are such objects in a tree."""
    return any(map(is_nnx, jax.tree.leaves(tree, is_leaf=is_nnx)))


# The same variable always has the same box, so that `set(map(id, optim.parameters(module)))` selects as in PyTorch.
# Variables take neither attributes nor weak references, so a box lives as long as a module that holds its variable:
# the box keeps the variable (its id stays taken), the module's entry in `_keepers` keeps the box.
_boxes: "weakref.WeakValueDictionary[int, VariableParameter]" = weakref.WeakValueDictionary()
_keepers: "weakref.WeakKeyDictionary[Any, dict[int, VariableParameter]]" = weakref.WeakKeyDictionary()


def box_of(variable: Any, name: str | None = None, root: Any = None, owner: Any = None) -> VariableParameter:
    """The box of a variable: in the module ``root`` it has this name, the module in it that holds it is ``owner``."""
    box = _boxes.get(id(variable))
    if box is None:
        box = _boxes[id(variable)] = VariableParameter(variable, name, root)
    elif root is not None:
        if name and name.count(".") > (box.name or "").count("."):  # known from inside: the whole path says more
            box.name, box.root = name, weakref.ref(root)
        elif box.root() is None:  # unpickled, or known by itself
            box.name, box.root = box.name or name, weakref.ref(root)
    if owner is not None:
        _keepers.setdefault(owner, {})[id(variable)] = box
    return box


def module_parameters(tree: Any) -> Iterator[tuple[str, VariableParameter]]:
    """The floating parameters of a module, or of a tree of modules, by dotted path; one held twice appears once."""
    seen = set()
    for place, module in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_nnx)[0]:
        for path, variable, owner in _variables(module):
            if id(variable) not in seen and is_inexact_array(variable.get_value()):
                seen.add(id(variable))
                name = ".".join([dotted(place)] * bool(place) + list(map(str, path)))
                yield name, box_of(variable, name, None if owner is None else module, owner)


def _variables(module: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The parameters of a module, or the one that is no module's: path, variable and the module that holds it."""
    flax_nnx = nnx()
    if isinstance(module, flax_nnx.Param):
        yield (), module, None
    if not isinstance(module, flax_nnx.Pytree):
        return
    nodes = {path: node for path, node in flax_nnx.iter_graph(module) if isinstance(node, flax_nnx.Pytree)}
    # nnx.state orders and names variables as nnx.grad does.
    for path, variable in flax_nnx.to_flat_state(flax_nnx.state(module, flax_nnx.Param)):
        yield path, variable, next(nodes[path[:end]] for end in range(len(path), -1, -1) if path[:end] in nodes)
