"""The call of a loss function, taken apart into what is differentiated, what is traced and what is compiled in.

A call ``loss_fn(*args, **kwargs)`` has arrays that are differentiated (those of parameters), arrays that are only
traced (other arrays and numbers, other variables of ``flax.nnx`` modules) and what is static (functions, strings, the
structure of modules). A module that the loss changes, its batch statistics or random state, is written back afterwards.
So is what the loss writes into a parameter, as ``nnx.SpectralNorm`` does: the gradient is that at the value before, the
update is applied to the value after.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.containers import own_memory
from optimjax._core.foreign import from_tensor, is_nnx, nnx
from optimjax._core.tree import dotted
from optimjax._engine.interned import interned
from optimjax._params.parameter import Parameter, value_of
from optimjax._params.snapshot import Snapshot
from optimjax._params.variable import VariableParameter, read, write
from optimjax._storage.placement import pin, pinned

__all__ = ["CallCache", "CallStructure", "LossArguments", "LossCall"]


@dataclass(frozen=True, eq=False)
class LossArguments:
    """What a loss function is called with, and how.

    Attributes:
      args: its arguments by position, except for what the optimizer gives it.
      kwargs: those by name.
      has_aux: whether it returns ``(loss, aux)``.
      micro_batches: into how many parts the arrays among its arguments are divided.

    Raises:
      TypeError: ``micro_batches`` is not an integer.
      ValueError: it is below 1.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    has_aux: bool = False
    micro_batches: int = 1

    def __post_init__(self) -> None:
        parts = self.micro_batches
        if not isinstance(parts, (int, np.integer)) or isinstance(parts, bool):
            raise TypeError(f"micro_batches must be an integer, got {parts!r}")
        if parts < 1:
            raise ValueError(f"micro_batches must be at least 1, got {parts}")

    @property
    def names(self) -> list[str]:
        """What was given: ``args[0]``, names, options that are not the usual ones."""
        options = ["has_aux"] * bool(self.has_aux) + ["micro_batches"] * (self.micro_batches != 1)
        return [*(f"args[{index}]" for index in range(len(self.args))), *self.kwargs, *options]


class Role(enum.Enum):
    """What becomes of a leaf of the arguments, or of an array of a module among them."""

    DIFFERENTIATED = enum.auto()
    TRACED = enum.auto()  # in a module: what the loss may change; else what micro-batches divide
    CONSTANT = enum.auto()  # traced as well; in a module it is in no variable, so that a change would be lost
    STATIC = enum.auto()
    MODULE = enum.auto()
    PARAMETER = enum.auto()  # before it is known whether it is differentiated or traced


Leaf = tuple[Role, Any]  # with the index among what has this role; of what is static, the leaf itself


