"""What a parameter is updated by: a rule, its hyperparameters and its name, which go together everywhere."""

import functools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from optimjax._core.contract import Rule
from optimjax._core.hyperparameters import Hyperparameters, Numeric, Structural
from optimjax._core.slots import all_initial_slots
from optimjax._core.sparse import is_sparse

__all__ = ["UNBOUND", "Definition", "as_number", "names_of_others", "of_group", "package"]

UNBOUND: Any = object()  # in place of params: an optimizer of nothing, which has defaults alone


@dataclass(frozen=True, eq=False)
class Definition:
    """What an optimizer class defines, as plain data. Each class has one, which pickles by the class.

    Attributes:
      owner: the class.
      rule: the arithmetic for one parameter; ``None`` for a class that overrides ``step``.
      hyperparameters: the kinds of its hyperparameters.
      slot_names: the names of all slots, whatever the flags are.
      own_step: whether the class, or one that it is derived from, has overridden ``step``.
    """

    owner: type
    rule: Rule | None
    hyperparameters: Hyperparameters
    slot_names: tuple[str, ...]
    own_step: bool = False

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.owner.__name__

    def __reduce__(self) -> Any:
        return getattr, (self.owner, "definition")

    @property
    def of_parameters(self) -> list[str]:
        """The hyperparameters that describe the parameters of a group."""
        kinds = self.hyperparameters.kinds.items()
        return [name for name, kind in kinds if isinstance(kind, Structural) and kind.of_parameters]

    @property
    def arithmetic(self) -> Rule:
        """The rule.

        Raises:
          NotImplementedError: there is none.
        """
        if self.rule is None:
            raise NotImplementedError(
                f"{self.name} has no `rule`: it must set one or override step(); only a rule has a functional form"
            )
        return self.rule

    # --- hyperparameters ---

    def defaults(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the constructor makes of these hyperparameters."""
        return self.owner(UNBOUND, *args, **kwargs).defaults

    def check(self, values: Mapping[str, Any], where: str = "") -> None:
        """Raise PyTorch's error for the first illegal value of a group; keys that are not hyperparameters pass.

        Args:
          values: by name, numbers or arrays of one element.
          where: follows the name in a message.

        Raises:
          TypeError: a schedule or a tree, which only the functional form takes.
          ValueError: a value is out of range, or a combination makes no sense.
        """
        kinds = self.hyperparameters.kinds
        for name, value in values.items():
            kind = kinds.get(name)
            if not isinstance(kind, Numeric):
                continue
            if any(map(callable, jax.tree.leaves([value]))):
                raise TypeError(
                    f"{name}{where} must be a number, got {value!r}: "
                    "schedules belong to optim.functional, or use optim.lr_scheduler"
                )
            if not kind.items and not kind.is_value(value):
                raise TypeError(f"{name}{where} must be a number or an array of one element, got {value!r}")
        self.hyperparameters.check(values)
        if self.rule is not None and self.rule.check is not None:
            self.rule.check(self.hyperparameters.hyper(values), self.hyperparameters.fixed_flags(values))

    def resolve(self, group: Mapping[str, Any], where: str) -> tuple[Any, Any]:
        """A group's hyperparameters as Python numbers, and its flags.

        Raises:
          KeyError: one is missing.
          TypeError, ValueError: one is not a number.
        """
        values = dict(group)
        for name in self.hyperparameters.numeric:
            if name not in group:
                raise KeyError(f"{name!r}{where} is missing: groups are added with add_param_group")
            try:
                kind: Any = self.hyperparameters.kinds[name]
                values[name] = kind.over_numbers(as_number, group[name])
            except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
                error_type = TypeError if isinstance(error, TypeError) else ValueError
                value = reprlib.repr(group[name])
                raise error_type(f"{name}{where} is {value}, which is not a number: {error}") from None
        return self.hyperparameters.hyper(values), self.hyperparameters.flags(group)

    # --- slots ---

    def slots(self, params: Sequence[Array], hypers: Sequence[Any], flags: Sequence[Any]) -> list[Any]:
        """The slots of each parameter before the first update; see :func:`optimjax._core.slots.initial_slots`."""
        return all_initial_slots(self.arithmetic, params, hypers, flags)

    def slot_types(self, flags: Any, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        """Shape and dtype of each slot that such a parameter has, or a tree of them; ``None`` for one that it lacks."""
        return _slot_types(self, flags, shape, jnp.dtype(dtype))

    def fields(self, flags: Any, shape: tuple[int, ...], dtype: Any) -> tuple[str, ...]:
        """The names of the slots that such a parameter has."""
        return tuple(name for name, type_ in self.slot_types(flags, shape, dtype).items() if type_ is not None)

    def entries(self, slots: Any, step: int) -> dict[str, Any]:
        """What PyTorch's state has: the slots that exist, by name, and ``step`` where it counts."""
        count = {"step": step} if self.arithmetic.counts_steps else {}
        return count | {name: slot for name, slot in slots._asdict().items() if slot is not None}

    # --- what it can take ---

    def check_param(self, param: Array, flags: Any, name: Callable[[], str]) -> None:
        """Raise where the algorithm cannot take a parameter; ``name`` is called only then.

        Raises:
          RuntimeError: the parameter is complex and the rule is not elementwise.
          ValueError, RuntimeError: as the rule says.
        """
        rule = self.rule
        try:
            if rule is not None and rule.check_param is not None:
                rule.check_param(param, flags)
            if rule is not None and rule.takes != "element" and jnp.iscomplexobj(param):
                raise RuntimeError(f"{self.name} does not support complex parameters")
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{error} ({name()!r})") from None

    def check_layout(self, grad: Any, name: Callable[[], str]) -> None:
        """Raise where a gradient is sparse and the algorithm takes dense ones, or the other way round.

        Raises:
          RuntimeError: PyTorch's message.
        """
        sparse = self.arithmetic.sparse
        if is_sparse(grad) != sparse:
            layout, other = ("dense", "Adam") if sparse else ("sparse", "SparseAdam")
            raise RuntimeError(
                f"{self.name} does not support {layout} gradients, please consider {other} instead ({name()!r})"
            )


package: list[Definition] = []  # of the classes of this package, in the order in which they were made


def of_group(group: Mapping[str, Any], own: Definition) -> Definition:
    """What updates a group: its ``algorithm``, or what the optimizer is itself (``own``).

    Raises:
      ValueError: the entry has been edited, and is not an optimizer class any more.
    """
    algorithm = group.get("algorithm")
    if algorithm is None:
        return own
    if not isinstance(getattr(algorithm, "definition", None), Definition):
        raise ValueError(
            f"'algorithm' of a group must be an optimizer class, got {algorithm!r}: names are for new groups, whose "
            "options and state are those of the algorithm; make a new optimizer, or use add_param_group"
        )
    return algorithm.definition


def names_of_others(definition: Definition) -> set[str]:
    """The names of slots that only other algorithms of the package have."""
    return {name for other in package for name in other.slot_names} - set(definition.slot_names)


@functools.cache
def _slot_types(definition: Definition, flags: Any, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    rule, hyperparameters = definition.arithmetic, definition.hyperparameters
    kinds = hyperparameters.kinds.items()
    zeros = {key: (0.0,) * len(kind.items) or 0.0 for key, kind in kinds if isinstance(kind, Numeric)}
    hyper = hyperparameters.hyper(zeros | flags._asdict())
    param = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda param: rule.init(param, hyper, flags), param)._asdict()


def as_number(value: Any) -> Any:
    """A Python number where that is possible; a tracer stays one. An array has one element.

    Raises:
      ValueError, TypeError: it is not a number.
    """
    if isinstance(value, str):  # which float() would read
        raise ValueError("it is a string")
    if getattr(value, "ndim", 0):
        value = value.reshape(())
    return value if isinstance(value, Tracer) else float(value)
