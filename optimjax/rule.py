"""The contract between an algorithm and everything else.

An algorithm is a :class:`Rule`: four functions for **one** parameter. What its hyperparameters may be is written
once, in the signature of the class a user calls: the annotation of an argument says its kind and range, the default
is the default.

This module holds the rule, the kinds of hyperparameters, and :func:`apply`, the only place where a rule's arithmetic
is called: precision, complex numbers, ``maximize`` and the storage of slots are settled there for all algorithms.
"""

import functools
import inspect
import math
import typing
from collections import defaultdict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax.numerics import at_least_float32
from optimjax.placement import automatic, explicit, place, resharded
from optimjax.sparse import Entries, is_sparse

__all__ = [
    "Beta",
    "Betas",
    "BetasAlike",
    "Capturable",
    "Decay",
    "Differentiable",
    "Epsilon",
    "Flag",
    "Foreach",
    "Fused",
    "Hyperparameters",
    "Ignored",
    "LearningRate",
    "NonNegative",
    "Number",
    "Numeric",
    "Pair",
    "Rule",
    "Share",
    "Skippable",
    "Structural",
    "Switch",
    "apply",
    "apply_each",
    "initial_slots",
    "slot_types",
]


Takes = Literal["element", "array", "alike", "all"]


@dataclass(frozen=True, eq=False)
class Rule:
    """The arithmetic of one algorithm for one parameter.

    Attributes:
      slots: a NamedTuple type, one field for each array kept for a parameter, named as in PyTorch's state dict, of any
        shape and dtype; a field may also be a tuple of arrays. Fields that the flags, or the parameter's shape, leave
        out are ``None``.
      init: ``init(param, hyper, flags) -> slots``. ``hyper`` holds the resolved hyperparameters by name, ``flags`` the
        structural ones, and for each :data:`Switch` whether it is on.
      scalars: ``scalars(step, hyper) -> NamedTuple`` of numbers: all that depends only on the count and the
        hyperparameters. ``step`` is 1 at the first update. Plain arithmetic: it runs in double precision on Python
        numbers (the facade) and on traced arrays (the functional core) alike.
      update: ``update(param, grad, slots, scalars, flags) -> (param, slots)``, of the shapes that came in. Parameter
        and gradient are real arrays of one shape and one dtype, float32 or wider. Slots that are floating arrays, and
        the scalars, have that dtype, too; integer slots (counts, codes) have their own. ``flags.param_dtype`` is the
        dtype that the parameter is stored in.
      check: ``check(hyper, flags)`` raises ``ValueError`` for a combination of values that makes no sense.
      check_param: ``check_param(param, flags)`` raises PyTorch's error for a parameter that the algorithm cannot take.
      counts_steps: whether PyTorch's state has ``step``. Where it has not, ``scalars`` may only tell the first update
        (1) from the later ones (2), which the facade knows by whether the slots exist.
      eager: whether PyTorch makes the state in the constructor, not at the first gradient.
      takes: how much ``update`` must see at once.

        - ``"element"``: each element of the results depends on that element of the parameter, the gradient and the
          slots alone. Only such a rule takes complex parameters, which are updated as two real halves, and sparse
          gradients.
        - ``"array"``: the whole array, for a norm or for factors along its axes.
        - ``"alike"``: lists of the parameters, gradients, slots and scalars of parameters of one shape, dtype and
          flags, for matrix products of all of them at once; it returns two lists. The class divides long lists, so
          results must not depend on which parameters are in one.
        - ``"all"``: lists of all parameters that have a gradient, whatever their shapes and dtypes, for a number that
          depends on all of them. Each has a dtype of its own; ``flags`` is a list, too.
      sparse: whether gradients are sparse (``jax.experimental.sparse.BCOO``). ``update`` then gets only the entries
        that the gradient names, of parameter, gradient and the slots of their shape, and its arithmetic is that of a
        dense one.

    Raises:
      ValueError: another ``takes``, or sparse gradients for a rule that is not elementwise.
    """

    slots: Any  # a NamedTuple class; typing has no name for "any NamedTuple class"
    init: Callable[..., Any]
    scalars: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]
    check: Callable[[Any, Any], None] | None = None
    check_param: Callable[[Array, Any], None] | None = None
    counts_steps: bool = True
    eager: bool = False
    takes: Takes = "element"
    sparse: bool = False

    def __post_init__(self) -> None:
        legal = typing.get_args(Takes)
        if self.takes not in legal:
            raise ValueError(f"takes must be one of {', '.join(map(repr, legal))}, got {self.takes!r}")
        if self.sparse and self.takes != "element":
            raise ValueError(f"a rule for sparse gradients must have takes='element', got {self.takes!r}")


