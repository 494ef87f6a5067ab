"""What an optimizer notes for learning rate schedulers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ScheduleRecord"]


@dataclass(frozen=True)
class ScheduleRecord:
    """It is replaced as a whole, never edited, so that whoever keeps the old one can put it back.

    Attributes:
      attached: whether a scheduler is attached.
      stepped: whether ``optimizer.step()`` has been called since.
      loaded: whether the optimizer has loaded a state.
      built: for each group, by name, what was there before schedulers were built, and after.
    """

    attached: bool = False
    stepped: bool = False
    loaded: bool = False
    built: Sequence[Mapping[str, tuple[Any, Any]]] = ()
