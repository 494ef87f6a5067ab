"""Differentiate a loss function with respect to parameters, in one compiled program.

A call ``loss_fn(*arguments)`` is cut into what is differentiated (the boxes' arrays), what is only traced (other
arrays and numbers, other variables of ``flax.nnx`` modules) and what is static (functions, strings, the structure of
modules). A module that the loss changes, its batch statistics or random state, is written back afterwards. So is what
the loss writes into a parameter, as ``nnx.SpectralNorm`` does: the gradient is that at the value before, the update is
applied to the value after.
"""

import functools
import inspect
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.containers import own_memory
from optimjax._core.foreign import from_tensor, is_nnx, nnx
from optimjax._core.tree import dotted
from optimjax._engine.bucket import Updates, update_each
from optimjax._engine.handover import Program
from optimjax._engine.interned import interned
from optimjax._params.parameter import Parameter, value_of
from optimjax._params.variable import VariableParameter
from optimjax._storage.placement import pin, pinned

__all__ = [
    "Capture",
    "Cut",
    "LossCall",
    "LossFunction",
    "LossFunctions",
    "takes_no_arguments",
    "update_from_loss",
    "value_and_grad",
]

REMADE = 8  # copies of one loss function, after which a warning comes
HELD = 64  # loss functions that compare by value, which an optimizer keeps

Role = tuple[str, Any]


@dataclass(frozen=True, eq=False)
class Cut:
    """The static description of a call: from it and the arrays, a compiled function puts the arguments together.

    Equal ones are one object, see :func:`optimjax._engine.interned.interned`.
    """

    treedef: Any  # of the arguments, with modules and boxes as leaves
    leaves: tuple[Role, ...]  # for each leaf its role and index ("static": the leaf itself; "node": a module)
    graphdef: Any  # of all modules among the arguments together, so that what they share stays shared
    state_treedef: Any
    state_roles: tuple[Role, ...]  # for each array of the modules
    types: tuple[type, ...]  # of the static leaves, because 1 == True == 1.0
    pins: tuple[Any, ...] = ()  # where the modules' arrays must stay, see :func:`optimjax._storage.placement.pin`

    def pinned(self, pins: tuple[Any, ...]) -> "Cut":
        """The same with these pins."""
        return interned(Cut, *[getattr(self, name.name) for name in fields(self)[:-1]], pins)

    def arguments(self, differentiated: Sequence[Array], traced: Sequence[Array]) -> tuple[tuple[Any, ...], Any]:
        """The arguments made of these arrays, and the modules among them."""
        pick = {"differentiated": differentiated.__getitem__, "traced": traced.__getitem__}
        pick["constant"] = pick["traced"]
        nodes = None
        if self.graphdef is not None:
            values = [pick[role](index) for role, index in self.state_roles]
            nodes = nnx().merge(self.graphdef, self.state_treedef.unflatten(values))
            pick["node"] = nodes.__getitem__
        leaves = [what if role == "static" else pick[role](what) for role, what in self.leaves]
        return self.treedef.unflatten(leaves), nodes

    def after(
        self, nodes: Any, differentiated: Sequence[Array], traced: Sequence[Array]
    ) -> tuple[dict[int, Array], list[Array]]:
        """The arrays of the modules after the call: those of parameters, by index, and of other variables."""
        if nodes is None:
            return {}, []
        paths, treedef = jax.tree_util.tree_flatten_with_path(nnx().split(nodes)[1])
        if treedef != self.state_treedef:
            raise ValueError(
                "the loss function added, removed or reshaped variables of a module (for example with sow); do that "
                "outside of it, or return what you need as auxiliary output"
            )
        roles = [(path, leaf, *role) for (path, leaf), role in zip(paths, self.state_roles, strict=True)]
        if any(role == "constant" and leaf is not traced[index] for _, leaf, role, index in roles):
            raise ValueError(
                "the loss function assigned to an array of a module that is in no nnx.Variable: wrap it in one"
            )
        params = {
            index: _left(path, leaf, differentiated[index])
            for path, leaf, role, index in roles
            if role == "differentiated"
        }
        changed = [leaf for _, leaf, role, _ in roles if role == "traced"]
        return params, pinned(changed, list(self.pins) or [None] * len(changed))


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
    """A call of a loss function, cut."""

    cut: Cut
    boxes: list[Parameter]  # those found among the arguments, in the order of `differentiated`
    variables: list[Any]  # those whose arrays may change, in the order in which `Cut.after` has them
    origins: list[Any]  # of each traced array: the position of a leaf, or a variable, or the array
    differentiated: list[Array] = field(default_factory=list)
    traced: list[Any] = field(default_factory=list)

    def filled(self, leaves: Sequence[Any]) -> "LossCall":
        """With the present arrays; ``leaves`` are those of the arguments.

        It is another call, because this one is remembered and must not hold batches, or parameters that are replaced.
        """
        traced = []
        for origin in self.origins:
            if isinstance(origin, int):
                # The program may read memory of NumPy after the step has returned, when it is filled with other data.
                traced.append(own_memory(from_tensor(value_of(leaves[origin]))))
            elif isinstance(origin, jax.Array):
                traced.append(origin)
            else:
                traced.extend(jax.tree.leaves(origin.get_value()))
        values = [box.value for box in self.boxes]
        call = LossCall(self.cut, self.boxes, self.variables, self.origins, values, traced)
        if jax.device_count() > 1:
            pins = tuple(pin(traced[index]) for role, index in self.cut.state_roles if role == "traced")
            if pins != self.cut.pins:
                call.cut = self.cut = self.cut.pinned(pins)
        return call

    def write_back(self, changed: Sequence[Array], written: Mapping[int, Array] = {}) -> None:
        """Write what the call changed into the modules, and into parameters."""
        for index, value in written.items():
            self.boxes[index]._write(value)
        values = iter(changed)
        for variable in self.variables:
            leaves, treedef = jax.tree.flatten(variable.get_value())
            variable.set_value(treedef.unflatten([next(values) for _ in leaves]))