# --- Kinds of hyperparameters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numeric:
    """A number that enters the arithmetic. Giving it another value never recompiles.

    Attributes:
      minimum: smallest legal value, inclusive.
      above: the value must be larger than this.
      maximum: largest legal value, inclusive.
      below: the value must be smaller than this.
      message: PyTorch's for a value out of range; it may contain ``{name}``, ``{value}`` and, for a number of a tuple,
        ``{values}``, which is the tuple.
      items: for a tuple, the kind of each of its numbers.
      optional: in a tuple, ``None`` may stand in place of the number.
      alike: the facade, as PyTorch's Adam, takes a tuple of numbers or one of arrays, none of both.
      switch: a plain zero leaves a part of the algorithm out, with its slots (``momentum=0`` keeps no buffer).
      skip: a plain zero leaves arithmetic out in the functional core. The facade keeps it, for its groups may be
        edited at any time and that must not recompile.
    """

    minimum: float = -math.inf
    above: float = -math.inf
    maximum: float = math.inf
    below: float = math.inf
    message: str = "Invalid {name} value: {value}"
    items: "tuple[Numeric, ...]" = ()
    optional: bool = False
    alike: bool = False
    switch: bool = False
    skip: bool = False

    def is_value(self, value: Any) -> bool:
        """Whether this is one value for all parameters, not a tree of values.

        A function is one, a schedule. A tree that can be called may be a schedule or a tree of values; which of them is
        known where the parameters are, and here it is none (see :func:`optimjax.lift.spread`).
        """
        parts = value if self.items and not callable(value) else [value]
        return self.may_be_value(value) and not all(callable(part) and not _is_leaf(part) for part in parts)

    def may_be_value(self, value: Any) -> bool:
        """The same, where a tree that can be called is taken for a schedule."""
        if callable(value):
            return True
        if self.items:
            return (
                isinstance(value, (tuple, list))
                and len(value) == len(self.items)
                and all(kind.may_be_value(item) for kind, item in zip(self.items, value, strict=True))
            )
        return _is_number(value) or (self.optional and value is None)

    def check(self, name: str, value: Any) -> None:
        """Raise for a value out of range; a tracer, and what can be called, cannot be judged and passes."""
        if callable(value):
            return
        if not self.may_be_value(value):
            wanted = f"a tuple of {len(self.items)} numbers" if self.items else "a number"
            raise TypeError(f"{name} must be {wanted}, an array or a schedule, got {value!r}")
        if self.items:
            for index, (kind, item) in enumerate(zip(self.items, value, strict=True)):
                kind._check_number(f"{name}[{index}]", item, value)
        else:
            self._check_number(name, value)

    def _check_number(self, name: str, value: Any, values: Any = None) -> None:
        if value is None or callable(value):
            return
        if np.size(value) != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {np.shape(value)}")
        if isinstance(value, Tracer):
            return
        number = np.asarray(value)  # comparing JAX's arrays would be traced where a program is
        if not (self.minimum <= number <= self.maximum and self.above < number < self.below):
            raise ValueError(self.message.format(name=name, value=value, values=values))

    def over_numbers(self, function: Callable[[Any], Any], value: Any) -> Any:
        """``function`` of the number, or of each number of the tuple; ``None`` stays where it is optional."""
        if self.items:
            values = tuple(value) if np.iterable(value) else ()
            if len(values) != len(self.items):
                raise ValueError(f"it must be a tuple of {len(self.items)} numbers")
            return tuple(kind.over_numbers(function, item) for kind, item in zip(self.items, values, strict=True))
        return None if self.optional and value is None else function(value)

    def resolve(self, value: Any, count: Any) -> Any:
        """The number itself where a schedule or an array of one element stands for it: Python's or a scalar array."""

        def number(value: Any) -> Any:
            value = value(count) if callable(value) else value
            if isinstance(value, (np.ndarray, np.generic)):
                return value.item()
            # One dtype for all arrays, so that nothing is promoted where they meet; Python numbers go with any.
            return value.reshape(()).astype(jnp.result_type(float)) if isinstance(value, jax.Array) else value

        return self.over_numbers(number, value(count) if self.items and callable(value) else value)