@dataclass(frozen=True, eq=False)
class CallStructure:
    """The static description of a call: from it and the arrays, a compiled function puts the arguments together.

    Equal ones are one object, see :func:`optimjax._engine.interned.interned`.
    """

    treedef: Any  # of the arguments, with modules and parameters as leaves
    leaves: tuple[Leaf, ...]
    graphdef: Any  # of all modules among the arguments together, so that what they share stays shared
    state_treedef: Any
    state_leaves: tuple[Leaf, ...]  # the same for each array of the modules
    types: tuple[type, ...]  # of the static leaves, because 1 == True == 1.0
    has_aux: bool
    micro_batches: int
    pins: tuple[Any, ...] = ()  # of traced arrays, see :func:`optimjax._storage.placement.pin`

    def pinned(self, pins: tuple[Any, ...]) -> "CallStructure":
        """The same with these pins."""
        return interned(CallStructure, *[getattr(self, name.name) for name in fields(self)[:-1]], pins)

    def pin(self, index: int) -> Any:
        """Where a traced array must stay."""
        return self.pins[index] if self.pins else None

    @property
    def divided(self) -> list[int]:
        """Which of the traced arrays micro-batches divide."""
        return [index for role, index in self.leaves if role is Role.TRACED]

    @property
    def changing(self) -> list[int]:
        """Which of the traced arrays are those of modules that the loss may change."""
        return [index for role, index in self.state_leaves if role is Role.TRACED]

    def arguments(
        self, differentiated: Sequence[Array], traced: Sequence[Array]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """The arguments made of these arrays, by position and by name, and the modules among them."""
        values: dict[Role, Sequence[Any]] = {
            Role.DIFFERENTIATED: differentiated,
            Role.TRACED: traced,
            Role.CONSTANT: traced,
        }
        modules = None
        if self.graphdef is not None:
            arrays = [values[role][index] for role, index in self.state_leaves]
            values[Role.MODULE] = modules = nnx().merge(self.graphdef, self.state_treedef.unflatten(arrays))
        leaves = [what if role is Role.STATIC else values[role][what] for role, what in self.leaves]
        return *self.treedef.unflatten(leaves), modules

    def after(
        self, modules: Any, differentiated: Sequence[Array], traced: Sequence[Array]
    ) -> tuple[dict[int, Array], list[Array]]:
        """The arrays of the modules after the call: those of parameters, by index, and of other variables."""
        if modules is None:
            return {}, []
        paths, treedef = jax.tree_util.tree_flatten_with_path(nnx().split(modules)[1])
        if treedef != self.state_treedef:
            raise ValueError(
                "the loss function added, removed or reshaped variables of a module (for example with sow); do that "
                "outside of it, or return what you need as auxiliary output"
            )
        roles = [(path, leaf, *role) for (path, leaf), role in zip(paths, self.state_leaves, strict=True)]
        if any(role is Role.CONSTANT and leaf is not traced[index] for _, leaf, role, index in roles):
            raise ValueError(
                "the loss function assigned to an array of a module that is in no nnx.Variable: wrap it in one"
            )
        params = {
            index: _left(path, leaf, differentiated[index])
            for path, leaf, role, index in roles
            if role is Role.DIFFERENTIATED
        }
        changed = [leaf for _, leaf, role, _ in roles if role is Role.TRACED]
        return params, pinned(changed, [self.pin(index) for index in self.changing])


def _left(path: Any, new: Any, old: Array) -> Array:
    """What a loss has left in a parameter."""
    if new is old:
        return old
    array = jnp.asarray(new)
    if (array.shape, array.dtype) != (old.shape, old.dtype):
        name = dotted(path[1:]).removesuffix(".value")
        raise TypeError(
            f"the loss function writes {array.dtype}{list(array.shape)} into the parameter {name!r}, which must keep "
            f"{old.dtype}{list(old.shape)}: cast what is written, in layers of flax.nnx with dtype="
        )
    return jnp.asarray(array, array.dtype)  # without a weak type, or the next step would compile


@dataclass
class LossCall:
    """A call of a loss function, taken apart."""

    structure: CallStructure
    parameters: list[Parameter]  # those found among the arguments, in the order of `differentiated`
    variables: list[Any]  # those whose arrays may change, in the order in which `CallStructure.after` has them
    sources: list[Any]  # of each traced array: the position of a leaf, or a variable, or the array
    differentiated: list[Array] = field(default_factory=list)
    traced: list[Any] = field(default_factory=list)

    def filled(self, leaves: Sequence[Any]) -> "LossCall":
        """With the present arrays; ``leaves`` are those of the arguments.

        It is another call, because this one is remembered and must not hold batches, or parameters that are replaced.
        """
        traced = []
        for source in self.sources:
            if isinstance(source, int):
                # The program may read memory of NumPy after the step has returned, when it is filled with other data.
                traced.append(own_memory(from_tensor(value_of(leaves[source]))))
            elif isinstance(source, jax.Array):
                traced.append(source)
            else:
                traced.extend(jax.tree.leaves(read(source)))
        values = [parameter.value for parameter in self.parameters]
        call = LossCall(self.structure, self.parameters, self.variables, self.sources, values, traced)
        if jax.device_count() > 1:
            pins = tuple(map(pin, traced))
            if pins != self.structure.pins:
                call.structure = self.structure = self.structure.pinned(pins)
        return call

    def write_back(self, changed: Sequence[Array], written: Mapping[int, Array] = {}) -> None:
        """Write what the call changed into the modules, and into parameters."""
        for index, value in written.items():
            self.parameters[index]._write(value)
        values = iter(changed)
        for variable in self.variables:
            leaves, treedef = jax.tree.flatten(read(variable))
            write(variable, treedef.unflatten([next(values) for _ in leaves]))


class CallCache:
    """Takes calls apart; splits a module once, and again only when it has changed."""

    def __init__(self) -> None:
        self._key: Any = None
        self._structure: Any = None
        self._snapshot = Snapshot(())
        self._call: Any = None

    def __call__(self, given: LossArguments, parameters: Sequence[Parameter], model: tuple[Any, ...] = ()) -> LossCall:
        """Take a call apart; ``parameters`` with ``requires_grad`` are differentiated where they occur.

        Where the first argument is what the optimizer was made from (``model``), its plain numbers are static: they
        describe the model (the size of a window, the rate of a dropout) and never change.

        Raises:
          ValueError: an array cannot be divided into the micro-batches.
          TypeError: an argument can neither be traced nor compiled in.
        """
        whole = ((*model, *given.args), dict(given.kwargs))
        leaves, treedef = jax.tree.flatten(whole, is_leaf=_is_leaf)
        fixed = treedef.children()[0].children()[0].num_leaves if model else 0
        roles = [_role(leaf, position < fixed) for position, leaf in enumerate(leaves)]
        modules = [leaf for leaf, (role, _) in zip(leaves, roles, strict=True) if role is Role.MODULE]
        types = [type(what) for role, what in roles if role is Role.STATIC]
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        how = bool(given.has_aux), int(given.micro_batches)
        if how[1] > 1:
            _check_divides(whole, roles, how[1], len(model))
        key = (treedef, roles, types, list(map(id, wanted)), how)
        if key != self._key or not self._snapshot.holds(modules):
            before, self._key = self._key, None  # for an interrupt in between
            structure = _structure(modules)
            if structure is None or (key, structure) != (before, self._structure):
                self._call = _Parts(wanted).of_call(treedef, roles, modules, *how)
            self._structure, self._snapshot = structure, Snapshot(modules)
            self._key = key
        return self._call.filled(leaves)

    def __reduce__(self) -> Any:
        return CallCache, ()  # what is remembered goes by identity


def _role(leaf: Any, fixed: bool) -> Leaf:
    """A leaf's role before it is known which parameters are wanted, and what a remembered call depends on."""
    if isinstance(leaf, Parameter):
        return Role.PARAMETER, id(_identity(leaf))
    if is_nnx(leaf):
        return Role.MODULE, None
    number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool) and not fixed
    if number or isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or hasattr(leaf, "detach"):
        return (Role.CONSTANT if fixed else Role.TRACED), None
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"an argument of the loss function is or holds a {type(leaf).__name__}, which is neither an array nor a "
            "tree of arrays, and cannot be compiled in: give the arrays in it"
        ) from None
    return Role.STATIC, leaf


