"""Parameters bound to the variables of ``flax.nnx`` modules."""

import copy
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import jax
from jax import Array
from jax.core import Tracer

from optimjax._core.foreign import is_nnx, nnx
from optimjax._core.tree import dotted, is_inexact_array
from optimjax._params.parameter import Parameter, flatten, unflatten

__all__ = ["VariableParameter", "holds_array", "module_parameters", "parameter_of", "read", "write"]


def read(variable: Any) -> Any:
    """``variable.get_value()``, which flax.nnx copies as a tree; here an array is taken as it is."""
    if holds_array(variable) and "on_get_value" not in variable._var_metadata:
        return variable._raw_value
    return variable.get_value()


def write(variable: Any, value: Any) -> None:
    """``variable.set_value(value)``, in the same way."""
    if holds_array(variable) and _is_concrete(type(value)) and "on_set_value" not in variable._var_metadata:
        variable._raw_value = value
    else:
        variable.set_value(value)


def holds_array(variable: Any) -> bool:
    """Whether a variable holds one array, which it reads and writes as flax.nnx does by itself."""
    return _is_plain(type(variable)) and _is_concrete(type(variable._raw_value))


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Whether variables of this class are read and written as all are, and keep their value where they do today."""
    base, names = nnx().Variable, ("get_value", "set_value", "__setattr__", "__getattribute__")
    return {"_raw_value", "_var_metadata"} <= set(getattr(base, "__slots__", ())) and all(
        getattr(kind, name, None) is getattr(base, name, None) for name in names
    )


@functools.cache
def _is_concrete(kind: type) -> bool:
    """Whether this is a class of arrays, neither of tracers nor of references to arrays."""
    return issubclass(kind, jax.Array) and not issubclass(kind, Tracer) and hasattr(kind, "addressable_shards")


class VariableParameter(Parameter):
    """A parameter bound to a ``flax.nnx`` variable: reading and writing reach into the module."""

    __slots__ = ("root", "variable")

    def __init__(self, variable: Any, name: str | None, root: Any = None):
        super().__init__(variable.get_value(), name=name)
        del self._value  # the variable has it
        self.variable = variable
        self.root = weakref.ref(root) if root is not None else lambda: None  # of the path that is the name

    @property
    def value(self) -> Array:
        """The variable's array."""
        return read(self.variable)

    @value.setter
    def value(self, value: Any) -> None:
        self._write(self._checked(value))

    def _write(self, value: Array) -> None:
        """Set the variable's array without checks."""
        write(self.variable, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariableParameter":
        # The copy belongs to the copy of its module: of one that the same deepcopy has copied before, else of the root.
        # The memo lists them under its own id; flax.nnx copies submodules without the memo, so it does not have them.
        kept: Any = memo.get(id(memo), ())
        before = [x for x in kept if is_nnx(x) and not isinstance(x, nnx().Variable)]
        for module in (*before, self.root()):
            if module is not None and id(self) not in memo:
                copied = module_parameters(copy.deepcopy(module, memo))
                for (_, parameter), (_, twin) in zip(module_parameters(module), copied, strict=True):
                    memo.setdefault(id(parameter), twin._like(parameter))
        if id(self) not in memo:
            variable = memo.setdefault(id(self.variable), self.variable.copy())
            memo[id(self)] = parameter_of(variable, self.name)._like(self)
        return memo[id(self)]

    def _like(self, other: Parameter) -> "VariableParameter":
        self._grad, self.requires_grad = other.grad, other.requires_grad
        return self

    def __reduce__(self) -> Any:
        return _restore_variable_parameter, (self.variable, self.name, self.requires_grad, self._grad)


def _restore_variable_parameter(variable: Any, name: str, requires_grad: bool, grad: Any) -> VariableParameter:
    parameter = _known.get(id(variable))  # made already, if the module's parameters have been listed
    if parameter is None:
        parameter = _known[id(variable)] = VariableParameter(variable, name)
    parameter.requires_grad, parameter._grad = requires_grad, grad
    return parameter


# In a tree of tracers it is a plain parameter: JAX must not write into the module.
jax.tree_util.register_pytree_node(VariableParameter, flatten, unflatten)


# The same variable always has the same parameter, so that `set(map(id, optim.parameters(module)))` selects as in
# PyTorch. Variables take neither attributes nor weak references, so a parameter lives as long as a module that holds
# its variable: the parameter keeps the variable (its id stays taken), the entry of the module in `_keepers` keeps it.
# The entry goes by id, because a module may have no hash, and goes with the module, before another can have that id.
_known: "weakref.WeakValueDictionary[int, VariableParameter]" = weakref.WeakValueDictionary()
_keepers: dict[int, dict[int, VariableParameter]] = {}


def parameter_of(variable: Any, name: str | None = None, root: Any = None, owner: Any = None) -> VariableParameter:
    """The parameter of a variable.

    In the module ``root`` it has this ``name``; ``owner`` is the module in it that holds the variable.
    """
    parameter = _known.get(id(variable))
    if parameter is None:
        parameter = _known[id(variable)] = VariableParameter(variable, name, root)
    elif root is not None:
        if name and name.count(".") > (parameter.name or "").count("."):  # known from inside: the whole path says more
            parameter.name, parameter.root = name, weakref.ref(root)
        elif parameter.root() is None:  # unpickled, or known by itself
            parameter.name, parameter.root = parameter.name or name, weakref.ref(root)
    if owner is not None:
        if id(owner) not in _keepers:
            _keepers[id(owner)] = {}
            weakref.finalize(owner, _keepers.pop, id(owner)).atexit = False
        _keepers[id(owner)][id(variable)] = parameter
    return parameter


def module_parameters(tree: Any) -> Iterator[tuple[str, VariableParameter]]:
    """The floating parameters of a module, or of a tree of modules, by dotted path; one held twice appears once.

    Raises:
      TypeError: an ``nnx.Param`` holds a tree of arrays, or a Python number.
    """
    seen = set()
    for place, module in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_nnx)[0]:
        for path, variable, owner in _variables(module):
            value = variable.get_value()
            name = ".".join([dotted(place)] * bool(place) + list(map(str, path)))
            if not is_inexact_array(value):
                _check_untrained(name, value)
            elif id(variable) not in seen:
                seen.add(id(variable))
                yield name, parameter_of(variable, name, None if owner is None else module, owner)


def _check_untrained(name: str, value: Any) -> None:
    """Integers, random keys or nothing at all may be in an ``nnx.Param``; what ``nnx.grad`` would differentiate not."""
    if any(is_inexact_array(leaf) or isinstance(leaf, (float, complex)) for leaf in jax.tree.leaves(value)):
        raise TypeError(
            f"the nnx.Param {name!r} holds a {type(value).__name__}, which would not be trained: give each array "
            "an nnx.Param of its own, a number as jnp.array(...); or make it an nnx.Variable"
        )


def _variables(module: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The parameters of a module, or the one that belongs to no module: path, variable and the module that holds it."""
    flax_nnx = nnx()
    if isinstance(module, flax_nnx.Param):
        yield (), module, None
    if not isinstance(module, flax_nnx.Pytree):
        return
    nodes = {path: node for path, node in flax_nnx.iter_graph(module) if isinstance(node, flax_nnx.Pytree)}
    # nnx.state orders and names variables as nnx.grad does.
    for path, variable in flax_nnx.to_flat_state(flax_nnx.state(module, flax_nnx.Param)):
        yield path, variable, next(nodes[path[:end]] for end in range(len(path), -1, -1) if path[:end] in nodes)