@dataclass(frozen=True)
class Structural:
    """Decides what is stored or which code runs; one value for all parameters, compiled in.

    Attributes:
      legal: ``legal(name, value)`` raises PyTorch's error for an illegal value.
    """

    legal: Callable[[str, Any], None] | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise for a value that is illegal or cannot be compiled in."""
        if isinstance(value, (jax.Array, np.ndarray)) or callable(value) or not _is_hashable(_hashable(value)):
            raise TypeError(f"{name} decides what is compiled: it must be a plain Python value, got {value!r}")
        if self.legal is not None:
            self.legal(name, value)


@dataclass(frozen=True)
class Ignored:
    """Accepted and kept in ``param_groups`` for PyTorch's sake; changes nothing."""

    def check(self, name: str, value: Any) -> None:
        """Every value will do."""


Kind = Numeric | Structural | Ignored


def true_or_false(name: str, value: Any) -> None:
    """Raise for what is no flag; like PyTorch it takes 0 and 1."""
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


# What a numeric hyperparameter may be. The facade takes numbers and arrays only; the functional core also takes
# schedules and trees of these.
_Tree = Mapping[Any, Any] | list[Any] | tuple[Any, ...]  # not Sequence, which a string is
_Value = float | Array | np.ndarray | np.generic | Callable[[Any], Any] | _Tree

Number = Annotated[_Value, Numeric()]
NonNegative = Annotated[_Value, Numeric(minimum=0)]
LearningRate = Annotated[_Value, Numeric(minimum=0, message="Invalid learning rate: {value}")]
Epsilon = Annotated[_Value, Numeric(minimum=0, message="Invalid epsilon value: {value}")]
Decay = Annotated[_Value, Numeric(minimum=0, skip=True)]
Switch = Annotated[_Value, Numeric(minimum=0, switch=True)]
Skippable = Annotated[_Value, Numeric(skip=True)]
Share = Annotated[_Value, Numeric(minimum=0, maximum=1)]
Beta = Annotated[_Value, Numeric(minimum=0, below=1)]
_Pair = tuple[_Value, _Value] | Mapping[Any, Any]
_BETAS = tuple(
    Numeric(minimum=0, below=1, message=f"Invalid beta parameter at index {index}: {{value}}") for index in range(2)
)
Pair = Annotated[_Pair, Numeric(items=(Numeric(), Numeric()))]
Betas = Annotated[_Pair, Numeric(items=_BETAS)]
BetasAlike = Annotated[_Pair, Numeric(items=_BETAS, alike=True)]
Flag = Annotated[bool, Structural(true_or_false)]
Foreach = Annotated[bool | None, Ignored()]
Fused = Annotated[bool | None, Ignored()]
Capturable = Annotated[bool, Ignored()]
Differentiable = Annotated[bool, Ignored()]


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value])


def _is_number(value: Any) -> bool:
    """A number, or an array that may hold one."""
    return isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array))


def _is_on(value: Any) -> bool:
    """Everything but a plain zero switches on: the value of an array must not decide what is compiled."""
    return not (isinstance(value, (int, float)) and value == 0)