class LossFunction:
    """A loss function with the programs that it is compiled into.

    They refer to it weakly. So what it closes over is freed as soon as the user drops it, compiled constants included.
    """

    def __init__(self, function: Callable[..., Any]):
        try:
            self.function: Callable[[], Any] = weakref.ref(function)
        except TypeError:  # an object with slots
            self.function = lambda: function
        self._programs: dict[Any, Program] = {}
        self._accepts: set[tuple[int, bool]] = set()

    def program(self, function: Callable[..., Any], static: int) -> Program:
        """The program of ``function(loss_fn, *args)``, the first ``static`` of whose arguments are compiled in."""
        if function not in self._programs:
            loss_fn = self.function

            def bound(*args: Any) -> Any:
                return function(loss_fn(), *args)

            bound.__name__ = function.__name__
            self._programs[function] = Program(bound, static)
        return self._programs[function]

    def check(self, count: int, given_first: bool) -> None:
        """Whether it takes so many arguments, before JAX's tracebacks are around the error.

        Raises:
          TypeError: it takes others.
        """
        if (count, given_first) in self._accepts:  # looking at a signature is slow
            return
        function = self.function()
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError as error:
            name = getattr(function, "__name__", "loss_fn")
            first = "optimizer.params, " * given_first
            advice = (
                "the optimizer passes the model or the tree that it was made from, so leave it out"
                if given_first
                else "an optimizer made from parameters of a module passes nothing, so give the module"
            )
            if given_first and takes_no_arguments(function):
                advice = f"it must take what the optimizer was made from, as in def {name}(model)"
            raise TypeError(
                f"{name} is called as {name}({first}*args) and cannot be: {error}; {advice}. "
                "Arguments are passed by position"
            ) from None
        except ValueError:  # some functions have no signature
            pass
        self._accepts.add((count, given_first))


_known: "weakref.WeakKeyDictionary[Any, LossFunction]" = weakref.WeakKeyDictionary()  # shared by all optimizers


