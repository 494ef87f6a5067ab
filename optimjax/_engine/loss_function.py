"""Loss functions with the programs that they are compiled into, and what an optimizer remembers of them."""

import functools
import inspect
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from optimjax._engine.handover import Program

__all__ = ["LossFunction", "LossFunctions", "takes_no_arguments"]

REMADE = 8  # copies of one loss function, after which a warning comes
HELD = 64  # loss functions that compare by value, which an optimizer keeps


class LossFunction:
    """A loss function with the programs that it is compiled into.

    They refer to it weakly. So what it closes over is freed as soon as the user drops it, compiled constants included.
    """

    def __init__(self, function: Callable[..., Any]):
        try:
            self.function: Callable[[], Any] = weakref.ref(function)
        except TypeError:  # an object with slots
            self.function = lambda: function
        self._programs: dict[Any, Program] = {}
        self._accepts: set[tuple[int, tuple[str, ...]]] = set()

    def program(self, function: Callable[..., Any], static: int) -> Program:
        """The program of ``function(loss_fn, *args)``, the first ``static`` of whose arguments are compiled in."""
        if function not in self._programs:
            loss_fn = self.function

            def bound(*args: Any) -> Any:
                return function(loss_fn(), *args)

            bound.__name__ = function.__name__
            self._programs[function] = Program(bound, static)
        return self._programs[function]

    def check(self, count: int, names: tuple[str, ...], given_first: bool) -> None:
        """Whether it takes so many arguments and these by name, before JAX's tracebacks are around the error.

        Raises:
          TypeError: it takes others.
        """
        if (count, names) in self._accepts:  # looking at a signature is slow
            return
        function = self.function()
        try:
            inspect.signature(function).bind(*[None] * count, **dict.fromkeys(names))
        except TypeError as error:
            name = getattr(function, "__name__", "loss_fn")
            first = "optimizer.params, " * given_first
            advice = (
                "the optimizer passes the model or the tree that it was made from, so leave it out"
                if given_first
                else "an optimizer made from parameters of a module passes nothing, so give the module"
            )
            if given_first and takes_no_arguments(function):
                advice = f"it must take what the optimizer was made from, as in def {name}(model)"
            by_name = "".join(f", {name}=..." for name in names)
            raise TypeError(
                f"{name} is called as {name}({first}*args{by_name}) and cannot be: {error}; {advice}. "
                "has_aux and micro_batches are arguments of step and backward themselves"
            ) from None
        except ValueError:  # some functions have no signature
            pass
        self._accepts.add((count, names))


_known: "weakref.WeakKeyDictionary[Any, LossFunction]" = weakref.WeakKeyDictionary()  # shared by all optimizers


class LossFunctions:
    """The loss functions that an optimizer has been given.

    Those that compare by value, such as bound methods, may come as another object each time: they are kept here.
    """

    def __init__(self) -> None:
        self._held: dict[Any, LossFunction] = {}
        self._copies: Counter[Any] = Counter()  # by code

    def __call__(self, function: Callable[..., Any]) -> LossFunction:
        """The loss function of this callable.

        Raises:
          TypeError: it cannot be called, or has no hash.
        """
        if not callable(function):
            raise TypeError(f"loss_fn must be callable, got {type(function).__name__}: {function!r}")
        found = self.find(function)
        if found is None:
            try:
                hash(function)
            except TypeError as error:
                raise TypeError(
                    "what is compiled for a loss function is remembered by its hash, and this "
                    f"{type(function).__name__} has none ({error}): give a plain function, and what it reads among args"
                ) from None
            found = LossFunction(function)
            if isinstance(found.function, weakref.ref):
                _known[function] = found
            self._hold(function, found)
            self._warn_of_copies(function)
        return found

    def find(self, function: Any) -> LossFunction | None:
        """The same, if some optimizer has been given it before."""
        try:
            found = _known.get(function)
        except TypeError:  # no weak references, or no hash
            try:
                return self._held.get(function)
            except TypeError:
                return None
        if found is not None:
            self._hold(function, found)
        return found

    def _hold(self, function: Any, found: LossFunction) -> None:
        by_value = type(function).__eq__ is not object.__eq__ or not isinstance(found.function, weakref.ref)
        if by_value and function not in self._held:
            self._held[found.function()] = found
            if len(self._held) > HELD:
                del self._held[next(iter(self._held))]

    def _warn_of_copies(self, function: Any) -> None:
        while isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__wrapped__", function)  # of a jitted one
        code = getattr(function, "__code__", None)
        self._copies[code] += code is not None
        if self._copies[code] == REMADE:
            warnings.warn(
                f"{REMADE} copies of the loss function {getattr(function, '__name__', '')!r} have been given, and each "
                "is compiled by itself and kept, with what it closes over, as long as anyone holds it: define the "
                "function once, outside of the loop, and give it as arguments what changes",
                stacklevel=_level_of_user(),
            )

    def __reduce__(self) -> Any:
        return LossFunctions, ()


def _level_of_user() -> int:
    """The ``stacklevel`` at which a warning of the calling function names the user's line, not one of this package."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("optimjax."):
        frame, level = frame.f_back, level + 1
    return level


def takes_no_arguments(function: Callable[..., Any]) -> bool:
    """Whether a callable can be called without arguments, and not with one."""
    try:
        signature = inspect.signature(function)
        signature.bind()
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False