_NOT_LEAVES = {tuple, list, dict, int, float, bool, str, type(None), np.ndarray}


def _is_leaf(x: Any) -> bool:
    # Asked for each node of the arguments in each step, and what most of them are is known by their type alone.
    return type(x) not in _NOT_LEAVES and (isinstance(x, Parameter) or is_nnx(x))


def _check_divides(arguments: Any, roles: Sequence[Leaf], parts: int, before: int) -> None:
    """Raise where an array among the arguments, ``before`` which the model comes, cannot be divided into such parts."""
    leaves = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=_is_leaf)[0]
    for (path, leaf), (role, _) in zip(leaves, roles, strict=True):
        if role is Role.TRACED and np.ndim(leaf) and np.shape(leaf)[0] % parts:
            by_name, first, *rest = path
            name = (
                dotted((first, *rest))
                if by_name.idx
                else f"args[{first.idx - before}]{jax.tree_util.keystr(tuple(rest))}"
            )
            raise ValueError(
                f"{name} of the loss function has the shape {tuple(np.shape(leaf))}, whose first axis cannot be "
                f"divided into {parts} micro-batches: an array that is not a batch belongs to the model"
            )


def _structure(modules: Sequence[Any]) -> Any:
    """What the split of modules depends on, cheaper than splitting them; ``None`` where only splitting can tell."""
    if not modules:
        return ()
    leaves, treedef = jax.tree.flatten(modules, is_leaf=lambda x: isinstance(x, nnx().Variable))
    if not all(isinstance(leaf, nnx().Variable) for leaf in leaves):
        return None
    return treedef, list(map(id, leaves)), [jax.tree.structure(leaf) for leaf in leaves]


