"""An algorithm as pure functions over pytrees: ``init(params) -> state``, ``update(params, grads, state)``.

Hyperparameters may be numbers, arrays, tracers, schedules or trees of these; here they are resolved for each leaf.
"""

import dataclasses
import inspect
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.apply import apply_each
from optimjax._core.definition import UNBOUND, Definition
from optimjax._core.guard import UNGUARDED, Guard, Limits, counted, unless_skipped
from optimjax._core.hyperparameters import Hyperparameters, Numeric
from optimjax._core.states import COUNTS, slots_of, state_class
from optimjax._core.tree import check_gradient, copied_array, flatten_params, match, names
from optimjax._storage.placement import place, sharding_of

__all__ = [
    "Algorithm",
    "Params",
    "State",
    "arguments_of",
    "check_order",
    "check_overrides",
    "factory",
    "function_name",
    "spread",
]

P = ParamSpec("P")
Params = TypeVar("Params", bound=chex.ArrayTree)
State = TypeVar("State")


@dataclass(frozen=True, eq=False, repr=False)
class Algorithm:
    """A pure optimizer: two functions, to be used under ``jit``, ``scan``, ``vmap``, ``grad`` or as they are.

    Made by the functions of :mod:`optimjax.functional`. Two that were made alike are equal, so that one can be a static
    argument of a compiled function; values that are arrays or schedules are equal only where they are the same object.

    Attributes:
      definition: the rule, and the kinds of its hyperparameters.
      values: the hyperparameters by name, each for all parameters or a tree.
      guard: the options that hold a step back, ``max_grad_norm`` and ``skip_nonfinite``.

    >>> import jax, jax.numpy as jnp
    >>> from optimjax import functional as F
    >>> adam = F.adam(lr=lambda count: 0.1 / (1 + count))
    >>> params = {"w": jnp.array(1.0)}
    >>> state = adam.init(params)
    >>> params, state = jax.jit(adam.update)(params, {"w": jnp.array(2.0)}, state)
    >>> print(f"{params['w']:.4f} {state.exp_avg['w']:.4f}")
    0.9000 0.2000
    >>> F.adam(lr=0.1), F.adam(lr=0.1) == F.adam(lr=0.1)
    (adam(lr=0.1), True)
    """

    definition: Definition
    values: Mapping[str, Any]
    guard: Guard = UNGUARDED

    def __post_init__(self) -> None:
        for key, value in self.values.items():
            _check(self.hyperparameters, key, value)
        self._check_together({})

    @property
    def name(self) -> str:
        """The name of the class that the algorithm is the functional form of."""
        return self.definition.name

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The kinds of the hyperparameters."""
        return self.definition.hyperparameters

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """``init, update = F.adam()``."""
        return iter((self.init, self.update))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Algorithm) or self.definition is not other.definition:
            return NotImplemented
        return _is_same(dict(self.values), dict(other.values)) and _is_same(
            dict(self.guard.given), dict(other.guard.given)
        )

    def __hash__(self) -> int:
        return hash((self.definition, *(value for value in self.values.values() if isinstance(value, _PLAIN))))

    def __repr__(self) -> str:
        """The call that makes it, with what differs from the defaults."""
        try:
            usual = self.definition.defaults()
        except TypeError:  # some have no default
            usual = {}
        given = (
            f"{name}={_short.repr(value)}"
            for name, value in self.values.items()
            if name not in usual or not _is_same(value, usual[name])
        )
        given = [*given, *(f"{name}={_short.repr(value)}" for name, value in self.guard.given.items())]
        return f"{function_name(self.name)}({', '.join(given)})"

    def init(self, params: chex.ArrayTree) -> Any:
        """The state before the first update.

        Args:
          params: any pytree of real or complex floating arrays.

        Returns:
          A NamedTuple: ``step``, an int32 scalar that counts updates, with ``skip_nonfinite`` also ``skipped``, which
          counts the others, then one tree with the structure of ``params`` for each array that the algorithm keeps,
          under PyTorch's names.

        Raises:
          TypeError: a leaf is not a floating number.
          ValueError, RuntimeError: a parameter that the algorithm cannot take, or a hyperparameter out of range.
        """
        leaves, treedef = flatten_params(params)
        columns = _columns(self.hyperparameters, self.values, params)
        flags = self._check_together(columns)
        for index, leaf in enumerate(leaves):
            self.definition.check_param(leaf, flags, lambda index=index: _leaf_name(params, index))
        step = jax.device_put(np.zeros((), np.int32))  # by no program
        # On the mesh, if there is one: otherwise the second update would compile again.
        step = next((place(step, leaf) for leaf in leaves if sharding_of(leaf) is not None), step)
        hypers = _per_leaf(self.hyperparameters, self.values, columns, step, len(leaves))
        slots = self.definition.slots(leaves, hypers, [flags] * len(leaves))
        return self._packed(self._state_type(leaves, flags), self.first_counts(step), treedef, slots)

    def first_counts(self, step: Array) -> tuple[Array, ...]:
        """The first fields of a state before the first update."""
        return (step, copied_array(step)) if self.guard.skip_nonfinite else (step,)

    def update(self, params: Params, grads: Any, state: State, **overrides: Any) -> tuple[Params, State]:
        """One update of every parameter.

        Args:
          params: the parameters.
          grads: their gradients, in the same structure; ``None`` in place of one leaves that parameter and its slots as
            they are. With ``max_grad_norm`` all together are scaled down to that norm; with ``skip_nonfinite`` nothing
            changes where one is infinite or NaN, except that the state counts it as ``skipped``.
          state: what :meth:`init` or the last update has returned.
          overrides: numeric hyperparameters for this call.

        Returns:
          New parameters and state, of the structure, shapes, dtypes and shardings of the old ones.

        Raises:
          ValueError: gradients of another structure or shape; an override out of range.
          TypeError: gradients of another kind, another algorithm's state, an unknown override.
          RuntimeError: a gradient is sparse and the algorithm takes dense ones, or the other way round.
        """
        return self.advanced(params, grads, state, overrides)

    def advanced(
        self, params: Params, grads: Any, state: State, overrides: Mapping[str, Any], limits: Limits | None = None
    ) -> tuple[Params, State]:
        """The same; the limits of the step are known where other parameters share them."""
        rule, known = self.definition.arithmetic, cast(Any, state)
        leaves, treedef = flatten_params(params)
        check_overrides(self.hyperparameters, overrides)
        values = {**self.values, **overrides}
        columns = _columns(self.hyperparameters, values, params)
        flags = self._flags(values, columns)
        state_type = self._state_type(leaves, flags)
        if overrides and state_type is not self._state_type(leaves, self._own_flags(params)):
            raise ValueError(f"{overrides} would change which arrays the state has; set it where {self.name} is made")
        check_order(grads, state_type)
        grad_leaves = match(treedef, grads, lambda: names(params))
        slots = self._unpacked(state_type, treedef, known)
        present = [index for index, grad in enumerate(grad_leaves) if grad is not None]
        for index in present:
            leaf_name = lambda index=index: _leaf_name(params, index)  # noqa: E731
            check_gradient(leaf_name, leaves[index], grad_leaves[index])
            self.definition.check_layout(grad_leaves[index], leaf_name)
        limits = self.guard.limits([grad_leaves[index] for index in present]) if limits is None else limits
        step = jnp.asarray(known.step) + 1
        count = step.astype(jnp.result_type(float))  # the rest of the numbers that scalars meet are floating ones, too
        hypers = _per_leaf(self.hyperparameters, values, columns, known.step, len(leaves))
        scalars = {id(hyper): rule.scalars(count, hyper) for hyper in {id(h): h for h in hypers}.values()}
        updated = apply_each(
            rule,
            [flags] * len(present),
            [leaves[index] for index in present],
            limits.clipped([grad_leaves[index] for index in present]),
            [slots[index] for index in present],
            [scalars[id(hypers[index])] for index in present],
            limits.counts,
        )
        for index, (param, slot) in zip(present, updated, strict=True):
            leaves[index], slots[index] = param, slot
        return treedef.unflatten(leaves), self._packed(state_type, self._counted(known, limits), treedef, slots)

    def _counted(self, state: Any, limits: Limits) -> tuple[Array, ...]:
        """The first fields of a state after an update."""
        step = jnp.asarray(state.step)
        step = unless_skipped(limits.counts, step + 1, step)
        return (step, counted(state.skipped, limits.counts)) if self.guard.skip_nonfinite else (step,)

    def _check_together(self, columns: Mapping[str, list[Any]]) -> Any:
        """The flags, or the error for a combination of values that makes no sense."""
        flags = self._flags(self.values, columns)
        if self.definition.arithmetic.check is not None:
            self.definition.arithmetic.check(self.hyperparameters.hyper(self.values), flags)
        return flags

    def _flags(self, values: Mapping[str, Any], columns: Mapping[str, list[Any]]) -> Any:
        """The flags for values of which the columns are known."""
        return self.hyperparameters.fixed_flags(values, columns)

    def _own_flags(self, params: Any) -> Any:
        """The flags without overrides."""
        return self._flags(self.values, _columns(self.hyperparameters, self.values, params))

    def _state_type(self, leaves: Sequence[Array], flags: Any) -> Any:
        """The NamedTuple of the state: a field for each slot that some of the parameters has."""
        kinds = {(leaf.shape, leaf.dtype) for leaf in leaves}
        some = {field for kind in kinds for field in self.definition.fields(flags, *kind)}
        return self._state_class(tuple(field for field in self.definition.slot_names if field in some))

    def _state_class(self, fields: tuple[str, ...]) -> Any:
        return state_class(self.name, COUNTS[1:] + fields if self.guard.skip_nonfinite else fields)

    def _packed(self, state_type: Any, counts: tuple[Array, ...], treedef: Any, slots: Sequence[Any]) -> Any:
        """The state."""
        columns = ([getattr(slot, field) for slot in slots] for field in slots_of(state_type))
        return state_type(*counts, *map(treedef.unflatten, columns))

    def _unpacked(self, state_type: Any, treedef: Any, state: Any) -> list[Any]:
        """The slots of each parameter."""
        if not isinstance(state, state_type):
            plain = type(state) in (tuple, list) and len(state) == len(state_type._fields)
            raise TypeError(
                f"state must be the {state_type.__name__}{state_type._fields} that this algorithm's init returns, got "
                f"{type(state).__name__}{getattr(state, '_fields', '')}"
                + plain
                * "; one that was loaded as plain data becomes it by type(algorithm.init(params))(*state)"
            )
        columns = {field: treedef.flatten_up_to(getattr(state, field)) for field in slots_of(state_type)}
        absent = dict.fromkeys(self.definition.slot_names)
        return [
            self.definition.arithmetic.slots(**absent | {field: column[index] for field, column in columns.items()})
            for index in range(treedef.num_leaves)
        ]


_short = reprlib.Repr()  # because values may be trees
_short.maxother = _short.maxstring = 120
_PLAIN = (bool, int, float, str)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal; arrays and schedules are only where they are the same one."""
    if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
        return all(map(_is_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return all(_is_same(value, b[key]) for key, value in a.items())
    return a is b or (isinstance(a, (*_PLAIN, Algorithm)) and isinstance(b, (*_PLAIN, Algorithm)) and a == b)


def function_name(class_name: str) -> str:
    """The name of the functional form: words are divided where a capital begins one (sparse_adam, but adamw)."""
    return re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", class_name).lower()


def factory(cls: Callable[Concatenate[Any, P], Any]) -> Callable[P, Algorithm]:
    """The functional form of an optimizer class: the same keywords, without ``params``.

    Works for any subclass of :class:`optimjax.Optimizer` that has a ``rule``, also one written elsewhere.

    >>> import optimjax as optim
    >>> sgd = optim.functional.factory(optim.SGD)
    >>> algorithm = sgd(lr=0.1)
    """
    optimizer_class: Any = cls

    def make(*args: P.args, **kwargs: P.kwargs) -> Algorithm:
        unbound = optimizer_class(UNBOUND, *args, **kwargs)
        return dataclasses.replace(optimizer_class._algorithm(unbound.defaults), guard=unbound._guard)

    make.__name__ = make.__qualname__ = function_name(optimizer_class.__name__)
    make.__module__ = optimizer_class.__module__
    make.__doc__ = (
        f"A pure :class:`optimjax.functional.Algorithm` with the arithmetic and the keywords of "
        f":class:`{optimizer_class.__name__}`.\n\nEach number may also be an array, a tracer, a schedule "
        f"``count -> value``, or a tree of these that is a prefix of ``params``.\n{arguments_of(optimizer_class)}"
    )
    signature = inspect.signature(optimizer_class)
    make.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]
        parameters=list(signature.parameters.values())[1:], return_annotation=Algorithm
    )
    return make


