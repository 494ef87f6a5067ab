"""Boxes bound to the variables of ``flax.nnx`` modules."""

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import jax
from jax import Array

from optimjax.parameter import Parameter, flatten, unflatten
from optimjax.tree import is_inexact_array

__all__ = ["VariableParameter", "is_nnx", "module_parameters", "nnx"]


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
            memo[id(self)] = VariableParameter(self.variable.copy(), str(self))._like(self)
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
    elif box.root() is None:  # unpickled
        box.root = weakref.ref(root)
    _keepers.setdefault(owner, {})[id(variable)] = box
    return box


def module_parameters(module: Any) -> Iterator[tuple[str, VariableParameter]]:
    """The floating parameters of a module, by dotted path; one that is held twice appears once."""
    flax_nnx = nnx()
    nodes = {path: node for path, node in flax_nnx.iter_graph(module) if isinstance(node, flax_nnx.Pytree)}
    # nnx.state orders and names variables as nnx.grad does; a variable held twice appears once.
    for path, variable in flax_nnx.to_flat_state(flax_nnx.state(module, flax_nnx.Param)):
        owner = next(nodes[path[:end]] for end in range(len(path), -1, -1) if path[:end] in nodes)
        if is_inexact_array(variable.get_value()):
            yield ".".join(map(str, path)), _box_of(variable, ".".join(map(str, path)), module, owner)
