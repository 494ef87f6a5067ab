"""Whatever happens in a step, parameters and state are afterwards those before it or those after it, whole."""

import copy
import functools
import gc
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax._engine.handover import Program
from optimjax.swa_utils import AveragedModel

START = {"a": jnp.arange(6.0).reshape(2, 3) / 4, "b": jnp.array([0.5, -1.0])}


def loss_fn(params: Any) -> Any:
    return sum(jnp.sum(jnp.sin(leaf) ** 2) for leaf in jax.tree.leaves(params))


gradient = jax.jit(jax.grad(loss_fn))


def by_loss(optimizer: Any) -> None:
    optimizer.step(loss_fn)


def by_gradients(optimizer: Any) -> None:
    optimizer.step(gradient(optimizer.params))


def by_backward(optimizer: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(loss_fn)
    optimizer.step()


@dataclass(frozen=True)
class Form:
    """A way to step, and the number of updates that it counts."""

    step: Callable[[Any], None]
    make: Callable[..., Any] = lambda: optim.NAdam(START, lr=0.05)  # three slots, one of them a number

    def optimizer(self, donate: bool) -> Any:
        optimizer = self.make()
        optimizer.donate = donate
        for box in optimizer.param_groups[0]["params"]:
            box.value = jnp.copy(box.value)  # so that START can be used again
        return optimizer


FORMS = {
    "loss": Form(by_loss),
    "gradients": Form(by_gradients),
    "backward": Form(by_backward),
    # One iteration a step, so that the parameters go on moving.
    "LBFGS": Form(by_loss, lambda: optim.LBFGS(START, lr=0.05, max_iter=1)),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
both_ways = pytest.mark.parametrize("donate", [False, True], ids=["copying", "in place"])


def contents(optimizer: Any) -> Any:
    """All numbers of parameters and state."""
    return jax.tree.map(np.array, (optimizer.params, optimizer.state_dict()["state"]))


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
    place = optimizer.state[optimizer.param_groups[0]["params"][0]].place
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


# --- Errors while a program runs -------------------------------------------------------------------------------------


def equinox_error(x: Any) -> Any:
    return eqx.error_if(x, jnp.isnan(x), "bad batch")


def raise_for_nan(x: Any) -> Any:
    if np.isnan(x):
        raise ValueError("bad batch")
    return np.float32(x)


def pure_callback(x: Any) -> Any:
    return jax.pure_callback(raise_for_nan, jax.ShapeDtypeStruct((), x.dtype), x)


def debug_callback(x: Any) -> Any:
    jax.debug.callback(raise_for_nan, x)
    return x


def inside_a_loop(x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: (pure_callback(carry), None), x, length=2)[0]


@pytest.mark.parametrize("check", [equinox_error, pure_callback, debug_callback, inside_a_loop])
@pytest.mark.parametrize("name", ["loss", "backward", "LBFGS"])
@both_ways
@pytest.mark.filterwarnings("ignore")
def test_an_error_in_the_loss_while_it_runs(check: Any, name: str, donate: bool) -> None:
    def checked(params: Any, x: Any) -> Any:
        return loss_fn(params) * check(x)

    def step(optimizer: Any, x: float) -> None:
        if name == "backward":
            optimizer.zero_grad()
            optimizer.backward(checked, jnp.float32(x))
            optimizer.step()
        else:
            optimizer.step(checked, jnp.float32(x))

    optimizer, twin = FORMS[name].optimizer(donate), FORMS[name].optimizer(False)
    for x in (1.0, 1.0, np.nan, 1.0, np.nan, 1.0):
        if np.isnan(x):
            with pytest.raises(Exception, match="bad batch"):
                step(optimizer, x)
        else:
            step(optimizer, x)
            step(twin, x)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


@pytest.mark.parametrize("name", ["gradients", "loss"])
def test_debug_nans_switched_on_after_the_first_steps(name: str) -> None:
    def loss(params: Any, x: Any) -> Any:
        return loss_fn(params) * x

    def step(optimizer: Any, x: float) -> None:
        if name == "loss":
            optimizer.step(loss, jnp.float32(x))
        else:
            optimizer.step(jax.tree.map(lambda p: jnp.full_like(p, x), START))

    optimizer, twin = FORMS["loss"].optimizer(False), FORMS["loss"].optimizer(False)
    step(optimizer, 1.0)
    step(twin, 1.0)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        step(optimizer, np.nan)
    step(optimizer, 1.0)
    step(twin, 1.0)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


def test_without_compilation_an_error_in_the_loss_changes_nothing() -> None:
    optimizer, twin = FORMS["loss"].optimizer(True), FORMS["loss"].optimizer(True)

    def fails(params: Any) -> Any:
        raise ArithmeticError("of the user")

    with jax.disable_jit():
        by_loss(optimizer)
        with pytest.raises(ArithmeticError):
            optimizer.step(fails)
    by_loss(optimizer)
    by_loss(twin)
    by_loss(twin)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), contents(optimizer), contents(twin))


