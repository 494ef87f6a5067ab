"""An interrupt at any moment leaves parameters and state those before a step or those after it, whole."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms_of_step import FORMS, START, Form, both_ways, by_loss, contents

import optimjax as optim
from optimjax._engine.handover import Program

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


class Trajectory:
    """What an optimizer must hold after each number of undisturbed steps."""

    def __init__(self, form: Form, donate: bool):
        self._optimizer, self._form = form.optimizer(donate), form
        self._found = [contents(self._optimizer)]

    def count_of(self, optimizer: Any) -> int:
        """After how many steps the optimizer is, or the test fails."""
        held = contents(optimizer)
        for count in range(50):
            if count == len(self._found):
                self._form.step(self._optimizer)
                self._found.append(contents(self._optimizer))
            if jax.tree.structure(held) == jax.tree.structure(self._found[count]) and all(
                map(np.array_equal, jax.tree.leaves(held), jax.tree.leaves(self._found[count]))
            ):
                return count
        pytest.fail(f"no number of steps leads to {held}")


@contextmanager
def interrupted(where: Callable[[], bool], ours: bool = False) -> Iterator[list[int]]:
    """Ctrl-C as soon as ``where`` holds at the beginning of a line of Python.

    Args:
      where: the condition.
      ours: whether only lines of this package count. JAX itself does not survive an interrupt at each of its lines.

    Yields:
      A list, which is empty until then.
    """
    done: list[int] = []
    package = os.path.dirname(optim.__file__)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if ours and not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line" and not done and where():
            done.append(1)
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield done
    finally:
        sys.settrace(before)


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@every_form
@both_ways
def test_an_interrupt_at_any_line_of_a_step(form: Form, donate: bool) -> None:
    trajectory = Trajectory(form, donate)
    for line in range(10_000):
        if line % 10 == 0:
            optimizer, steps = form.optimizer(donate), 0
        form.step(optimizer)
        form.step(optimizer)  # from what the step before it has left, by programs that are compiled
        left = iter(range(line, -1, -1))
        try:
            with interrupted(lambda left=left: next(left, None) == 0) as done:
                form.step(optimizer)
        except KeyboardInterrupt:
            pass
        if not done:
            assert line > 50
            return
        if line % 2:  # else go on without a look
            assert trajectory.count_of(optimizer) - steps in (2, 3)
        form.step(optimizer)
        after = trajectory.count_of(optimizer)
        assert after - steps in (3, 4)
        steps = after
    pytest.fail("a step has no end")


@every_form
@both_ways
def test_an_interrupt_as_soon_as_a_first_step_has_given_its_arrays_away(form: Form, donate: bool) -> None:
    """JAX's own Python code stands around the first run of a program."""
    trajectory, optimizer = Trajectory(form, donate), form.optimizer(donate)
    form.step(optimizer)
    place = next(iter(optimizer.state.values())).place
    given = jax.tree.leaves(place.state if hasattr(place, "state") else place.slots)
    jax.clear_caches()
    try:
        with interrupted(lambda: any(slot.is_deleted() for slot in given)) as done:
            form.step(optimizer)
    except KeyboardInterrupt:
        pass
    assert done
    assert trajectory.count_of(optimizer) in (1, 2)
    form.step(optimizer)
    trajectory.count_of(optimizer)


@every_form
@both_ways
def test_real_interrupts(form: Form, donate: bool) -> None:
    """By a timer, while programs run. ``INTERRUPTS`` of the environment says how many of them.

    Not while JAX compiles: now and then (one interrupt of 245), it then refuses that computation for good.
    """
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    trajectory, random = Trajectory(form, donate), np.random.default_rng(0)
    interrupts = 0
    try:
        while interrupts < int(os.environ.get("INTERRUPTS", "12")):
            optimizer = form.optimizer(donate)
            form.step(optimizer)
            form.step(optimizer)
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 4e-3))
                for _ in range(30):
                    form.step(optimizer)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            count = trajectory.count_of(optimizer)
            form.step(optimizer)
            assert trajectory.count_of(optimizer) == count + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_an_interrupt_while_a_program_is_compiled() -> None:
    """The next attempt does not meet what JAX remembers of the interrupted one."""
    program = Program(lambda _, x: jax.lax.sin(x), static=1)
    original, program._function = program._function, lambda _, x: signal.raise_signal(signal.SIGINT)
    program._function.__name__ = "interrupted"
    arguments = object(), jnp.ones(2)
    with pytest.raises(KeyboardInterrupt):
        program.compile((1,), arguments[:1], arguments)
    program._function = original
    program.compile((1,), arguments[:1], arguments)
    np.testing.assert_allclose(program.donating((1,))(*arguments), np.sin([1, 1]), rtol=1e-6)


