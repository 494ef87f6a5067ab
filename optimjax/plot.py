"""Pictures of learning rates. They need matplotlib, which is imported when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from optimjax.lr_scheduler import LRScheduler, preview

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["learning_rate"]


def learning_rate(
    scheduler: Any, steps: int, ax: "Axes | None" = None, *, metrics: Sequence[SupportsFloat] | None = None
) -> "Axes":
    """Draw the learning rates of the next steps. Nothing is changed.

    Args:
      scheduler: a scheduler, of whatever number of the groups, or a schedule ``count -> value``; a list of these; or
        a dict of them, whose keys are the labels. Groups whose rates differ get a line each.
      steps: how many (epochs or batches, whichever the scheduler is stepped after), at least 1. The rate is logarithmic
        if all that is drawn is positive and spans more than two decades.
      ax: where to draw; pyplot's present axes unless given.
      metrics: what a ``ReduceLROnPlateau`` shall see, one for each step between two rates.

    Returns:
      The axes; ``ax.figure.savefig("rates.png")`` saves the picture.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: neither a scheduler nor a function.
      ValueError: no steps, or nothing to draw.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> from matplotlib.figure import Figure
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=0.1)
    >>> exponential = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    >>> cosine = optim.schedules.cosine_annealing(0.1, T_max=50)
    >>> ax = optim.plot.learning_rate({"exponential": exponential, "cosine": cosine}, 50, Figure().subplots())
    >>> [line.get_label() for line in ax.get_lines()]
    ['exponential', 'cosine']
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    named = _named(scheduler)
    if not named:
        raise ValueError(f"there is nothing to draw, got {scheduler!r}")
    lines = {label: rates for name, each in named.items() for label, rates in _lines(name, each, steps, metrics)}
    ax = _present_axes() if ax is None else ax
    for label, rates in lines.items():
        ax.plot(np.arange(steps), rates, drawstyle="steps-post", label=label)
    keys = {getattr(each, "key", "lr") for each in named.values()}
    ax.set(xlabel="step", ylabel=" and ".join(sorted(keys)).replace("lr", "learning rate").replace("_", " "))
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.get_lines()])
    if drawn.min() <= 0:
        ax.set_yscale("linear")
    elif drawn.max() > 100 * drawn.min():
        ax.set_yscale("log")
    if any(lines):  # a single one without a name needs no legend
        ax.legend()
    return ax


def _named(scheduler: Any) -> dict[str, Any]:
    """What is to be drawn, by label."""
    if isinstance(scheduler, Mapping):
        named = {str(label): each for label, each in scheduler.items()}
    elif isinstance(scheduler, (list, tuple)):
        named = {f"{index}: {_kind(each)}": each for index, each in enumerate(scheduler)}
    else:
        named = {"": scheduler}
    for each in named.values():
        if not isinstance(each, LRScheduler) and not callable(each):
            raise TypeError(f"expected a scheduler or a function count -> value, got {each!r}")
    return named


def _kind(each: Any) -> str:
    return type(each).__name__ if isinstance(each, LRScheduler) else "schedule"


def _lines(name: str, each: Any, steps: int, metrics: Any) -> list[tuple[str, np.ndarray]]:
    """Labels and rates ``[steps]``, one for all groups that have the same."""
    if isinstance(each, LRScheduler):
        rates, groups = preview(each, steps, metrics), each.optimizer.param_groups
        titles = [str(group.get("name", index)) for index, group in enumerate(groups)]
    else:
        rates = np.array([np.ravel(each(count)) for count in range(steps)], float)
        titles = [str(index) for index in range(rates.shape[1])]
    alike: dict[bytes, list[int]] = {}
    for index, column in enumerate(rates.T):
        alike.setdefault(column.tobytes(), []).append(index)
    if len(alike) == 1:
        return [(name, rates[:, 0])]
    labels = [f"group {', '.join(titles[index] for index in places)}" for places in alike.values()]
    return [
        (f"{name}, {label}" if name else label, rates[:, places[0]])
        for label, places in zip(labels, alike.values(), strict=True)
    ]


def _present_axes() -> "Axes":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("optim.plot needs matplotlib: pip install matplotlib") from error
    return pyplot.gca()