# --- Looking ---------------------------------------------------------------------------------------------------------


LOOKS = {
    "state": lambda optimizer: dict(optimizer.state[optimizer.param_groups[0]["params"][0]]),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).state_dict(),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).state_dict(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("name", ["loss", "backward", "LBFGS"])
@pytest.mark.parametrize("when", ["traced", "run"])
def test_looking_from_the_loss(look: Any, name: str, when: str) -> None:
    """It sees what was before the step, and what it has seen stays valid."""
    form = FORMS[name]
    optimizer, twin = form.optimizer(False), form.optimizer(False)
    seen: list[Any] = []

    def looking(params: Any) -> Any:
        if when == "traced":
            with jax.ensure_compile_time_eval():
                seen.append(look(optimizer))
        else:
            jax.debug.callback(lambda: seen.append(look(optimizer)))
        return loss_fn(params)

    def step(optimizer: Any, loss: Any) -> None:
        if name == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss)
            optimizer.step()
        else:
            optimizer.step(loss)

    for _ in range(2):
        form.step(optimizer)
        form.step(twin)
    for _ in range(3):
        step(optimizer, looking)
        form.step(twin)
    jax.effects_barrier()
    assert seen
    assert jax.tree.leaves(seen)
    for leaf in jax.tree.leaves(seen):
        np.asarray(leaf)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), contents(optimizer), contents(twin)
    )


def test_looking_where_it_cannot_be_right_raises_at_once() -> None:
    """A program that is compiled again in the middle of a step, because JAX was told to forget it."""
    optimizer, twin = FORMS["loss"].optimizer(False), FORMS["loss"].optimizer(False)
    errors: list[str] = []

    def looking(params: Any) -> Any:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            errors.append(str(error))
        return loss_fn(params)

    optimizer.step(looking)
    optimizer.step(looking)
    assert not errors
    jax.clear_caches()
    optimizer.step(looking)
    assert "in the middle of a step" in errors[0]
    for _ in range(3):
        by_loss(twin)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("name", ["loss", "gradients", "LBFGS"])
def test_looking_from_another_thread(look: Any, name: str) -> None:
    form = FORMS[name]
    optimizer, twin = form.optimizer(False), form.optimizer(False)
    seen: list[Any] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(look(optimizer))
            del seen[:-3]

    form.step(optimizer)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for _ in range(20):
            form.step(optimizer)
    finally:
        stop.set()
        thread.join()
    for leaf in jax.tree.leaves(seen):
        np.asarray(leaf)
    for _ in range(21):
        form.step(twin)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), contents(twin))