class LossFunctions:
    """The loss functions that an optimizer has been given.

    Those that compare by value, such as bound methods, may come as another object each time: they are kept here.
    """

    def __init__(self) -> None:
        self._held: dict[Any, LossFunction] = {}
        self._copies: Counter[Any] = Counter()  # by code

    def __call__(self, function: Callable[..., Any]) -> LossFunction:
        """The loss function of this callable.

        Raises:
          TypeError: it cannot be called, or has no hash.
        """
        if not callable(function):
            raise TypeError(f"loss_fn must be callable, got {type(function).__name__}: {function!r}")
        found = self.find(function)
        if found is None:
            try:
                hash(function)
            except TypeError as error:
                raise TypeError(
                    "what is compiled for a loss function is remembered by its hash, and this "
                    f"{type(function).__name__} has none ({error}): give a plain function, and what it reads among args"
                ) from None
            found = LossFunction(function)
            if isinstance(found.function, weakref.ref):
                _known[function] = found
            self._hold(function, found)
            self._warn_of_copies(function)
        return found

    def find(self, function: Any) -> LossFunction | None:
        """The same, if some optimizer has been given it before."""
        try:
            found = _known.get(function)
        except TypeError:  # no weak references, or no hash
            try:
                return self._held.get(function)
            except TypeError:
                return None
        if found is not None:
            self._hold(function, found)
        return found

    def _hold(self, function: Any, found: LossFunction) -> None:
        by_value = type(function).__eq__ is not object.__eq__ or not isinstance(found.function, weakref.ref)
        if by_value and function not in self._held:
            self._held[found.function()] = found
            if len(self._held) > HELD:
                del self._held[next(iter(self._held))]

    def _warn_of_copies(self, function: Any) -> None:
        while isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__wrapped__", function)  # of a jitted one
        code = getattr(function, "__code__", None)
        self._copies[code] += code is not None
        if self._copies[code] == REMADE:
            warnings.warn(
                f"{REMADE} copies of the loss function {getattr(function, '__name__', '')!r} have been given, and each "
                "is compiled by itself and kept, with what it closes over, as long as anyone holds it: define the "
                "function once, outside of the loop, and give it as arguments what changes",
                stacklevel=5,
            )

    def __reduce__(self) -> Any:
        return LossFunctions, ()


def takes_no_arguments(function: Callable[..., Any]) -> bool:
    """Whether a callable can be called without arguments, and not with one."""
    try:
        signature = inspect.signature(function)
        signature.bind()
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False


class Capture:
    """Cuts the arguments of loss functions; splits a module once, and again only when it has changed."""

    def __init__(self) -> None:
        self._key: Any = None
        self._call: Any = None

    def __call__(self, arguments: tuple[Any, ...], boxes: Sequence[Parameter], given_first: bool = False) -> LossCall:
        """Cut; ``boxes`` are to be differentiated where they occur, unless they have ``requires_grad=False``.

        Where the first argument is what the optimizer was made from (``given_first``), its plain numbers are static:
        they describe the model (the size of a window, the rate of a dropout) and never change.
        """
        leaves, treedef = jax.tree.flatten(arguments, is_leaf=lambda x: isinstance(x, Parameter) or is_nnx(x))
        fixed = treedef.children()[0].num_leaves if given_first else 0
        kinds = [_kind(leaf, position < fixed) for position, leaf in enumerate(leaves)]
        nodes = [leaf for leaf, (role, _) in zip(leaves, kinds, strict=True) if role == "node"]
        types = [type(what) for role, what in kinds if role == "static"]
        key = (treedef, kinds, types, [id(box) for box in boxes if box.requires_grad], _structure(nodes))
        if self._key is None or key[-1] is None or key != self._key:
            self._key = None  # for an interrupt between the two
            self._call = _cut(leaves, treedef, kinds, nodes, [box for box in boxes if box.requires_grad])
            self._key = key
        return self._call.filled(leaves)

    def __reduce__(self) -> Any:
        return Capture, ()  # what is remembered goes by identity


def _kind(leaf: Any, fixed: bool) -> Role:
    """A leaf's role before it is known which boxes are wanted, and what a remembered cut depends on."""
    if isinstance(leaf, Parameter):
        return "box", id(_identity(leaf))
    if is_nnx(leaf):
        return "node", None
    number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool) and not fixed
    if number or isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or hasattr(leaf, "detach"):
        return "traced", None
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"an argument of the loss function is or holds a {type(leaf).__name__}, which is neither an array nor a "
            "tree of arrays, and cannot be compiled in: give the arrays in it"
        ) from None
    return "static", leaf


def _structure(nodes: Sequence[Any]) -> Any:
    """What the split of modules depends on, cheaper than splitting them; ``None`` where only splitting can tell."""
    if not nodes:
        return ()
    leaves, treedef = jax.tree.flatten(nodes, is_leaf=lambda x: isinstance(x, nnx().Variable))
    if not all(isinstance(leaf, nnx().Variable) for leaf in leaves):
        return None
    return treedef, list(map(id, leaves)), [jax.tree.structure(leaf) for leaf in leaves]