def arguments_of(optimizer_class: type) -> str:
    """The section of the class's documentation that says what the hyperparameters are, for that of its function."""
    section = re.search(r"^Args:\n((?: .*\n?)+)", inspect.getdoc(optimizer_class) or "", re.MULTILINE)
    if section is None:
        return ""
    entries = re.split(r"^(?=  \S)", section[1], flags=re.MULTILINE)
    return "\nArgs:\n" + "".join(entry for entry in entries if not entry.startswith("  params:"))


def _leaf_name(params: Any, index: int) -> str:
    """The name of a parameter, for messages."""
    return names(params)[index] or "params"


def _check(hyperparameters: Hyperparameters, key: str, value: Any) -> None:
    """Check every value of a hyperparameter that may be a tree of values, as far as it is known to be one."""
    kind = hyperparameters.kinds.get(key)
    if isinstance(kind, Numeric):
        one = lambda x: kind.may_be_value(x) or (x is None and value is None)  # noqa: E731
        for leaf in jax.tree.leaves(value, is_leaf=one):
            kind.check(key, leaf)
            if leaf is not value and kind.is_fixed(leaf):
                raise ValueError(f"{key}={leaf!r} is compiled in: it must be one for all parameters, got {value!r}")
    elif kind is not None:
        kind.check(key, value)


