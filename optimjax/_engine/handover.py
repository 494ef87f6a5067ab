"""How a step gives arrays to compiled programs and takes the results over, so that nothing is lost in between.

A program that updates arrays in place deletes those that it was given. From then on its results are all that is left of
the optimizer's state, until they are written back. Whatever happens meanwhile (Ctrl-C, an error, a look at the state
from the loss, a callback, a signal handler or another thread), parameters and state are afterwards those before the
step or those after it:

- User code runs before anything is given away. A loss function is traced and compiled first (:meth:`Program.compile`);
  planning the step again then finds out what it has looked at meanwhile (:meth:`Handover.launch`).
- Results enter a list by C code, during which Python handles no signal, and stay there until they are written back.
  Parameters are written first, which can be repeated, so an interrupt there loses nothing: whoever looks next begins it
  again. What the optimizer keeps, and that nothing is left to be written, is then set by one call of C code.
- A program that calls back into Python may raise while it runs. It updates nothing in place, and the step waits for it.
- Whoever looks at the state and whoever steps take turns, by a lock.
"""

import itertools
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import Any, NamedTuple

import jax

__all__ = ["Call", "Commit", "Handover", "Launch", "Program", "kind", "kinds"]


def kind(x: Any) -> Any:
    """What an executable depends on of an argument: shape and dtype of an array, the type of a number."""
    aval = getattr(x, "aval", None)
    if aval is not None:
        return aval
    return (x.shape, x.dtype) if hasattr(x, "dtype") else type(x)


def kinds(xs: list[Any]) -> list[Any]:
    """The kind of each, fast where all are arrays of JAX."""
    try:
        return [x.aval for x in xs]
    except AttributeError:
        return list(map(kind, xs))


class Executable:
    """What is known of one executable of a program.

    Attributes:
      calls_back: whether it calls Python while it runs.
      warm: whether it has run. The first time, JAX's own Python code stands around it.
    """

    __slots__ = ("calls_back", "warm")

    def __init__(self, calls_back: bool):
        self.calls_back, self.warm = calls_back, False


