"""The demo of the command line runs from start to end, and says what is wrong when something is."""

import io
import os
import re
import subprocess
import sys

import pytest

from optimjax.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def python(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_demo_prints_table_and_writes_picture(tmp_path):
    result = python("-m", "optimjax", "demo", "--epochs", "1", "--out", "curves.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("SGD, momentum 0.9", "RMSprop", "Adam", "final loss", "test accuracy", "ms per step", "curves.png"):
        assert text in result.stdout
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@pytest.mark.parametrize("width", [40, 60, 80])
def test_fits_the_terminal(width):
    from rich.console import Console

    from optimjax import demo

    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    progress = demo._progress(console)
    for name in demo.OPTIMIZERS:
        progress.add_task(name, total=660, completed=660, loss=0.1234)
    console.print(progress.get_renderable())
    demo._report(console, dict.fromkeys(demo.OPTIMIZERS, demo.Result([], [], 0.01, 0.0123, 0.9876, 10.25)))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for name in demo.OPTIMIZERS:
        assert len(re.findall(rf"^\W*{name}\b", shown, re.MULTILINE)) >= 2, shown
    assert shown.count("660/660 loss 0.1234") == shown.count("98.8%") == shown.count("10.25") == 4


def test_dumb_terminal_is_as_wide_as_it_says(monkeypatch):
    from optimjax import demo

    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # for Rich: it is a terminal, though pytest has redirected the output
    monkeypatch.setenv("COLUMNS", "60")
    assert demo._console().width == 60


def test_every_optimizer_learns():
    from optimjax import demo

    data = demo.Data.load()
    for name, make_optimizer in demo.OPTIMIZERS.items():
        seen = []
        result = demo.train(make_optimizer, data, epochs=4, seed=0, report=seen.append)
        assert result.test_accuracy > 0.9, name
        assert result.final_loss < 0.15 * result.losses[0], name
        assert seen == result.losses
        assert 0 < result.ms_per_step < 1000
        assert result.factors[0] < 1 == max(result.factors)
        assert result.factors[-1] < 0.01


def test_same_seed_same_run():
    from optimjax import demo

    data = demo.Data.load()
    runs = [demo.train(demo.OPTIMIZERS["Adam"], data, 1, seed, lambda loss: None) for seed in (3, 3, 4)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses[0] != runs[2].losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --epochs 0", "--epochs: must be at least 1, got 0"),
        ("demo --epochs many", "--epochs: must be a whole number, got 'many'"),
        ("demo --seed -1", "--seed: must be at least 0, got -1"),
        ("demo --out absent/a.png", "--out: there is no directory 'absent'"),
        ("demo --out a.gif", "--out: must end in .png, got 'a.gif'"),
        ("demo --out folder.png", "--out: 'folder.png' is a directory"),
        ("demo --epoch-count 3", "unrecognized arguments: --epoch-count 3"),
        ("dmeo", "invalid choice: 'dmeo' (choose from"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m optimjax ")
    assert "train on the handwritten digits" in shown


def test_picture_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write everywhere
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "a.png")])
    assert "is not writable" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("package", ["matplotlib", "rich", "sklearn"])
def test_missing_extra(package, tmp_path):
    script = (
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Absent(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from optimjax.__main__ import main\n"
        "sys.exit(main(['demo', '--epochs', '1']))\n"
    )
    result = python("-c", script, cwd=tmp_path)
    assert result.returncode == 1
    install = 'pip install "optimjax[demo]", or pip install ".[demo]" in a clone'
    expected = f"The demo needs {package}, which is not installed: {install}\n"
    assert (result.stdout, result.stderr) == ("", expected)
    assert list(tmp_path.iterdir()) == []


def test_importing_optimjax_is_light():
    script = (
        "import sys, optimjax\n"
        "heavy = {'flax', 'matplotlib', 'rich', 'sklearn', 'torch', 'optax', 'equinox', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = python("-c", script)
    assert result.stdout == "[]\n", result.stderr
