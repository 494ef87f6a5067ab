"""A Sphinx extension that draws the gallery of schedulers with the package itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from matplotlib.figure import Figure

import optimjax as optim
from optimjax import schedules
from optimjax.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

EPOCHS = 100
COLUMNS = 4
LOSSES = [max(0.98**epoch, 0.6) for epoch in range(EPOCHS)]  # falls for 25 epochs, then no more
BATCHES = (CyclicLR, OneCycleLR)  # stepped after each batch

# The arguments as they are shown, and the scheduler of an optimizer whose learning rate is 1.
GALLERY: list[tuple[str, Callable[[Any], Any]]] = [
    ("lambda k: 1 / (1 + k / 10)", lambda o: LambdaLR(o, lambda k: 1 / (1 + k / 10))),
    ("lambda k: 0.95 if k < 40 else 1", lambda o: MultiplicativeLR(o, lambda k: 0.95 if k < 40 else 1)),
    ("gamma=0.96", lambda o: ExponentialLR(o, gamma=0.96)),
    ("total_iters=80, power=2", lambda o: PolynomialLR(o, total_iters=80, power=2)),
    ("step_size=25, gamma=0.5", lambda o: StepLR(o, step_size=25, gamma=0.5)),
    ("milestones=[30, 80], gamma=0.3", lambda o: MultiStepLR(o, milestones=[30, 80], gamma=0.3)),
    ("factor=0.3, total_iters=20", lambda o: ConstantLR(o, factor=0.3, total_iters=20)),
    ("start_factor=0.1, total_iters=20", lambda o: LinearLR(o, start_factor=0.1, total_iters=20)),
    ("T_max=80", lambda o: CosineAnnealingLR(o, T_max=80)),
    ("T_0=15, T_mult=2", lambda o: CosineAnnealingWarmRestarts(o, T_0=15, T_mult=2)),
    ('base 0.1, max 1, up 15, "triangular2"', lambda o: CyclicLR(o, 0.1, 1, 15, mode="triangular2")),
    ("max_lr=1, total_steps=100", lambda o: OneCycleLR(o, max_lr=1, total_steps=100)),
    ("factor=0.5, patience=10", lambda o: ReduceLROnPlateau(o, factor=0.5, patience=10)),
    (
        "[LinearLR, CosineAnnealingLR], [20]",
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=20), CosineAnnealingLR(o, T_max=80)], [20]),
    ),
    (
        "[ConstantLR, ExponentialLR]",
        lambda o: ChainedScheduler([ConstantLR(o, 0.3, total_iters=20), ExponentialLR(o, gamma=0.98)]),
    ),
    (
        "warmup(step(1, 30, 0.5), 10)",
        lambda o: LambdaLR(o, schedules.warmup(schedules.step(1.0, 30, 0.5), 10)),
    ),
]


def setup(app: Any) -> dict[str, Any]:
    """Have Sphinx draw before it reads the sources."""
    app.connect("builder-inited", lambda app: draw().savefig(Path(app.srcdir) / "lr_schedulers.png", dpi=150))
    return {"parallel_read_safe": True}


def draw() -> Figure:
    """The gallery."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = figure.subplots(-(-len(GALLERY) // COLUMNS), COLUMNS, sharex=True, sharey=True)
    for ax, (arguments, make) in zip(panels.flat, GALLERY, strict=True):
        scheduler = make(optim.SGD([jnp.ones(())], lr=1.0, momentum=0.9))
        optim.plot.learning_rate(scheduler, EPOCHS, ax, metrics=LOSSES)
        ax.get_lines()[0].set(color="#c44e52" if isinstance(scheduler, BATCHES) else "#4c72b0", linewidth=1.8)
        ax.set_title(type(scheduler).__name__, fontsize=10, fontweight="bold", pad=17)
        ax.text(0.5, 1.02, arguments, transform=ax.transAxes, ha="center", va="bottom", fontsize=8, color="#555555")
        ax.set(yscale="linear", ylim=(-0.04, 1.08))
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.label_outer()
    return figure
