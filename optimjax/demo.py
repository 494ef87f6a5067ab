"""The demo: one small classifier of handwritten digits, four optimizers, the same initial weights.

``python -m optimjax demo`` runs it. :class:`Classifier`, :func:`loss_fn` and :func:`train` are the example to copy.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optimjax as optim

__all__ = ["Classifier", "Data", "Result", "accuracy", "loss_fn", "run", "train", "warm_up_cosine"]

BATCH_SIZE = 64
OPTIMIZERS: dict[str, Callable[[nnx.Module], optim.Optimizer]] = {
    "SGD": lambda model: optim.SGD(model, lr=0.5),
    "SGD, momentum 0.9": lambda model: optim.SGD(model, lr=0.1, momentum=0.9),
    "RMSprop": lambda model: optim.RMSprop(model, lr=0.01),
    "Adam": lambda model: optim.Adam(model, lr=0.01),
}
NARROW = 70  # columns of a terminal: with fewer, neither the bars nor the table would leave room for the names
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC3377")  # told apart by colour-blind eyes too


class Classifier(nnx.Module):
    """64 pixels, 64 hidden units, 10 digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Logits ``[batch, 10]`` of images ``[batch, 64]``."""
        return self.output(nnx.relu(self.hidden(images)))


def loss_fn(model: Classifier, images: Array, labels: Array) -> Array:
    """Cross entropy, the mean over the batch."""
    log_probabilities = jax.nn.log_softmax(model(images))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()


def accuracy(model: Classifier, images: Array, labels: Array) -> float:
    """Share of the images whose digit is recognized."""
    return float((model(images).argmax(axis=1) == labels).mean())


def warm_up_cosine(warm_up: int, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up in a straight line for ``warm_up`` steps, then down half a cosine.

    >>> factor = warm_up_cosine(warm_up=2, steps=6)
    >>> [round(factor(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    return factor


class Data(NamedTuple):
    """Images ``[n, 64]`` with values from 0 to 1, and their digits ``[n]``."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array

    @classmethod
    def load(cls) -> "Data":
        """The 8×8 digits that scikit-learn ships; always the same quarter is kept for the test."""
        images, labels = load_digits(return_X_y=True)
        train_images, test_images, train_labels, test_labels = train_test_split(
            (images / 16).astype(np.float32), labels, test_size=0.25, random_state=0, stratify=labels
        )
        return cls(*map(jnp.asarray, (train_images, train_labels, test_images, test_labels)))

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches only: a shorter last one would compile the step a second time."""
        return len(self.train_labels) // BATCH_SIZE

    def batches(self, epochs: int, seed: int) -> Iterator[tuple[Array, Array]]:
        """Shuffled batches, in the same order for the same seed."""
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = rng.permutation(len(self.train_labels))
            for batch in order[: self.batches_per_epoch * BATCH_SIZE].reshape(-1, BATCH_SIZE):
                yield self.train_images[batch], self.train_labels[batch]


class Result(NamedTuple):
    """What one training run gave."""

    losses: list[float]  # of each batch, before its step
    factors: list[float]  # of the learning rate, at each step
    lr: float  # at its peak
    final_loss: float  # over all training images
    test_accuracy: float
    ms_per_step: float  # the median, without the first step, which compiles


def train(
    make_optimizer: Callable[[nnx.Module], optim.Optimizer],
    data: Data,
    epochs: int,
    seed: int,
    report: Callable[[float], Any],
) -> Result:
    """Train a new classifier and measure it; ``report`` is called with the loss after each step."""
    model = Classifier(nnx.Rngs(seed))
    optimizer = make_optimizer(model)
    optimizer.max_grad_norm = 1.0  # clipped within the step
    steps = epochs * data.batches_per_epoch
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, warm_up_cosine(max(1, steps // 10), steps))
    group = optimizer.param_groups[0]

    losses, factors, seconds = [], [], []
    for images, labels in data.batches(epochs, seed):
        factors.append(group["lr"] / group["initial_lr"])
        start = time.perf_counter()
        loss = optimizer.step(loss_fn, images, labels)  # value, gradient, clipping and update in one program
        loss.block_until_ready()
        seconds.append(time.perf_counter() - start)
        scheduler.step()
        losses.append(float(loss))
        report(losses[-1])

    return Result(
        losses,
        factors,
        group["initial_lr"],
        float(loss_fn(model, data.train_images, data.train_labels)),
        accuracy(model, data.test_images, data.test_labels),
        1000 * statistics.median(seconds[1:]),
    )


def run(epochs: int, seed: int, out: Path) -> None:
    """Train with each optimizer, print the table, write the picture."""
    console = _console()
    data = Data.load()
    console.print(
        f"{len(data.train_labels)} handwritten digits to learn from, {len(data.test_labels)} to test on; "
        f"the same initial weights and batches for every optimizer (seed {seed})."
    )
    steps = epochs * data.batches_per_epoch
    results = {}
    with _progress(console) as progress:
        for name, make_optimizer in OPTIMIZERS.items():
            task = progress.add_task(name, total=steps, loss=math.nan)
            results[name] = train(
                make_optimizer, data, epochs, seed, lambda loss, task=task: progress.update(task, advance=1, loss=loss)
            )
    _report(console, results)
    _figure(results, data.batches_per_epoch).savefig(out)
    console.print("Loss curves and learning rate:", str(out), soft_wrap=True)  # a path must not be broken


def _console() -> Console:
    console = Console()
    if console.is_dumb_terminal:  # Rich takes each of these to be 80 columns wide
        console.size = shutil.get_terminal_size()
    return console


def _progress(console: Console) -> Progress:
    name, bar, loss = TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}")
    if console.width < NARROW:
        return Progress(name, MofNCompleteColumn(), loss, console=console)
    return Progress(name, bar, MofNCompleteColumn(), loss, TimeElapsedColumn(), console=console)


def _report(console: Console, results: dict[str, Result]) -> None:
    console.print(_lines(results) if console.width < NARROW else _table(results))


def _table(results: dict[str, Result]) -> Table:
    table = Table("Optimizer")
    for title in ("peak lr", "final loss", "test accuracy", "ms per step"):
        table.add_column(title, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.lr:g}",
            f"{result.final_loss:.4f}",
            f"{result.test_accuracy:.1%}",
            f"{result.ms_per_step:.2f}",
            style=_style(result, results),
        )
    return table


def _lines(results: dict[str, Result]) -> Text:
    """What the table says, for a narrow terminal."""
    lines = []
    for name, result in results.items():
        numbers = f"loss {result.final_loss:.4f}, accuracy {result.test_accuracy:.1%}, {result.ms_per_step:.2f} ms"
        lines.append(Text(f"{name}, peak lr {result.lr:g}\n  {numbers}", _style(result, results)))
    return Text("\n").join(lines)


def _style(result: Result, results: dict[str, Result]) -> str:
    return "bold green" if result.test_accuracy == max(other.test_accuracy for other in results.values()) else ""


def _figure(results: dict[str, Result], batches_per_epoch: int) -> Figure:
    # A Figure of its own, not pyplot's: nothing global changes and no window system is asked for.
    figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (name, result), colour in zip(results.items(), COLOURS, strict=True):
        epochs = np.arange(1, len(result.losses) + 1) / batches_per_epoch
        window = min(batches_per_epoch, len(epochs) // 2)  # one epoch is short: half of it still makes a line
        smooth = np.convolve(result.losses, np.ones(window) / window, mode="valid")
        label = f"{name} (lr {result.lr:g}): test accuracy {result.test_accuracy:.1%}"
        top.semilogy(epochs, result.losses, color=colour, alpha=0.2, linewidth=0.8)
        top.semilogy(epochs[window - 1 :], smooth, color=colour, linewidth=2, label=label)
        bottom.plot(epochs, result.factors, color="#444444", linewidth=2)
    top.set(title="One classifier of handwritten digits, four optimizers", ylabel="training loss (cross entropy)")
    top.legend(title="Thin: each batch. Thick: running mean.", frameon=False, alignment="left")
    bottom.set(xlabel="epoch", ylabel="learning rate / peak", ylim=(0, 1.08))
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
