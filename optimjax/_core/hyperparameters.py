"""Hyperparameters: what each may be, said once by the annotation of the argument of the class that a user calls."""

import inspect
import math
import typing
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

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
    "Kind",
    "LearningRate",
    "NonNegative",
    "Number",
    "Numeric",
    "Pair",
    "Share",
    "Skippable",
    "Structural",
    "Switch",
    "one_of",
]


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
      alike: the facade, like PyTorch's Adam, accepts all numbers or all arrays, not a mix.
      switch: a plain zero leaves a part of the algorithm out, with its slots (``momentum=0`` keeps no buffer).
      skip: a plain zero leaves arithmetic out in the functional core. The facade keeps it, because its groups
        may be edited at any time and that must not recompile.
      fixed: whether a value is compiled in after all, as those of :class:`Structural` are: a name or a table that is in
        place of the numbers. In the arithmetic these are then zeros, and the flag of the same name is the value; it is
        ``None`` where there are numbers.
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
    fixed: Callable[[Any], bool] | None = None

    def is_fixed(self, value: Any) -> bool:
        """Whether a value is compiled in after all."""
        return self.fixed is not None and self.fixed(value)

    def is_value(self, value: Any) -> bool:
        """Whether this is one value for all parameters, not a tree of values.

        A function is one, a schedule. A tree that can be called may be a schedule or a tree of values; which of them is
        known where the parameters are, and here it is none (see :func:`optimjax._core.algorithm.spread`).
        """
        parts = value if self.items and not callable(value) and not self.is_fixed(value) else [value]
        return self.may_be_value(value) and not all(callable(part) and not _is_leaf(part) for part in parts)

    def may_be_value(self, value: Any) -> bool:
        """The same, where a tree that can be called is taken for a schedule."""
        if callable(value) or self.is_fixed(value):
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
        if callable(value) or self.is_fixed(value):
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
        if self.is_fixed(value):
            return (0.0,) * len(self.items) or 0.0
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
      of_parameters: whether it describes the parameters of a group, so that it stays with them when a state dict is
        loaded into other groups.
    """

    legal: Callable[[str, Any], None] | None = None
    of_parameters: bool = False

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
    """Raise unless the value is a bool; 0 and 1 pass, as in PyTorch."""
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def one_of(
    *values: Any, message: str = "{name} must be one of {values}, got {value!r}", error: type[Exception] = ValueError
) -> Structural:
    """The kind of an argument that must be one of some values, such as ``None`` and strings.

    ``message`` may contain ``{name}``, ``{value}`` and ``{values}``.
    """

    def check(name: str, value: Any) -> None:
        if value not in values:
            raise error(message.format(name=name, value=value, values=", ".join(map(repr, values))))

    return Structural(check)


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
        self._fixable = {n: k for n, k in self.kinds.items() if isinstance(k, Numeric) and k.fixed is not None}
        self._structural = tuple(n for n, kind in self.kinds.items() if isinstance(kind, Structural))
        self.numeric = tuple(n for n, kind in self.kinds.items() if isinstance(kind, Numeric))
        # A tuple with names is hashable (a static argument of a compiled function) and reads as `flags.nesterov`.
        compiled_in = (*self._structural, *self._fixable, *self._switches)
        self._flags = namedtuple("Flags", (*compiled_in, "param_dtype"), defaults=[None])
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

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise PyTorch's error for the first illegal value; keys that are not hyperparameters pass."""
        for name, value in values.items():
            kind = self.kinds.get(name)
            if kind is not None:
                kind.check(name, value)
            if isinstance(kind, Numeric) and kind.alike and len(set(map(_is_array, value))) > 1:
                raise ValueError(f"{name} must be either both floats or both Tensors, got {value}")

    def check_structural(self, values: Mapping[str, Any]) -> None:
        """Raise for the first illegal value of those that are compiled in."""
        for name in (*self._structural, *self._fixable):
            if name in values:
                self.kinds[name].check(name, values[name])

    def hyper(self, values: Mapping[str, Any]) -> Any:
        """What ``init`` and ``scalars`` of a rule receive."""
        return self._hyper._make(values[name] for name in self._hyper._fields)

    def flags(self, values: Mapping[str, Any]) -> Any:
        """The hashable part of a group: structural values, and for each switch whether it is on."""
        return self._flags(
            *[_hashable(values[name]) for name in self._structural],
            *[_hashable(values[name]) if kind.is_fixed(values[name]) else None for name, kind in self._fixable.items()],
            *[name in self._skips or _is_on(values[name]) for name in self._switches],
        )

    def fixed_flags(self, values: Mapping[str, Any], columns: Mapping[str, list[Any]] | None = None) -> Any:
        """The same for values that stay, which may be trees: a switch is on where any leaf is.

        What can be called counts as on: it may be a schedule. ``columns`` has the leaves where they are known.
        """
        leaves = {name: (columns or {}).get(name) or values[name] for name in self._switches}
        on = {name: any(map(_is_on, jax.tree.leaves(leaves[name], is_leaf=callable))) for name in self._switches}
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
