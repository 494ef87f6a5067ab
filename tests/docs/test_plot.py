"""Learning rates are drawn with labels and a fitting scale, and nothing is imported or changed without need."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import draw_schedulers
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import optimjax as optim
from optimjax import lr_scheduler, schedules


def build(*rates: float, **options: Any) -> Any:
    return optim.SGD([{"params": [jnp.ones(())], "lr": rate, **options} for rate in rates], lr=0.5)


def drawn(ax: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}


def draw(*args: Any, **kwargs: Any) -> Any:
    return optim.plot.learning_rate(*args, ax=Figure().subplots(), **kwargs)


def test_a_scheduler() -> None:
    optimizer = build(1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = scheduler.state_dict()
    ax = draw(scheduler, 4)
    assert list(drawn(ax).values()) == [[1.0, 0.5, 0.25, 0.125]]
    assert list(ax.get_lines()[0].get_xdata()) == [0, 1, 2, 3]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "learning rate")
    assert ax.get_legend() is None
    assert scheduler.state_dict() == before
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_groups_that_differ_have_a_line_each() -> None:
    optimizer = build(1.0, 2.0, 1.0)
    optimizer.param_groups[1]["name"] = "head"
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert drawn(draw(scheduler, 2)) == {"group 0, 2": [1.0, 0.5], "group head": [2.0, 1.0]}
    ax = draw({"fast": scheduler, "slow": schedules.exponential(1.0, 0.9)}, 2)
    assert list(drawn(ax)) == ["fast, group 0, 2", "fast, group head", "slow"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn(ax))
    assert len(drawn(draw(lr_scheduler.ExponentialLR(build(1.0, 1.0), 0.5), 2))) == 1


def test_schedules_and_lists() -> None:
    assert drawn(draw(schedules.exponential(1.0, 0.5), 3)).popitem()[1] == [1.0, 0.5, 0.25]
    assert drawn(draw(lambda count: jnp.array([1.0, 2.0]) * count, 2)) == {"group 0": [0, 1], "group 1": [0, 2]}
    ax = draw([lr_scheduler.StepLR(build(1.0), 3), schedules.step(1.0, 2), lambda count: 1 / (1 + count)], 5)
    assert list(drawn(ax)) == ["0: StepLR", "1: schedule", "2: schedule"]


def test_metrics_of_a_plateau() -> None:
    scheduler = lr_scheduler.ReduceLROnPlateau(build(1.0), factor=0.5, patience=0)
    ax = draw([scheduler, lr_scheduler.StepLR(build(1.0), 9)], 4, metrics=[1.0, 2.0, 3.0])
    assert list(drawn(ax).values()) == [[1.0, 1.0, 0.5, 0.25], [1.0] * 4]
    with pytest.raises(TypeError, match="needs the metric"):
        draw(scheduler, 4)


def test_the_number_that_is_scheduled_names_the_axis() -> None:
    optimizer = build(1.0, weight_decay=0.1)
    decay = lr_scheduler.LinearLR(optimizer, key="weight_decay")
    assert draw(decay, 3).get_ylabel() == "weight decay"
    assert draw([decay, lr_scheduler.StepLR(optimizer, 3)], 3).get_ylabel() == "learning rate and weight decay"


@pytest.mark.parametrize(
    ("schedule", "scale"),
    [
        (schedules.exponential(1.0, 0.5), "log"),
        (schedules.exponential(1.0, 0.99), "linear"),
        (schedules.cosine_annealing(1.0, 19), "linear"),  # to 0
        (schedules.one_cycle(1.0, 20), "log"),
    ],
)
def test_the_scale_follows_the_range(schedule: Any, scale: str) -> None:
    assert draw(schedule, 20).get_yscale() == scale


def test_axes_that_have_something_already() -> None:
    ax = Figure().subplots()
    assert optim.plot.learning_rate({"a": schedules.exponential(1.0, 0.5)}, 20, ax) is ax
    assert ax.get_yscale() == "log"
    optim.plot.learning_rate({"b": schedules.cosine_annealing(1.0, 19)}, 20, ax=ax)
    assert list(drawn(ax)) == ["a", "b"]
    assert ax.get_yscale() == "linear"


def test_axes_of_pyplot_unless_given() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    try:
        ax = optim.plot.learning_rate(schedules.exponential(1.0, 0.5), 3)
        assert ax is pyplot.gca()
        assert ax.figure.canvas.print_png  # it can be saved
    finally:
        pyplot.close("all")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.1, 5), TypeError, "expected a scheduler or a function count -> value, got 0.1"),
        (([schedules.step(1.0, 2), "cosine"], 5), TypeError, "got 'cosine'"),
        ((schedules.step(1.0, 2), 0), ValueError, "steps must be at least 1, got 0"),
        (([], 5), ValueError, "there is nothing to draw"),
    ],
)
def test_errors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(*arguments)


def test_matplotlib_is_imported_when_a_picture_is_drawn() -> None:
    script = "import sys, optimjax; optimjax.plot.learning_rate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_without_matplotlib(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"optim\.plot needs matplotlib: pip install matplotlib"):
        optim.plot.learning_rate(schedules.step(1.0, 2), 5)


def test_the_lines_are_as_long_as_the_steps() -> None:
    lines = draw({"a": schedules.step(1.0, 2), "b": lambda count: np.float32(count)}, 7).get_lines()
    assert [len(line.get_ydata()) for line in lines] == [7, 7]


def test_the_gallery_of_the_documentation_shows_every_scheduler() -> None:
    titles = [ax.get_title() for ax in draw_schedulers.draw().axes]
    assert set(titles) == set(lr_scheduler.__all__) - {"LRScheduler", "find_lr", "preview"}


def test_the_pages_list_every_scheduler_and_schedule() -> None:
    docs = Path(draw_schedulers.__file__).parent
    table = (docs / "lr_scheduler.md").read_text()
    for name in {*lr_scheduler.__all__} - {"LRScheduler", "find_lr", "preview"}:
        assert f"| `{name}`<br>" in table
    for name in {*schedules.__all__} - {"Plateau", "PlateauState", "Schedule", "warmup"}:
        assert f"<br>`{name}` |" in table
        assert f"`{name}`" in (docs / "schedules.md").read_text()
