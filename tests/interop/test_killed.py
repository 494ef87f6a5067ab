"""A process that is killed (SIGKILL) and started again does, bit for bit, the run that nobody killed."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import resumable

import optimjax as optim


def start(path: Path) -> Any:
    return subprocess.Popen([sys.executable, resumable.__file__, path], stdout=subprocess.PIPE, text=True)


def follow(process: Any, last: int = -1, wait: Callable[[], None] = lambda: None) -> dict[int, str]:
    """The loss of each step that it comes to; after the step ``last`` it is killed."""
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"{last} "):
                wait()
                process.kill()
                break
    assert process.returncode == (0 if last == -1 else -signal.SIGKILL)
    return losses_in(lines)


def losses_in(lines: Iterable[str]) -> dict[int, str]:
    return {int(step): loss for step, loss in map(str.split, lines)}


def during_a_save(folder: Path) -> None:
    """Return as soon as a file is there that is being written."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end and not any(path.name.startswith(".") for path in folder.iterdir()):
        pass


def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed" / "run.safetensors"
    killed.parent.mkdir()
    first = follow(start(killed), last=4)  # between two saves
    second = follow(start(killed), last=8, wait=lambda: during_a_save(killed.parent))
    third = follow(start(killed))
    resumable.main(whole)
    expected = losses_in(capsys.readouterr().out.splitlines())

    assert list(expected) == list(range(resumable.STEPS))
    assert (min(first), min(second)) == (0, 3)
    assert min(third) in (6, 9)  # either the save was through or it was as if it had never begun
    assert max(third) == resumable.STEPS - 1
    for losses in (first, second, third):
        assert losses.items() <= expected.items()
    assert len(set(expected.values())) == resumable.STEPS

    ours, theirs = optim.load(killed), optim.load(whole)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert list(map(exactly, jax.tree.leaves(ours))) == list(map(exactly, jax.tree.leaves(theirs)))


def exactly(x: Any) -> Any:
    if isinstance(x, jax.Array):
        x = np.asarray(jax.random.key_data(x))
    return (x.dtype, x.tobytes()) if isinstance(x, np.ndarray) else (type(x), repr(x))
