"""The options of an optimizer that hold its steps back, as attributes, and what it has seen of its gradients."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from jax import Array

from optimjax._core.guard import Guard
from optimjax._engine.watch import Watch

__all__ = ["Guarded"]


class Guarded:
    """Options that hold a step back: a base of :class:`optimjax.Optimizer`, which documents them.

    Attributes:
      options_refused: why this class takes none; empty if it does.
    """

    options_refused: ClassVar[str] = ""
    _guard: Guard
    _watch: Watch

    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Take the options that the constructor was given by name.

        Raises:
          TypeError: an unknown one.
        """
        self._check_options(options)
        self._hold_back(Guard(**options))

    def _check_options(self, options: Mapping[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(Guard)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}{hint}")

    def _hold_back(self, guard: Guard) -> None:
        if guard.given and self.options_refused:
            raise ValueError(f"{type(self).__name__} takes no {', '.join(guard.given)}: {self.options_refused}")
        self._guard = guard

    @property
    def max_grad_norm(self) -> Any:
        """The largest norm of all gradients together; ``None`` for gradients as they are."""
        return self._guard.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        self._hold_back(dataclasses.replace(self._guard, max_grad_norm=value))

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step changes nothing where a gradient is infinite or NaN."""
        return self._guard.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._hold_back(dataclasses.replace(self._guard, skip_nonfinite=value))

    @property
    def grad_norm(self) -> Array | None:
        """The norm of all gradients of the last step together, before clipping: a scalar array, not waited for.

        ``None`` before the first step, and while neither ``max_grad_norm`` nor ``skip_nonfinite`` is set.
        """
        return self._watch.norm

    @property
    def skipped(self) -> Array:
        """How many steps ``skip_nonfinite`` has skipped: an int32 scalar array, not waited for.

        Copies and pickles take it along; a state dict has only the counts of updates done.
        """
        return self._watch.tally.array
