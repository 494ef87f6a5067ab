"""Pictures of learning rates and of sweeps. They need matplotlib, which is imported when one is drawn."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from optimjax.lr_scheduler import LRScheduler, preview
from optimjax.sweeps import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heat_map", "learning_rate"]


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


def heat_map(
    sweep: Sweep,
    select: Callable[[Any], Any] | None = None,
    ax: "Axes | None" = None,
    *,
    largest: bool = False,
    limits: tuple[float, float] | None = None,
    label: str = "loss",
) -> "Axes":
    """Draw what came out of a sweep: two of its numbers across each other, or one across the steps of its curves.

    Runs that came to NaN or infinity are grey. A star marks the best one, with curves by their last value. Colours are
    logarithmic if all that is drawn is positive and spans more than a decade.

    Args:
      sweep: what :func:`optimjax.sweep` has returned. Of more than two numbers take the mean over the rest,
        ``sweep.mean("seed")``, or let ``select`` choose among them.
      select: ``select(values)`` is the array to be drawn, with two axes; by default ``values`` are.
      ax: where to draw; pyplot's present axes unless given.
      largest: whether the largest is the best, as with an accuracy.
      limits: the numbers with the first and the last colour. Unless given, a twentieth of the numbers is left out at
        each end, because what has nearly diverged would leave no colours for the rest.
      label: what the numbers are.

    Returns:
      The axes; ``ax.figure.savefig("sweep.png")`` saves the picture.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the array has not two axes of which the first is of the sweep, or nothing in it is finite.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> from matplotlib.figure import Figure
    >>> result = optim.sweep(lambda lr, decay: (lr - 0.1) ** 2 + decay, lr=[0.01, 0.1, 1.0], decay=[0.0, 0.1])
    >>> ax = optim.plot.heat_map(result, ax=Figure().subplots())
    >>> print(ax.get_title("left"))
    ★ best: lr 0.1, decay 0
    """
    scores = sweep.scores(select)
    names = list(sweep.axes)
    crossed = scores.shape == sweep.shape and len(names) == 2
    if not crossed and (len(names) != 1 or scores.ndim != 2 or scores.shape[0] != sweep.shape[0]):
        raise ValueError(
            "a heat map has two axes, two numbers of the sweep or one and the steps of its curves; this sweep is over "
            f"{', '.join(names) or 'nothing'} {sweep.shape}, and what is to be drawn has the shape {scores.shape}"
        )
    finite = np.isfinite(scores)
    if not finite.any():
        raise ValueError(f"all {scores.size} numbers are NaN or infinite: there is nothing to draw")
    ax = _present_axes() if ax is None else ax
    _draw_cells(ax, scores, limits, label)
    _number(ax.yaxis, names[0], sweep.axes[names[0]], most=8)
    if crossed:
        _number(ax.xaxis, names[1], sweep.axes[names[1]], most=5)
    else:
        ax.set_xlabel("step")
    _mark_best(ax, sweep, scores, crossed, largest)
    return ax


def _draw_cells(ax: "Axes", scores: np.ndarray, limits: tuple[float, float] | None, label: str) -> None:
    """The coloured cells and the colour bar."""
    from matplotlib import colormaps, colors

    finite = scores[np.isfinite(scores)]
    low, high = np.quantile(finite, (0.05, 0.95)) if limits is None else limits
    scale = colors.LogNorm if finite.min() > 0 and low > 0 and high > 10 * low else colors.Normalize
    colours = colormaps["viridis"].with_extremes(bad="#d0d0d0")
    image = ax.imshow(
        np.where(np.isfinite(scores), scores, np.nan),
        norm=scale(low, high),
        cmap=colours,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = beyond[bool(finite.min() < low), bool(finite.max() > high)]
    ax.figure.colorbar(image, ax=ax, label=label, extend=extend)


def _mark_best(ax: "Axes", sweep: Sweep, scores: np.ndarray, crossed: bool, largest: bool) -> None:
    """The star, and the title, which says what is grey, too.

    A legend would do, but one above the axes takes their width, and one within them hides cells.
    """
    last, notes = scores if crossed else scores[:, -1], []
    if np.isfinite(last).any():
        best = Sweep(sweep.axes, last).best(largest=largest)
        row, *column = (np.flatnonzero(sweep.axes[name] == value)[0] for name, value in best.items())
        place = column[0] if column else scores.shape[1] - 1
        ax.scatter(place, row, marker="*", s=130, color="white", edgecolor="black", zorder=3, clip_on=False)
        notes.append("★ best: " + ", ".join(f"{_words(name)} {value:.3g}" for name, value in best.items()))
    if not np.isfinite(scores).all():
        notes.append("grey: diverged")
    ax.set_title("; ".join(notes), loc="left", fontsize="medium")


def _number(axis: Any, name: str, values: np.ndarray, most: int) -> None:
    """Label an axis of cells by some of the values, evenly spaced."""
    places = range(0, len(values), -(-max(len(values) - 1, 1) // (most - 1)))
    axis.set_ticks(places, [f"{values[place]:.2g}" for place in places])
    axis.set_label_text(_words(name))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _present_axes() -> "Axes":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("optim.plot needs matplotlib: pip install matplotlib") from error
    return pyplot.gca()
