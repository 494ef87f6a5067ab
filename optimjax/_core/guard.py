"""Options that hold a step back: a largest norm of all gradients, and whether one that is not finite is skipped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optimjax._core.norms import measured, scalar_limit, scaled_by

__all__ = ["FREE", "UNGUARDED", "Guard", "Limits", "Options", "counted", "unless_skipped"]


class Options(TypedDict, total=False):
    """Options of a whole optimizer, not of a group, which every class and every functional factory takes.

    Attributes:
      max_grad_norm: see :class:`optimjax.Optimizer`.
      skip_nonfinite: see :class:`optimjax.Optimizer`.
    """

    max_grad_norm: float | Array | None
    skip_nonfinite: bool


class Limits(NamedTuple):
    """How one step is held back: what is traced where parameters are updated.

    Attributes:
      norm: of all gradients; ``None`` where nobody asks.
      limit: the largest norm; ``None`` for gradients as they are.
      counts: whether the step does; ``None`` if it does in any case.
    """

    norm: Any = None
    limit: Any = None
    counts: Any = None

    def clipped(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients, scaled down together where their norm is larger."""
        return list(grads) if self.limit is None else scaled_by(grads, self.limit, self.norm)


FREE = Limits()


@dataclass(frozen=True, eq=False)
class Guard:
    """The options that hold a step back.

    Raises:
      TypeError: ``max_grad_norm`` is not a number, or ``skip_nonfinite`` not a bool.
      ValueError: ``max_grad_norm`` is negative or NaN.
    """

    max_grad_norm: Any = None
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None:
            limit = scalar_limit("max_grad_norm", self.max_grad_norm)
            if not isinstance(limit, Tracer) and not limit >= 0:
                raise ValueError(f"Invalid max_grad_norm: {self.max_grad_norm!r}: it must be at least 0")
        if not isinstance(self.skip_nonfinite, (bool, np.bool_)):
            raise TypeError(f"skip_nonfinite must be True or False, got {self.skip_nonfinite!r}")

    @property
    def given(self) -> Mapping[str, Any]:
        """The options that are not the usual ones."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, usual) in values.items() if value is not usual}

    @property
    def limit(self) -> Any:
        """The largest norm as one kind of scalar."""
        return None if self.max_grad_norm is None else scalar_limit("max_grad_norm", self.max_grad_norm)

    def limits(
        self, grads: Sequence[Any], measure: Callable[[Sequence[Any]], tuple[Array, Array]] = measured
    ) -> Limits:
        """How a step by these gradients is held back."""
        if self.max_grad_norm is None and not self.skip_nonfinite:
            return FREE
        norm, finite = measure(grads)
        return Limits(norm, self.limit, finite if self.skip_nonfinite else None)


UNGUARDED = Guard()


def unless_skipped(counts: Array | None, new: Array, old: Array) -> Array:
    """The new value, or the old one where the step does not count."""
    return new if counts is None else jnp.where(counts, new, old)


def counted(skipped: Any, counts: Any) -> Array:
    """The number of skipped steps, after one more that counts or does not."""
    return skipped + jnp.where(counts, 0, 1).astype(jnp.int32)