class _Parts:
    """What a call is taken apart into, collected leaf by leaf."""

    def __init__(self, wanted: Sequence[Parameter]):
        self._wanted = {id(_identity(parameter)): parameter for parameter in wanted}
        self._found: dict[int, int] = {}  # the index of each parameter, by what it is bound to
        self._parameters: list[Parameter] = []
        self._variables: list[Any] = []
        self._sources: list[Any] = []
        self._traced = 0

    def of_call(
        self, treedef: Any, roles: Sequence[Leaf], modules: Sequence[Any], has_aux: bool, micro_batches: int
    ) -> LossCall:
        """The call whose arguments have these leaves, and these modules among them."""
        leaves: list[Leaf] = []
        seen = 0  # modules
        for position, (role, what) in enumerate(roles):
            if role is Role.MODULE:
                leaves.append((role, seen))
                seen += 1
            elif role is Role.STATIC:
                leaves.append((role, what))
            elif what in self._wanted:
                leaves.append(self._differentiated(what))
            else:  # a parameter that is not differentiated is the same in each micro-batch
                leaves += self._trace(position, role=Role.CONSTANT if role is Role.PARAMETER else role)
        graphdef, state_treedef, state_leaves = self._of_modules(modules) if modules else (None, None, [])
        types = tuple(type(what) for role, what in leaves if role is Role.STATIC)
        structure = interned(
            CallStructure, treedef, tuple(leaves), graphdef, state_treedef, tuple(state_leaves), types, has_aux,
            micro_batches,
        )  # fmt: skip
        return LossCall(structure, self._parameters, self._variables, self._sources)

    def _of_modules(self, modules: Sequence[Any]) -> tuple[Any, Any, list[Leaf]]:
        graphdef, state = nnx().split(modules)
        leaves: list[Leaf] = []
        for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx().Variable)):
            if id(variable) in self._wanted:
                leaves.append(self._differentiated(id(variable)))
            elif isinstance(variable, nnx().Variable):
                self._variables.append(variable)
                leaves += self._trace(variable, len(jax.tree.leaves(variable.get_value())))
            else:
                leaves += self._trace(variable, role=Role.CONSTANT)
        return graphdef, jax.tree.structure(state), leaves

    def _differentiated(self, key: int) -> Leaf:
        if key not in self._found:
            self._found[key] = len(self._parameters)
            self._parameters.append(self._wanted[key])
        return Role.DIFFERENTIATED, self._found[key]

    def _trace(self, source: Any, count: int = 1, role: Role = Role.TRACED) -> list[Leaf]:
        """The leaves of a source with so many arrays."""
        self._sources.append(source)
        first, self._traced = self._traced, self._traced + count
        return [(role, index) for index in range(first, self._traced)]


def _identity(parameter: Parameter) -> Any:
    return parameter.variable if isinstance(parameter, VariableParameter) else parameter
