"""Timing by turns: who is called when, what counts, when it ends, and what comes out."""

import time
from typing import Any

import pytest

from optimjax._command import timing
from optimjax._command.timing import Timings, interleaved


def test_contenders_take_turns_and_another_one_begins_each() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleaved(runs, rounds=3, warm_up=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(spent) for name, spent in timings.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_first_turns_do_not_count() -> None:
    slow = iter([0.05, 0.05])
    timings = interleaved({"a": lambda: time.sleep(next(slow, 0))}, rounds=20, warm_up=2)
    assert max(timings.seconds["a"]) < 0.05


@pytest.mark.parametrize(
    ("spent", "seconds", "turns"),
    [
        (1.0, 10, 2 + 11),  # after two that do not count, until ten seconds have gone by
        (1.0, 2, 2 + 5),  # five are made in any case
        (6.0, 7, 2 + 4),  # but not if they take three times as long
        (50.0, 7, 1 + 2),  # a first one that is slow is the only one that does not count
    ],
)
def test_when_it_ends(monkeypatch: Any, spent: float, seconds: float, turns: int) -> None:
    now, calls = [0.0], []

    def run() -> None:
        now[0] += spent
        calls.append(now[0])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    interleaved({"a": run}, seconds=seconds, warm_up=2)
    assert len(calls) == turns


def test_what_comes_out() -> None:
    timings = Timings({"a": [1.0, 2.0, 30.0, 4.0, 5.0], "b": [2.0, 2.0, 20.0, 8.0, 50.0]})
    assert timings.median("a") == 4
    assert timings.ratio("a", "b") == 0.5  # the median of the ratios, and not that of the medians
    assert timings.quartiles("a", "b") == (0.5, 1.0)


def test_arrays_are_waited_for() -> None:
    class Array:
        waited = False

        def block_until_ready(self) -> "Array":
            self.waited = True
            return self

    array = Array()
    timing.timed(lambda: array)
    assert array.waited
