"""A heat map of a sweep shows its numbers, what is best and what has diverged."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure

import optimjax as optim
from optimjax.sweeps import Sweep

AXES = {"lr": np.array([0.001, 0.01, 0.1]), "weight_decay": np.array([0.0, 0.5])}
LOSSES = jnp.array([[2.0, 1.5], [0.1, 0.2], [jnp.nan, 9.0]])


def draw(*args: Any, **kwargs: Any) -> Any:
    return optim.plot.heat_map(*args, ax=Figure().subplots(), **kwargs)


def star(ax: Any) -> list[float]:
    """Its column and row."""
    (marked,) = ax.collections
    return marked.get_offsets().tolist()[0]


def test_two_numbers_across_each_other() -> None:
    ax = draw(Sweep(AXES, LOSSES))
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array().filled(np.nan), LOSSES)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("lr", "weight decay")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.001", "0.01", "0.1"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.5"]
    assert ax.get_title("left") == "★ best: lr 0.01, weight decay 0; grey: diverged"
    assert star(ax) == [0, 1]


def test_the_largest_may_be_the_best() -> None:
    ax = draw(Sweep(AXES, LOSSES), largest=True, label="accuracy")
    assert star(ax) == [1, 2]
    assert ax.figure.axes[1].get_ylabel() == "accuracy"


def test_one_number_across_the_steps() -> None:
    curves = jnp.array([[1.0, 0.9, 0.8], [1.0, 0.5, 0.3], [1.0, 0.1, jnp.inf]])
    ax = draw(Sweep({"lr": AXES["lr"]}, {"loss": curves}), lambda values: values["loss"])
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("lr", "step")
    assert ax.get_title("left") == "★ best: lr 0.01; grey: diverged"
    assert star(ax) == [2, 1]
    gone = draw(Sweep({"lr": AXES["lr"]}, curves.at[:, -1].set(jnp.nan)))
    assert (len(gone.collections), gone.get_title("left")) == (0, "grey: diverged")


def test_the_numbers_along_an_axis_are_few_and_evenly_spaced() -> None:
    ax = draw(Sweep({"lr": np.geomspace(1e-3, 1, 64), "b": np.arange(13)}, jnp.ones((64, 13))))
    assert ax.get_yticks().tolist() == list(range(0, 64, 9))
    assert ax.get_xticks().tolist() == [0, 3, 6, 9, 12]
    assert draw(Sweep({"lr": np.ones(1), "b": np.ones(1)}, jnp.ones((1, 1)))).get_yticks().tolist() == [0]


@pytest.mark.parametrize(
    ("values", "limits", "scale", "range_", "extend"),
    [
        ([[1.0, 100.0], [10.0, 20.0]], (1, 100), colors.LogNorm, (1, 100), "neither"),
        ([[1.0, 100.0], [10.0, 20.0]], (2, 50), colors.LogNorm, (2, 50), "both"),
        ([[1.0, 2.0], [3.0, 4.0]], (1, 3), colors.Normalize, (1, 3), "max"),
        ([[-1.0, 200.0], [3.0, 4.0]], (0, 200), colors.Normalize, (0, 200), "min"),
        ([[0.0, 1.0], [0.0, 1.0]], None, colors.Normalize, (0, 1), "neither"),
    ],
)
def test_colours(values: Any, limits: Any, scale: type, range_: Any, extend: str) -> None:
    ax = draw(Sweep({"a": np.arange(2), "b": np.arange(2)}, jnp.array(values)), limits=limits)
    (image,) = ax.get_images()
    assert type(image.norm) is scale
    assert (image.norm.vmin, image.norm.vmax) == range_
    assert image.colorbar.extend == extend


def test_what_has_nearly_diverged_leaves_colours_for_the_rest() -> None:
    losses = jnp.linspace(0.1, 2.0, 100).at[-2:].set(1e20).reshape(10, 10)
    (image,) = draw(Sweep({"a": np.arange(10), "b": np.arange(10)}, losses)).get_images()
    assert image.norm.vmax < 2.5


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (Sweep(AXES, jnp.ones((3, 2, 5))), r"over lr, weight_decay \(3, 2\), and .* has the shape \(3, 2, 5\)"),
        (Sweep({"lr": AXES["lr"]}, jnp.ones(3)), r"over lr \(3,\), and .* has the shape \(3,\)"),
        (Sweep({}, jnp.ones((3, 2))), r"over nothing \(\)"),
        (Sweep(AXES, {"loss": LOSSES}), "one array is needed, got dict"),
        (Sweep(AXES, LOSSES * jnp.nan), "all 6 numbers are NaN or infinite"),
    ],
)
def test_errors(sweep: Sweep, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(sweep)


def test_without_matplotlib(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"optim\.plot needs matplotlib: pip install matplotlib"):
        optim.plot.heat_map(Sweep(AXES, LOSSES))