class Hyperparameters:
    """The hyperparameters of an optimizer class, read from the signatures of ``__init__`` below the class ``root``.

    A subclass of the class that has the rule may take arguments of its own, which the rule does not know; where there
    is no rule, only what is annotated as a hyperparameter is one.
    """

    def __init__(self, cls: type, root: type):
        self.kinds: dict[str, Kind] = {}
        bases = [base for base in reversed(cls.__mro__) if issubclass(base, root) and base is not root]
        with_rule = [index for index, base in enumerate(bases) if vars(base).get("rule") is not None]
        for index, base in enumerate(bases):
            if "__init__" in vars(base):
                found = self._read(vars(base)["__init__"], annotated=not with_rule)
                above = bool(with_rule) and index > with_rule[-1]
                self.kinds.update({name: kind for name, kind in found.items() if not above or name in self.kinds})
        self._switches = tuple(n for n, k in self.kinds.items() if isinstance(k, Numeric) and (k.switch or k.skip))
        self._skips = frozenset(n for n, k in self.kinds.items() if isinstance(k, Numeric) and k.skip)
        self._structural = tuple(n for n, kind in self.kinds.items() if isinstance(kind, Structural))
        self.numeric = tuple(n for n, kind in self.kinds.items() if isinstance(kind, Numeric))
        # A tuple with names is hashable (a static argument of a compiled function) and reads as `flags.nesterov`.
        self._flags = namedtuple("Flags", (*self._structural, *self._switches, "param_dtype"), defaults=[None])
        self._hyper = namedtuple("Hyper", self.numeric + self._structural)

    @staticmethod
    def _read(init: Callable[..., Any], annotated: bool) -> dict[str, Kind]:
        kinds: dict[str, Kind] = {}
        hints = typing.get_type_hints(init, include_extras=True)
        for name, parameter in list(inspect.signature(init).parameters.items())[2:]:  # after self, params
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            # Of a kind within a kind, `Annotated[LearningRate, Numeric(...)]`, the outer one counts.
            declared = [m for m in getattr(hints.get(name), "__metadata__", ()) if isinstance(m, Kind)]
            if declared or not annotated:
                kinds[name] = declared[-1] if declared else _kind_of(parameter.default)
        return kinds

    def check(self, values: Mapping[str, Any], rule: Rule | None) -> None:
        """Raise PyTorch's error for the first illegal value; keys that are no hyperparameters pass."""
        for name, value in values.items():
            kind = self.kinds.get(name)
            if kind is not None:
                kind.check(name, value)
            if isinstance(kind, Numeric) and kind.alike and len(set(map(_is_array, value))) > 1:
                raise ValueError(f"{name} must be either both floats or both Tensors, got {value}")
        if rule is not None and rule.check is not None:
            rule.check(self.hyper(values), self.fixed_flags(values))

    def check_structural(self, values: Mapping[str, Any]) -> None:
        """Raise for the first illegal value of those that are compiled in."""
        for name in self._structural:
            if name in values:
                self.kinds[name].check(name, values[name])

    def hyper(self, values: Mapping[str, Any]) -> Any:
        """What ``init`` and ``scalars`` of a rule receive."""
        return self._hyper._make(values[name] for name in self._hyper._fields)

    def flags(self, values: Mapping[str, Any]) -> Any:
        """The hashable part of a group: structural values, and for each switch whether it is on."""
        return self._flags(
            *[_hashable(values[name]) for name in self._structural],
            *[name in self._skips or _is_on(values[name]) for name in self._switches],
        )

    def fixed_flags(self, values: Mapping[str, Any]) -> Any:
        """The same for values that stay, which may be trees: a switch is on where any leaf is.

        What can be called counts as on: it may be a schedule.
        """
        on = {name: any(map(_is_on, jax.tree.leaves(values[name], is_leaf=callable))) for name in self._switches}
        return self.flags({**values, **on})._replace(**{name: on[name] for name in self._skips})


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _hashable(value: Any) -> Any:
    """Tuples in place of lists, which checkpoints make of them."""
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _kind_of(default: Any) -> Kind:
    """The kind of an argument that a class written elsewhere did not annotate."""
    if isinstance(default, (tuple, list)) and default and all(map(_is_number, default)):
        return Numeric(items=(Numeric(),) * len(default))
    if default is inspect.Parameter.empty or callable(default):
        return Numeric()
    if _is_number(default) and not isinstance(default, bool):
        return Numeric()
    return Structural(true_or_false if isinstance(default, bool) else None)


def initial_slots(rule: Rule, param: Array, hyper: Any, flags: Any) -> Any:
    """The slots before the first update, each an array of its own.

    A step updates slots in place, so none may be the parameter itself (an average that starts from it) or another slot.
    On a mesh they are distributed as the parameter is.
    """
    seen = {id(param)}

    def own(slot: Array) -> Array:
        slot = jnp.copy(slot) if id(slot) in seen else slot
        seen.add(id(slot))
        return place(slot, param)

    return jax.tree.map(own, rule.init(param, hyper, flags))


@functools.cache
def slot_types(
    rule: Rule, hyperparameters: Hyperparameters, flags: Any, shape: tuple[int, ...], dtype: Any
) -> dict[str, Any]:
    """Shape and dtype of each slot that a parameter has under these flags, ``None`` for one that it does not have."""
    kinds = hyperparameters.kinds.items()
    zeros = {key: (0.0,) * len(kind.items) or 0.0 for key, kind in kinds if isinstance(kind, Numeric)}
    hyper = hyperparameters.hyper(zeros | flags._asdict())
    param = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda param: rule.init(param, hyper, flags), param)._asdict()


# --- The one place where a rule's arithmetic is called --------------------------------------------------------------


def apply_each(
    rule: Rule,
    flags: Sequence[Any],
    params: Sequence[Array],
    grads: Sequence[Any],
    slots: Sequence[Any],
    scalars: Sequence[Any],
) -> list[tuple[Array, Any]]:
    """One update of each parameter: new parameters with their new slots."""
    each = flags, params, grads, slots, scalars
    if rule.takes in ("element", "array"):
        return [apply(rule, *one) for one in zip(*each, strict=True)]
    together: defaultdict[Any, list[int]] = defaultdict(list)
    for index, param in enumerate(params):
        # The type of an array is its shape and dtype, and its sharding where that is explicit.
        together[(jax.typeof(param), flags[index]) if rule.takes == "alike" else None].append(index)
    results: list[Any] = [None] * len(params)
    for members in together.values():
        shared, *columns = ([column[index] for index in members] for column in each)
        for index, *updated in zip(members, *apply(rule, tuple(shared), *columns), strict=True):
            results[index] = tuple(updated)
    return results


