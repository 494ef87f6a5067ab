"""Many trainings at once: one function of numbers, run for every combination of their values by one program."""

import inspect
import math
import reprlib
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax._core.processors import usable_cores

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` returns.

    Attributes:
      axes: the values of each number, by name, in the order in which they were given; each an array ``[n]``.
      values: what the function has returned, each array with one more axis in front for each of ``axes``.
    """

    axes: dict[str, np.ndarray]
    values: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each number has."""
        return tuple(map(len, self.axes.values()))

    def mean(self, *names: str) -> "Sweep":
        """The mean over some of the numbers, usually the seed. What has diverged for one of them has no finite mean.

        Raises:
          ValueError: there is no number of that name.
        """
        for name in names:
            if name not in self.axes:
                raise ValueError(f"there is no axis {name!r}, only {', '.join(map(repr, self.axes)) or 'none'}")
        places = tuple(index for index, name in enumerate(self.axes) if name in names)
        rest = {name: values for name, values in self.axes.items() if name not in names}
        return Sweep(rest, jax.tree.map(lambda array: jnp.mean(array, axis=places), self.values))

    def best(self, select: Callable[[Any], Any] | None = None, *, largest: bool = False) -> dict[str, Any]:
        """The values with which the least came out. A run that came to NaN or infinity is never the best.

        Args:
          select: ``select(values)`` is one number for each run, an array of :attr:`shape`; by default ``values`` are
            these numbers.
          largest: look for the largest instead, for an accuracy.

        Returns:
          The value of each number, by name; the first ones of equally good.

        Raises:
          ValueError: there is not one number for each run, or none is finite.
        """
        scores = self.scores(select)
        if scores.shape != self.shape:
            raise ValueError(
                f"one number is needed for each run, an array of shape {self.shape}, got {scores.shape}: let select "
                "choose it, as in select=lambda losses: losses[..., -1]"
            )
        finite = np.isfinite(scores)
        if not finite.any():
            raise ValueError(f"all {scores.size} runs have diverged: none has come to a finite number")
        place = np.where(finite, -scores if largest else scores, np.inf).argmin()
        places = np.unravel_index(place, scores.shape)
        return {name: values[index].item() for (name, values), index in zip(self.axes.items(), places, strict=True)}

    def scores(self, select: Callable[[Any], Any] | None = None) -> np.ndarray:
        """``select(values)`` as an array of floats; ``values`` themselves if nothing is to be selected.

        Raises:
          ValueError: it is not one array.
        """
        chosen = self.values if select is None else select(self.values)
        if not isinstance(chosen, (jax.Array, np.ndarray)):
            raise ValueError(
                f"one array is needed, got {type(chosen).__name__}: let select choose it, as in "
                'select=lambda values: values["loss"]'
            )
        return np.asarray(chosen, float)


def sweep(function: Callable[..., Any], /, *, at_once: int | None = None, **axes: Iterable[Any]) -> Sweep:
    """Call a function for every combination of some numbers, compiled once and by ``jax.vmap``.

    Args:
      function: pure, as for ``jax.jit``; called by keyword, ``function(lr=..., seed=...)``, with a scalar for each
        of ``axes``. Returns any tree of arrays, such as the losses ``[steps]`` of a training. It is compiled once for
        each function object and number of runs.
      at_once: how many runs are made at the same time; all of them unless given. Fewer take less memory.
      axes: the values of each number, by name: sequences or arrays ``[n]`` of real numbers.

    Returns:
      A :class:`Sweep`. Runs do not know of each other: one that comes to NaN leaves the others as they are.

    Raises:
      TypeError: the function does not take these names, or the values are not numbers. What decides what is compiled
        (an algorithm, ``nesterov``, the width of a layer) cannot be swept: make a sweep for each.
      ValueError: no axes, values that are not a sequence, or none of them; ``at_once`` is not positive.
      RuntimeError: called inside a function that is being transformed.

    >>> import jax, jax.numpy as jnp, optimjax as optim
    >>> def train(lr, momentum):
    ...     sgd, start = optim.functional.sgd(lr=lr, momentum=momentum), jnp.array([3.0, -2.0])
    ...     loss_fn = lambda x: jnp.sum(jnp.array([1.0, 10.0]) * x**2)
    ...     def step(carry, _):
    ...         params, state = carry
    ...         return sgd.update(params, jax.grad(loss_fn)(params), state), None
    ...     (params, _), _ = jax.lax.scan(step, (start, sgd.init(start)), length=30)
    ...     return loss_fn(params)
    >>> result = optim.sweep(train, lr=[0.01, 0.03, 0.3], momentum=[0.0, 0.5, 0.9])
    >>> print(result.values.shape, result.best())
    (3, 3) {'lr': 0.03, 'momentum': 0.5}
    """
    points = {name: _axis(name, values) for name, values in axes.items()}
    if not points:
        raise ValueError("sweep needs the values of at least one number, as in sweep(train, lr=[0.01, 0.1])")
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    _check_call(function, points)
    shape = tuple(map(len, points.values()))
    grid = np.meshgrid(*points.values(), indexing="ij")
    columns = {name: np.ravel(column) for name, column in zip(points, grid, strict=True)}
    whole = _run(_program(function), columns, math.prod(shape), at_once)
    return Sweep(points, jax.tree.map(lambda array: array.reshape(shape + array.shape[1:]), whole))


def _run(program: Any, columns: dict[str, np.ndarray], total: int, at_once: int | None) -> Any:
    """The results of all runs, along the first axis of each array.

    On a CPU the runs are spread over as many threads as there are cores, because a program with a loop leaves most of
    the others idle: 64 runs of 200 steps of a small network took 0.38 of the time on two cores, and 0.9 of it while
    these were busy with other work.
    """
    each = total if at_once is None else min(at_once, total)
    probe = jnp.zeros(())
    if isinstance(probe, Tracer):
        raise RuntimeError(
            "sweep was called under jax.jit or the like, but compiles and runs by itself: there, use jax.vmap"
        )
    on_cpu = all(device.platform == "cpu" for device in probe.devices())
    threads = min(usable_cores(), each) if on_cpu else 1
    size = -(-each // threads)

    def part(start: int) -> dict[str, Any]:
        # The last one has some of the runs once more, because another number of them would be another program.
        chosen = np.minimum(np.arange(start, start + size), total - 1)
        return {name: jnp.asarray(column[chosen]) for name, column in columns.items()}

    parts = [part(start) for start in range(0, total, size)]
    compiled = program.lower(parts[0]).compile()  # here, since settings such as `jax.enable_x64` are a thread's own
    if threads == 1 or len(parts) == 1:
        results = [compiled(each) for each in parts]
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(lambda each: jax.block_until_ready(compiled(each)), parts))
    if len(results) == 1:
        return results[0]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[:total], *results)


def _axis(name: str, values: Any) -> np.ndarray:
    """The values of a number, checked."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of values, got {values!r}: what is fixed belongs in the function")
    try:
        array = np.asarray(values if hasattr(values, "__array__") else list(values))
    except (TypeError, ValueError) as error:  # keys of jax.random, or lists of unequal lengths
        raise TypeError(
            f"the values of {name} must be real numbers, got {reprlib.repr(values)}; seeds are numbers, of which the "
            "function makes keys: jax.random.key(seed)"
        ) from error
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a sequence of at least one value, got an array of shape {array.shape}")
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
        raise TypeError(
            f"the values of {name} must be real numbers, got {reprlib.repr(values)}: what decides what is compiled "
            "cannot be swept, so make a sweep for each"
        )
    return array


def _check_call(function: Callable[..., Any], names: Iterable[str]) -> None:
    """Raise where the function cannot be called so, before JAX's tracebacks are around the error."""
    if not callable(function):
        raise TypeError(f"sweep needs a function, got {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions have none
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        name = getattr(function, "__name__", "function")
        raise TypeError(f"{name} is called as {name}({', '.join(f'{n}=...' for n in names)}): {error}") from None


_programs: "weakref.WeakKeyDictionary[Any, Callable[..., Any]]" = weakref.WeakKeyDictionary()


def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function of the points, remembered as long as somebody holds the function.

    It refers to the function weakly, so that what that closes over, data above all, goes when the user drops it.
    """
    try:
        program = _programs.get(function)
        if program is None:
            held = weakref.ref(function)
            one: Any = lambda point: held()(**point)  # noqa: E731 # pyright: ignore[reportOptionalCall]
            program = _programs[function] = jax.jit(jax.vmap(one))
        return program
    except TypeError:  # no hash, or no weak references
        return jax.jit(jax.vmap(lambda point: function(**point)))