def test_a_state_dict_taken_while_another_thread_steps_is_of_one_moment() -> None:
    params = {str(index): jnp.ones(2) for index in range(20)}
    optimizer = optim.Adam(params, lr=0.1)
    optimizer.step(params)
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            optimizer.step(params)

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for _ in range(30):
            state = optimizer.state_dict()["state"]
            assert len({entry["step"] for entry in state.values()}) == 1
            copied = copy.deepcopy(optimizer)
            assert len({copied.state[box]["step"] for box in copied.param_groups[0]["params"]}) == 1
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("callback", [False, True])
def test_two_threads_that_step_one_optimizer_take_turns(callback: bool) -> None:
    optimizer = optim.SGD({"w": jnp.zeros(2)}, lr=1.0, momentum=0.0)
    optimizer.donate = True

    def loss(params: Any) -> Any:
        if callback:
            jax.debug.callback(lambda: None)
        return jnp.sum(params["w"])

    optimizer.step(loss)
    threads = [threading.Thread(target=lambda: [optimizer.step(loss) for _ in range(40)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(optimizer.params["w"], [-121, -121])


# --- Parameters that are updated in place ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [by_loss, by_gradients], ids=["loss", "gradients"])
def test_copies_and_averages_stay_valid_under_donate(step: Any) -> None:
    optimizer = FORMS["loss"].optimizer(True)
    averaged = AveragedModel(optimizer.params)
    for _ in range(2):
        step(optimizer)
        averaged.update_parameters(optimizer.params)
    best = copy.deepcopy(optimizer)
    kept = contents(best)
    step(optimizer)
    jax.tree.map(np.testing.assert_array_equal, contents(best), kept)
    before = contents(optimizer)
    step(best)
    jax.tree.map(np.testing.assert_array_equal, contents(optimizer), before)
    step(optimizer)
    assert np.isfinite(averaged.module["a"]).all()


def test_one_array_for_two_parameters_under_donate() -> None:
    def optimizer(donate: bool) -> Any:
        same = jnp.array([1.0, -2.0])
        made = optim.SGD({"a": same, "b": same, "c": jnp.ones(100)}, lr=0.1, momentum=0.9)
        made.donate = donate
        return made

    def product(params: Any) -> Any:
        return jnp.sum(params["a"] * params["b"] ** 2) + jnp.sum(params["c"] ** 2)

    ours, expected = optimizer(True), optimizer(False)
    for each in (ours, expected):
        each.step(product)
        each.step(jax.grad(product)(each.params))
    jax.tree.map(np.testing.assert_array_equal, contents(ours), contents(expected))


@pytest.mark.parametrize("name", ["gradients", "loss", "LBFGS"])
def test_a_parameter_as_gradient_or_argument_under_donate(name: str) -> None:
    def distance(params: Any, old: Any) -> Any:
        return sum(jnp.sum((2 * a - b) ** 2) for a, b in zip(params.values(), old.values(), strict=True))

    results = []
    for donate in (True, False):
        optimizer = FORMS[name].optimizer(donate)
        for _ in range(2):
            params = optimizer.params
            optimizer.step(params) if name == "gradients" else optimizer.step(distance, params)
        results.append(contents(optimizer))
    jax.tree.map(np.testing.assert_array_equal, *results)


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


# --- Memory ----------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("form", ["loss", "backward", "LBFGS", "method", "partial"])
def test_a_loss_is_freed_with_what_it_closes_over(form: str) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.data = jnp.ones((100, 100))

        def loss(self, params: Any) -> Any:
            return ((self.data @ params["w"]) ** 2).mean()

    def trial() -> None:
        trainer = Trainer()
        optimizer = (optim.LBFGS if form == "LBFGS" else optim.Adam)({"w": jnp.ones(100)})
        data = trainer.data
        loss: Any = lambda params: ((data @ params["w"]) ** 2).mean()  # noqa: E731
        if form == "method":
            loss = trainer.loss
        if form == "partial":
            loss = functools.partial(lambda data, params: ((data @ params["w"]) ** 2).mean(), data)
        if form == "backward":
            optimizer.backward(loss)
        optimizer.step(*[loss] * (form != "backward"))

    trial()
    before = live_bytes()
    for _ in range(3):
        trial()
    assert live_bytes() == before


def test_an_optimizer_is_freed_without_the_cycle_collector() -> None:
    def trial(cls: Any) -> None:
        optimizer = cls({"w": jnp.ones(10)})
        loss = lambda params: jnp.sum(params["w"] ** 2)  # noqa: E731
        for _ in range(2):
            optimizer.step(loss)
        if cls is not optim.LBFGS:
            optimizer.step({"w": jnp.ones(10)})
            optimizer.backward(loss)
        optimizer.state_dict()
        optimizer.step(loss)

    for cls in (optim.Adam, optim.Adagrad, optim.LBFGS):
        trial(cls)
        before = live_bytes()
        gc.disable()
        try:
            trial(cls)
            assert sum(array.nbytes for array in jax.live_arrays()) == before
        finally:
            gc.enable()


@pytest.mark.parametrize("form", ["partial", "lambda", "jitted"])
def test_copies_of_one_loss_function_are_warned_of(form: str) -> None:
    optimizer = optim.SGD({"w": jnp.ones(())}, lr=0.1)

    def square(params: Any, k: float = 1.0) -> Any:
        return k * params["w"] ** 2

    def copies() -> Iterator[Any]:
        for _ in range(10):
            yield {
                "partial": functools.partial(functools.partial(square), k=2.0),
                "lambda": lambda params: square(params),
                "jitted": jax.jit(lambda params: square(params)),
            }[form]

    with pytest.warns(UserWarning, match="8 copies of the loss function '(square|<lambda>)'.*and kept") as warned:
        losses = [optimizer.step(copied) for copied in copies()]
    assert len(losses) == 10
    assert [warning.filename for warning in warned] == [__file__]


def test_a_bound_method_and_equal_objects_are_one_loss_function(compilations: Any) -> None:
    @dataclass(frozen=True)
    class Scaled:
        k: float

        def __call__(self, params: Any) -> Any:
            return self.k * jnp.sum(params["w"] ** 2)

        def method(self, params: Any) -> Any:
            return self(params)

    one = Scaled(2.0)
    first, second = (optim.SGD({"w": jnp.ones(2)}, lr=0.1) for _ in range(2))
    first.step(one.method)
    first.step(Scaled(3.0))
    before = compilations()
    for optimizer in (first, second):
        for _ in range(2):
            optimizer.step(one.method)
            optimizer.step(Scaled(3.0))
    assert compilations() == before


# --- Memory of NumPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["step(grads)", "step(loss)", "backward"])
def test_a_buffer_of_numpy_may_be_filled_again(form: str) -> None:
    optimizer = optim.SGD({"w": jnp.zeros(10**6)}, lr=1.0)
    buffer = np.empty(10**6, np.float32)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(params["w"] * x)

    for _ in range(4):
        buffer[:] = 1
        if form == "step(grads)":
            optimizer.step({"w": buffer})
        elif form == "step(loss)":
            optimizer.step(loss, buffer)
        else:
            optimizer.zero_grad()
            optimizer.backward(loss, buffer)
            optimizer.step()
        buffer[:] = -1e6
    np.testing.assert_array_equal(optimizer.params["w"], -4)
