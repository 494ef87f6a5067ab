"""The contract of an algorithm: a rule, the kinds of arrays that it keeps, and what its functions are given."""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from jax import Array

__all__ = ["Fixed", "Flags", "Hyper", "Moment", "Rule", "Slot", "Square", "Takes", "Weights", "kinds_of_slots"]


@dataclass(frozen=True)
class Slot:
    """What kind of array a slot is, which decides how else it might be kept: coarser, in parts, in other memory.

    Attributes:
      signed: whether it may be negative.
      exact: whether it must be kept as exactly as the parameter.
      fixed: whether it has a shape or a dtype of its own, such as a number, a count or factors along axes.
    """

    signed: bool = True
    exact: bool = False
    fixed: bool = False


Moment = Annotated[Array, Slot()]  # of the parameter's shape and dtype
Square = Annotated[Array, Slot(signed=False)]  # the same, never negative
Weights = Annotated[Array, Slot(exact=True)]  # the same, a second set of weights or of step sizes
Fixed = Annotated[Array, Slot(fixed=True)]  # a shape or a dtype of its own


def kinds_of_slots(slots: type) -> dict[str, Slot]:
    """The kind of each field of a NamedTuple of slots; a field without an annotation of its kind is fixed."""
    hints = typing.get_type_hints(slots, include_extras=True)
    return {name: _kind(hints.get(name)) for name in getattr(slots, "_fields", ())}


def _kind(hint: Any) -> Slot:
    for part in (hint, *typing.get_args(hint)):  # in `Moment | None` the kind is one level down
        for declared in getattr(part, "__metadata__", ()):
            if isinstance(declared, Slot):
                return declared
    return Slot(fixed=True)


class Hyper(Protocol):
    """The hyperparameters of one parameter by name, as numbers: ``hyper.lr``, and in tuples ``hyper.betas[0]``."""

    def __getattr__(self, name: str) -> Any: ...


class Flags(Protocol):
    """What is compiled in, by name: the structural hyperparameters, and for each switch whether it is on.

    So ``flags.weight_decay`` is a bool: whether there is any. The number itself is in the scalars.
    """

    param_dtype: Any  # the dtype that the parameter is stored in

    def __getattr__(self, name: str) -> Any: ...


Takes = Literal["element", "array", "alike", "all"]


@dataclass(frozen=True, eq=False)
class Rule:
    """The arithmetic of one algorithm for one parameter.

    Attributes:
      slots: a NamedTuple type, one field for each array kept for a parameter, named as in PyTorch's state dict, of any
        shape and dtype; a field may also be a tuple of arrays. Fields that the flags, or the parameter's shape, leave
        out are ``None``. The annotation of a field says its kind: :data:`Moment`, :data:`Square`, :data:`Weights` or
        :data:`Fixed`.
      init: ``init(param, hyper, flags) -> slots``; see :class:`Hyper` and :class:`Flags`.
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
        (1) from the later ones (2), which the facade infers from the presence of the slots.
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