def _cut(leaves: list[Any], treedef: Any, kinds: list[Role], nodes: list[Any], boxes: list[Parameter]) -> LossCall:
    wanted = {id(_identity(box)): box for box in boxes}
    found: dict[int, int] = {}  # boxes by what they are bound to
    call = LossCall(None, [], [], [])  # pyright: ignore[reportArgumentType]
    count = itertools.count()

    def differentiate(key: int) -> Role:
        if key not in found:
            found[key] = len(call.boxes)
            call.boxes.append(wanted[key])
        return "differentiated", found[key]

    roles: list[Role] = []
    positions = itertools.count()
    for position, (kind, what) in enumerate(kinds):
        if kind == "box" and what in wanted:
            roles.append(differentiate(what))
        elif kind in ("box", "traced"):
            call.origins.append(position)
            roles.append(("traced", next(count)))
        else:
            roles.append((kind, next(positions) if kind == "node" else what))

    graphdef = state_treedef = None
    state_roles: list[Role] = []
    if nodes:
        graphdef, state = nnx().split(nodes)
        state_treedef = jax.tree.structure(state)
        for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx().Variable)):
            if id(variable) in wanted:
                state_roles.append(differentiate(id(variable)))
                continue
            call.origins.append(variable)
            if isinstance(variable, nnx().Variable):
                call.variables.append(variable)
                state_roles += [("traced", next(count)) for _ in jax.tree.leaves(variable.get_value())]
            else:
                state_roles.append(("constant", next(count)))
    types = tuple(type(what) for role, what in roles if role == "static")
    call.cut = interned(Cut, treedef, tuple(roles), graphdef, state_treedef, tuple(state_roles), types)
    return call


def _identity(box: Parameter) -> Any:
    return box.variable if isinstance(box, VariableParameter) else box


def _evaluate(loss_fn: Callable[..., Any], cut: Cut, has_aux: bool, differentiated: Any, traced: Any) -> Any:
    def compute(differentiated: Any) -> Any:
        arguments, nodes = cut.arguments(differentiated, traced)
        result = loss_fn(*arguments)
        count = len(result) if isinstance(result, (tuple, list)) else 1
        if has_aux and count != 2:
            raise TypeError(f"with has_aux=True the loss function must return (loss, aux), two results, got {count}")
        loss, aux = result if has_aux else (result, None)
        if not hasattr(loss, "dtype") and not isinstance(loss, (int, float)):
            raise TypeError(
                f"the loss function must return a scalar, got a {type(loss).__name__}; what else it returns "
                "is for backward(..., has_aux=True)"
            )
        # Within a derivative, what depends on a parameter is a tracer of the same kind.
        if not isinstance(loss, type(differentiated[0])):
            raise RuntimeError(
                "the loss depends on none of the parameters, so nothing would be trained: compute it from what the "
                "function is given, not from a model or arrays outside of it"
            )
        return loss, (aux, *cut.after(nodes, differentiated, traced))

    (loss, (aux, params, changed)), grads = jax.value_and_grad(compute, has_aux=True)(differentiated)
    # Compared out here, for inside of a derivative an array that went through nnx.jit is another tracer.
    written = {index: value for index, value in params.items() if value is not differentiated[index]}
    return loss, aux, changed, written, grads


def value_and_grad(
    loss_fn: Callable[..., Any], cut: Cut, has_aux: bool, differentiated: Any, traced: Any, accumulated: Any
) -> Any:
    """``(loss, aux, changed, written, gradients)``: see :meth:`LossCall.write_back`.

    The gradients are added to those accumulated so far (``None``: none yet). ``written`` has those parameters only that
    the loss writes into, which tracing tells: where there are none, it costs nothing.
    """
    loss, aux, changed, written, grads = _evaluate(loss_fn, cut, has_aux, differentiated, traced)
    with jax.numpy_dtype_promotion("standard"):  # a gradient that the user has set may be of another precision
        total = [grad if old is None else old + grad for grad, old in zip(grads, accumulated, strict=True)]
    return loss, aux, changed, written, total


def update_from_loss(
    loss_fn: Callable[..., Any], cut: Cut, updates: Updates, slots: Any, differentiated: Any, traced: Any, rows: Any
) -> Any:
    """Value, gradient and update in one program: ``(slots, parameters, loss, changed)``, as :func:`update_each`."""
    loss, _, changed, written, grads = _evaluate(loss_fn, cut, False, differentiated, traced)
    params = [written.get(index, param) for index, param in enumerate(differentiated)]
    return *update_each(updates, slots, params, grads, rows), loss, changed