def test_a_handler_of_a_signal_may_save_the_state() -> None:
    """As when a scheduler of jobs announces the end; the handler may come in the middle of a step."""
    optimizer, trajectory = FORMS["loss"].optimizer(donate=True), Trajectory(FORMS["loss"], donate=True)
    saved = []
    before = signal.signal(signal.SIGINT, lambda *_: saved.append(contents(optimizer)))
    try:
        for line in range(700):
            by_loss(optimizer)
            left = iter(range(line, -1, -1))
            with interrupted(lambda left=left: next(left, None) == 0):
                by_loss(optimizer)
            if line % 10 == 0:
                optimizer = FORMS["loss"].optimizer(donate=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(saved) > 20
    for numbers in saved:
        assert np.isfinite(numbers[0]["a"]).all()
    trajectory.count_of(optimizer)


# --- Half-changed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [10**400, jnp.array(1 + 0j)])
def test_a_group_that_is_refused_is_not_there(lr: Any) -> None:
    optimizer = optim.Adagrad({"w": jnp.ones(2)}, lr=0.1)
    with pytest.raises((TypeError, ValueError), match=r"lr of param_groups\[1\]"):
        optimizer.add_param_group({"params": {"v": jnp.ones(2)}, "lr": lr})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    optimizer.step({"w": jnp.ones(2)})


def test_an_interrupt_while_a_group_is_added() -> None:
    for line in range(10_000):
        optimizer = optim.Adagrad([{"params": {"w": jnp.ones(2)}}], lr=0.1)
        left = iter(range(line, -1, -1))
        try:
            with interrupted(lambda left=left: next(left, None) == 0, ours=True) as done:
                optimizer.add_param_group({"params": {"v": jnp.ones(2)}})
        except KeyboardInterrupt:
            pass
        optimizer.step([{key: jnp.ones(2) for key in part} for part in optimizer.params])
        if not done:
            assert len(optimizer.params) == 2
            return


def test_a_loss_that_raises_makes_no_slots() -> None:
    optimizer = optim.Adam(START, lr=0.1)
    by_loss(optimizer)
    optimizer.param_groups[0]["amsgrad"] = True

    def fails(params: Any) -> Any:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    assert "max_exp_avg_sq" not in optimizer.state_dict()["state"][0]
    by_loss(optimizer)
    assert "max_exp_avg_sq" in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("what", ["state", "functional state"])
def test_an_interrupt_while_a_state_is_loaded(what: str) -> None:
    source = FORMS["loss"].optimizer(False)
    for _ in range(2):
        by_loss(source)
    trajectory = Trajectory(FORMS["loss"], False)
    for line in range(0, 100_000, 5):
        optimizer = FORMS["loss"].optimizer(False)
        by_loss(optimizer)
        left = iter(range(line, -1, -1))
        try:
            with interrupted(lambda left=left: next(left, None) == 0, ours=True) as done:
                if what == "state":
                    optimizer.load_state_dict(source.state_dict())
                else:
                    optimizer.load_functional_state(*source.functional_state())
        except KeyboardInterrupt:
            pass
        loaded = optimizer.state_dict()["state"][0]["step"] == 2
        if what == "functional state":
            assert trajectory.count_of(optimizer) == (2 if loaded else 1)
        by_loss(optimizer)
        if not done:
            assert loaded
            return
    pytest.fail("loading has no end")