@functools.partial(jax.jit, static_argnames=("rule", "flags"))
def apply(rule: Rule, flags: Any, param: Any, grad: Any, slots: Any, scalars: Any) -> tuple[Any, Any]:
    """One update of one parameter, or of a list of them, as the rule takes them.

    Compiled, so that inside a larger program it is traced once for each shape. Arithmetic runs in float32 at least and
    results are cast last: a float16 parameter with zero gradients stays finite although 1e-8 is zero in float16.
    """
    if rule.takes in ("alike", "all"):
        each = (_widened(*one) for one in zip(flags, param, grad, slots, scalars, strict=True))
        *wide, flags = map(list, zip(*each, strict=True))
        if rule.takes == "alike":
            flags = flags[0]
    elif is_sparse(grad):
        to_entries = functools.partial(_apply_to_entries, rule, flags)
        return automatic(to_entries, (param, slots))(param, grad, slots, scalars)
    elif rule.takes == "element" and jnp.iscomplexobj(param):
        return _apply_to_halves(rule, flags, param, grad, slots, scalars)
    else:
        *wide, flags = _widened(flags, param, grad, slots, scalars)
    return jax.tree.map(_restored, tuple(rule.update(*wide, flags)), (param, slots))


def _widened(flags: Any, param: Array, grad: Array, slots: Any, scalars: Any) -> tuple[Any, ...]:
    """What ``update`` gets of a parameter: everything that is a floating number in one dtype; the flags last."""
    if jnp.iscomplexobj(param):  # halves that are updated apart would have the norms of halves
        raise RuntimeError("complex parameters need a rule with takes='element'")
    dtype = at_least_float32(param.dtype)

    def widen(x: Array) -> Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    grad = grad.astype(dtype)
    if getattr(flags, "maximize", False):
        grad = -grad
    scalars = jax.tree.map(lambda scalar: jnp.asarray(scalar, dtype), scalars)
    return widen(param), grad, jax.tree.map(widen, slots), scalars, flags._replace(param_dtype=param.dtype)


def _restored(new: Any, old: Array) -> Array:
    """A result in the dtype of what it replaces and, where that is part of its type, with its sharding."""
    if np.shape(new) != old.shape:
        raise ValueError(f"update has returned an array of shape {np.shape(new)} for one of shape {old.shape}")
    return resharded(jnp.asarray(new).astype(old.dtype), explicit(old))


def _apply_to_halves(rule: Rule, flags: Any, param: Array, grad: Array, slots: Any, scalars: Any) -> tuple[Any, Any]:
    """Update the real and the imaginary part of a complex parameter side by side, as PyTorch sees it.

    `jax.grad` returns the conjugate of PyTorch's gradient. Slots that are real all the same (a count, a product of
    betas) serve both parts.
    """
    (real, real_slots), (imag, imag_slots) = (
        apply(
            rule,
            flags,
            part(param),
            part(jnp.conj(grad)),
            jax.tree.map(lambda slot, part=part: part(slot) if jnp.iscomplexobj(slot) else slot, slots),
            scalars,
        )
        for part in (jnp.real, jnp.imag)
    )
    join = lambda old, re, im: jax.lax.complex(re, im) if jnp.iscomplexobj(old) else re  # noqa: E731
    return jax.tree.map(join, (param, slots), (real, real_slots), (imag, imag_slots))


def _apply_to_entries(rule: Rule, flags: Any, param: Array, grad: Any, slots: Any, scalars: Any) -> tuple[Any, Any]:
    """Update the entries that a sparse gradient names. Nothing else is read: the cost grows with them alone.

    Slots of another shape than the parameter's, such as a count, are handed over whole.
    """
    entries = Entries(grad)
    taken = jax.tree.map(lambda slot: entries.take(slot) if slot.shape == param.shape else slot, slots)
    new, new_slots = apply(rule, flags, entries.take(param), entries.values, taken, scalars)

    def put(old: Array, new: Array) -> Array:
        return entries.put(old, new) if old.shape == param.shape else new

    return put(param, new), jax.tree.map(put, slots, new_slots)