def check_order(grads: Any, state_type: type) -> None:
    """Raise where the state stands in the place of the gradients, as it does in optax."""
    if isinstance(grads, state_type):
        raise TypeError(f"the order is update(params, grads, state), but grads is {type(grads).__name__}: a state")


def check_overrides(hyperparameters: Hyperparameters, overrides: Mapping[str, Any]) -> None:
    """Raise for a keyword of ``update`` that is not a numeric hyperparameter, or is out of range."""
    for key, value in overrides.items():
        if key not in hyperparameters.numeric:
            raise TypeError(
                f"update() got an unexpected keyword argument {key!r}: only numeric hyperparameters can be overridden, "
                f"which are {', '.join(hyperparameters.numeric)}"
            )
        _check(hyperparameters, key, value)


def _columns(hyperparameters: Hyperparameters, values: Mapping[str, Any], params: Any) -> dict[str, list[Any]]:
    """For each numeric hyperparameter its values, one for each leaf."""
    kinds: Any = hyperparameters.kinds
    return {key: spread(kinds[key], key, values[key], params) for key in hyperparameters.numeric}


def _per_leaf(
    hyperparameters: Hyperparameters,
    values: Mapping[str, Any],
    columns: Mapping[str, list[Any]],
    count: Array,
    size: int,
) -> list[Any]:
    """For each leaf its hyperparameters, schedules evaluated; leaves that agree in all share one object."""
    resolved: dict[int, Any] = {}  # by identity, so that a schedule is evaluated once
    hypers: dict[tuple[int, ...], Any] = {}
    result = []
    for row in zip(*columns.values(), strict=True) if columns else [()] * size:
        key = tuple(map(id, row))
        if key not in hypers:
            for name, value in zip(columns, row, strict=True):
                kind: Any = hyperparameters.kinds[name]
                if id(value) not in resolved:
                    resolved[id(value)] = kind.resolve(value, count)
            hypers[key] = hyperparameters.hyper(
                {**values, **{name: resolved[id(value)] for name, value in zip(columns, row, strict=True)}}
            )
        result.append(hypers[key])
    return result