class Program:
    """A pure function, compiled once for each choice of arguments that it may update in place.

    What it returns must consist of tuples, lists, dicts and arrays: other nodes are put together by Python code, in
    which an interrupt would lose the results.

    Args:
      function: the function.
      static: how many of its first arguments are compiled in. JAX must not have to run Python code to compare them,
        because it turns an interrupt there into another error; so they go by identity, see
        :func:`optimjax._engine.interned.interned`.
    """

    def __init__(self, function: Callable[..., Any], static: int):
        self._function = function
        self._static = tuple(range(static))
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._executables: dict[Any, Executable] = {}
        self._last: tuple[Any, Executable] | None = None
        self._warm: Counter[tuple[int, ...]] = Counter()  # executables that have run, by what they update in place

    def donating(self, positions: tuple[int, ...]) -> Any:
        """The compiled function that takes the memory of the arguments at these positions for its results."""
        if positions not in self._compiled:
            function = self._function

            def program(*args: Any) -> Any:
                return function(*args)

            program.__name__ = function.__name__
            self._compiled[positions] = jax.jit(program, static_argnums=self._static, donate_argnums=positions)
        return self._compiled[positions]

    def executable(self, donated: tuple[int, ...], key: tuple[Any, ...]) -> Executable | None:
        """The executable that a call with this key runs, if it is compiled."""
        key = donated, *key
        if self._last is None or key != self._last[0]:  # comparing is cheaper than hashing
            if key not in self._executables:
                return None
            self._last = key, self._executables[key]
        return self._last[1]

    def compile(self, donated: tuple[int, ...], key: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        """Trace and compile, and run nothing."""
        try:
            traced = self.donating(donated).trace(*args)
            calls_back = _calls_back(traced.jaxpr.jaxpr, set())
            if calls_back:
                traced = self.donating(()).trace(*args)
            traced.lower().compile()
        except BaseException as error:
            if not isinstance(error, Exception):
                # JAX may go on to believe that what an interrupt has ended is under way, and refuse it for good.
                self._forget()
            raise
        self._executables[donated, *key] = Executable(calls_back)

    def _forget(self) -> None:
        self._last = None
        self._executables.clear()
        self._warm.clear()
        self._compiled.clear()

    def are_warm(self, donated: tuple[int, ...], executables: list[Executable]) -> bool:
        """Whether JAX runs these without Python code of its own around them."""
        if self.donating(donated)._cache_size() < self._warm[donated]:  # jax.clear_caches() has been called
            for executable in self._executables.values():
                executable.warm = False
            self._warm.clear()
        return all(executable.warm for executable in executables)

    def warmed(self, donated: tuple[int, ...], executables: list[Executable]) -> None:
        """Note that these have run."""
        for executable in executables:
            self._warm[donated] += not executable.warm
            executable.warm = True


def _calls_back(jaxpr: Any, seen: set[int]) -> bool:
    """Whether there is a callback in a jaxpr, or in one inside it."""
    if id(jaxpr) in seen:
        return False
    seen.add(id(jaxpr))
    for equation in jaxpr.eqns:
        if "callback" in equation.primitive.name:
            return True
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns") and _calls_back(inner, seen):
                    return True
    return False


Commit = Callable[[list[Any]], list[tuple[Any, str, Any]]]


class Call(NamedTuple):
    """One call of a program.

    Attributes:
      key: what decides which executable runs.
      args: the arguments.
    """

    key: tuple[Any, ...]
    args: tuple[Any, ...]


class Launch(NamedTuple):
    """Calls of a program that belong together: all of them count, or none.

    Attributes:
      program: the program.
      donated: positions of the arguments that it may update in place.
      calls: the calls.
      commit: takes the list of results, which an error may have made shorter than the calls; writes the parameters, and
        returns what remains to be set: ``(object, attribute, value)``. An interrupt may lead to a second call with the
        same results, which must make no difference.
    """

    program: Program
    donated: tuple[int, ...]
    calls: list[Call]
    commit: Commit


class Handover:
    """The turns of those who step and those who look, and the results that are not written back yet.

    Attributes:
      lock: to be held from the first look at what belongs together to the last.
      traced: whether the optimizer was made while JAX traced a function. Its arrays may then be tracers, and what is
        given to a program may be needed again, on the way back of a derivative.
      taken: how often somebody has taken slots that a step might have been planned with.
    """

    def __init__(self, traced: bool):
        self.lock = threading.RLock()
        self.traced = traced
        self._turn = threading.RLock()  # of whoever steps; those who look need not wait for a loss that calls back
        self.taken = 0
        self._results: list[Any] = []
        self._commit: Commit | None = None  # of the results
        self._pending: Iterator[Any] | None = None  # arguments of programs that are just being run
        self._count = 0  # of these programs

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Others wait meanwhile, and what may be looked at is complete; see :meth:`look`."""
        with self.lock:
            self.look()
            yield

    def look(self) -> None:
        """Complete what may be looked at; the lock must be held.

        Raises:
          RuntimeError: in the middle of a step. Only code that this very step runs can be there.
        """
        if self._pending is not None:
            if length_hint(self._pending) == self._count:
                # The handler of a signal has come first: emptied, it runs nothing, and the step plans again.
                deque(self._pending, 0)
            elif len(self._results) < self._count:
                raise RuntimeError(
                    "the optimizer is in the middle of a step, which is just updating what it keeps: look at it before "
                    "or after the step, not from a function that the step calls"
                )
            self._pending = None
        self._settle()

    def _settle(self) -> None:
        """Write results back; once more, where an interrupt has ended the first attempt."""
        while results := self._results:
            if (commit := self._commit) is None:
                continue  # the handler of a signal has just done it
            try:
                remaining = commit(results)
            except Exception:  # what raises here, such as a hook of a variable, would raise each time
                self._results = []
                raise
            assignments = itertools.starmap(setattr, [*remaining, (self, "_results", []), (self, "_commit", None)])
            # The handler of a signal may have looked, and so done all of this, until right before the call of C code.
            self._results is results and deque(assignments, 0)  # pyright: ignore[reportUnusedExpression]

    def launch(self, plan: Callable[[], Launch]) -> list[Any]:
        """Run what ``plan`` makes of the present values, and write the results back.

        Returns:
          The results, one for each call.
        """
        with self._turn:
            while True:
                with self.lock:
                    if self._results or self._pending is not None:
                        self.look()
                    taken = self.taken
                    try:
                        launch = plan()
                    except Exception:
                        if taken == self.taken:
                            raise
                        continue  # the handler of a signal has taken what was planned with
                    if self.traced or _debugging():
                        executables = None
                    else:
                        executables = [launch.program.executable(launch.donated, call.key) for call in launch.calls]
                        if launch.donated and all(one is not None and not one.calls_back for one in executables):
                            results = self._in_place(launch, executables, taken)
                            if results is None:
                                continue
                            return results
                if executables is None or None not in executables:
                    return self._apart(launch, executables)
                for call, executable in zip(launch.calls, executables, strict=True):
                    if executable is None:
                        launch.program.compile(launch.donated, *call)

    def _in_place(self, launch: Launch, executables: list[Any], taken: int) -> list[Any] | None:
        """Run programs that take the memory of what they are given; the lock is held.

        Returns:
          Their results; or ``None``, and nothing has run, where the handler of a signal has looked at what was planned
          with. ``taken`` is how often that had been done before.
        """
        results, program = self._results, launch.program.donating(launch.donated)
        arguments = [call.args for call in launch.calls]
        try:
            self._commit, self._count = launch.commit, len(arguments)
            self._pending = pending = iter(arguments)
            if taken != self.taken:
                self._pending = None
                return None
            # Both are C, and so is the call of a warm program: no signal is seen until the last result is in the list.
            if launch.program.are_warm(launch.donated, executables):
                results.extend(itertools.starmap(program, pending))
            else:
                with _signals_held():
                    results.extend(itertools.starmap(program, pending))
                launch.program.warmed(launch.donated, executables)
            self._pending = None
            self._settle()
        except BaseException:
            self._pending = None
            self._settle()
            raise
        return results if len(results) == len(arguments) else None

    def _apart(self, launch: Launch, executables: list[Any] | None) -> list[Any]:
        """Run programs that leave alone what they are given, and let others look meanwhile.

        One that calls back is waited for: its error must come before anything is written.
        """
        results = list(itertools.starmap(launch.program.donating(()), [call.args for call in launch.calls]))
        if executables is not None and any(executable.calls_back for executable in executables):
            jax.block_until_ready(results)
        with self.lock:
            self.look()
            try:
                self._commit, self._results = launch.commit, results
                self._settle()
            except BaseException:
                self._settle()
                raise
        return results


def _debugging() -> bool:
    """Whether JAX runs a program's Python code, or raises for a result that is not finite and needs the arguments."""
    config: Any = jax.config
    return config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs


@contextmanager
def _signals_held() -> Iterator[None]:
    """Handlers of signals that arrive meanwhile run at the end; in a thread other than the main one, none ever does."""
    arrived: list[tuple[Callable[..., Any], int, Any]] = []
    with ExitStack() as restore:
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    restore.callback(signal.signal, number, handler)
                    hold = lambda number, frame, handler=handler: arrived.append((handler, number, frame))  # noqa: E731
                    signal.signal(number, hold)
        yield
    for handler, number, frame in arrived:
        handler(number, frame)