def spread(kind: Numeric, key: str, value: Any, params: Any) -> list[Any]:
    """One value for each leaf of ``params``, from one for all or from a tree that is a prefix of ``params``.

    A tree that can be called, such as an Equinox module, is a tree of values where ``params`` has the same node, else a
    schedule, as ``jax.tree_util.Partial`` is.

    Raises:
      ValueError: the tree is not a prefix of ``params``; a value in a tree that can be called is out of range.
      TypeError: a value in such a tree is not a number.
    """
    values: list[Any] = []

    def visit(value: Any, params: Any, checked: bool) -> None:
        if not kind.is_value(value) and not jax.tree_util.all_leaves([value]):
            children, node = jax.tree.flatten(value, is_leaf=lambda x: x is not value)
            try:
                subtrees = node.flatten_up_to(params)
            except ValueError as error:
                if not kind.may_be_value(value):
                    message = f"{key} must be one value or a tree that is a prefix of the parameters: {error}"
                    raise ValueError(message) from None
            else:
                for child, subtree in zip(children, subtrees, strict=True):
                    visit(child, subtree, checked and not callable(value))
                return
        if not checked:
            kind.check(key, value)
        values.extend([value] * jax.tree.structure(params).num_leaves)

    visit(value, params, checked=True)
    return values
