"""Averages of models, with PyTorch's names: stochastic weight averaging and exponential moving averages.

Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging weights leads to wider optima and better generalization",
UAI 2018 (arXiv:1803.05407). For the same as pure functions see :func:`optimjax.functional.ema`.

Differs from PyTorch:

1. A model is a ``flax.nnx`` module or a pytree of arrays. What a ``multi_avg_fn`` computes it returns, for arrays
   cannot be written in place.
2. The arithmetic runs in float32 at least.
3. Models of another structure raise; PyTorch averages what it can pair.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax.averaging import Exponential, Uniform, average, check_decay
from optimjax.lr_scheduler.base import LRScheduler, Rate, building, extended, per_group
from optimjax.optimizer import Optimizer
from optimjax.tree import dotted, is_inexact_array
from optimjax.variable import is_nnx, nnx

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]


def get_ema_avg_fn(decay: float = 0.999) -> Callable[[Array, Array, Any], Array]:
    """``(averaged, current, num_averaged) -> averaged``: an exponential moving average of one array.

    Raises:
      ValueError: the decay is not between 0 and 1.

    >>> get_ema_avg_fn(0.5)(1.0, 2.0, 3)
    1.5
    """
    check_decay(decay)
    return Exponential(decay)


def get_swa_avg_fn() -> Callable[[Array, Array, Any], Array]:
    """``(averaged, current, num_averaged) -> averaged``: the mean of all so far, of one array.

    >>> get_swa_avg_fn()(1.0, 2.0, 3)
    1.25
    """
    return Uniform()


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Sequence[Array], Sequence[Array], Any], list[Array]]:
    """As :func:`get_ema_avg_fn`, of lists of arrays."""
    return _Each(get_ema_avg_fn(decay))


def get_swa_multi_avg_fn() -> Callable[[Sequence[Array], Sequence[Array], Any], list[Array]]:
    """As :func:`get_swa_avg_fn`, of lists of arrays."""
    return _Each(get_swa_avg_fn())


class _Each:
    """A function of one array, over lists."""

    def __init__(self, function: Callable[[Array, Array, Any], Array]):
        self.function = function

    def __call__(self, averaged: Sequence[Array], current: Sequence[Array], num_averaged: Any) -> list[Array]:
        return [self.function(old, new, num_averaged) for old, new in zip(averaged, current, strict=True)]


@functools.partial(jax.jit, static_argnames="function")
def _averages(function: Any, averaged: list[Array], current: list[Array], num_averaged: Array) -> list[Array]:
    return [average(function, old, new, num_averaged) for old, new in zip(averaged, current, strict=True)]


class AveragedModel:
    """A copy of a model that holds the average of its parameters, as ``torch.optim.swa_utils.AveragedModel``.

    Args:
      model: a ``flax.nnx`` module, which is copied, or a pytree of arrays (``optimizer.params``).
      device: where the average is kept; beside the model unless given.
      avg_fn: ``(averaged, current, num_averaged) -> averaged`` for one array; the mean of all unless given. A function
        of one's own is called as it is, with a Python number; those of :func:`get_ema_avg_fn` and
        :func:`get_swa_avg_fn` run in one compiled program.
      multi_avg_fn: the same for lists of arrays.
      use_buffers: whether buffers (batch statistics, integer leaves of a tree) are averaged, too, not copied.

    Attributes:
      module: the averaged model: the copy, or a tree.
      n_averaged: how many models were averaged.

    Raises:
      AssertionError: both kinds of functions are given.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> from optimjax.swa_utils import AveragedModel, get_ema_avg_fn
    >>> optimizer = optim.SGD({"w": jnp.array([4.0])}, lr=1.0)
    >>> averaged = AveragedModel(optimizer.params, avg_fn=get_ema_avg_fn(0.5))
    >>> for _ in range(3):
    ...     optimizer.step({"w": jnp.ones(1)})
    ...     averaged.update_parameters(optimizer.params)
    >>> print(averaged.module["w"], averaged.n_averaged)
    [1.75] 3
    """

    def __init__(
        self,
        model: Any,
        device: Any = None,
        avg_fn: Callable[[Array, Array, Any], Array] | None = None,
        multi_avg_fn: Callable[[Sequence[Array], Sequence[Array], Any], Sequence[Array]] | None = None,
        use_buffers: bool = False,
    ):
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("Only one of avg_fn and multi_avg_fn should be provided")
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, such as get_ema_avg_fn(0.99), got {function!r}")
        self.module = copy.deepcopy(model) if is_nnx(model) else jax.tree.map(lambda leaf: leaf, model)
        self.n_averaged = 0
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self._device = device
        if device is not None:
            self._write(_values(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: Any) -> None:
        """Take the present parameters of the model into the average; the first time they are copied.

        Raises:
          ValueError: the model has another structure or other shapes.
        """
        current, averaged = _values(model), _values(self.module)
        if {name: np.shape(x) for name, x in current.items()} != {name: np.shape(x) for name, x in averaged.items()}:
            differing = sorted(
                name
                for name in current.keys() | averaged.keys()
                if np.shape(current.get(name, "")) != np.shape(averaged.get(name, ""))
                or (name in current) != (name in averaged)
            )
            raise ValueError(f"the model has not the structure of the averaged one: they differ in {differing[:3]}")
        names = [name for name in current if self.use_buffers or name in _parameters(model)]
        new = dict(current)
        if self.n_averaged > 0:
            old, now = [averaged[name] for name in names], [current[name] for name in names]
            new.update(zip(names, self._average(old, now), strict=True))
        self._write({name: jnp.asarray(value, jnp.asarray(averaged[name]).dtype) for name, value in new.items()})
        self.n_averaged += 1

    def _average(self, averaged: list[Array], current: list[Array]) -> Sequence[Any]:
        function: Any = self.multi_avg_fn or self.avg_fn or get_swa_avg_fn()
        function = function.function if isinstance(function, _Each) else function
        if isinstance(function, (Exponential, Uniform)):
            return _averages(function, averaged, current, jnp.asarray(self.n_averaged))
        if self.multi_avg_fn is None:
            return [function(old, new, self.n_averaged) for old, new in zip(averaged, current, strict=True)]
        results = function(averaged, current, self.n_averaged)
        if not isinstance(results, (list, tuple)) or len(results) != len(averaged):
            raise TypeError(f"multi_avg_fn must return a list of {len(averaged)} arrays, got {results!r}")
        return results

    def _write(self, values: Mapping[str, Array]) -> None:
        if self._device is not None:
            values = {name: jax.device_put(value, self._device) for name, value in values.items()}
        if is_nnx(self.module):
            for name, variable in _variables(self.module).items():
                variable.set_value(values[name])
        else:
            paths, treedef = jax.tree_util.tree_flatten_with_path(self.module)
            self.module = treedef.unflatten([values.get(dotted(path), leaf) for path, leaf in paths])

    def state_dict(self) -> dict[str, Any]:
        """``{"n_averaged": n, "module.<name>": array}``, as PyTorch has it; a snapshot."""
        return {"n_averaged": self.n_averaged} | {f"module.{name}": x for name, x in _values(self.module).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
          ValueError: names or shapes differ. Nothing has changed then.
        """
        present = {f"module.{name}": value for name, value in _values(self.module).items()}
        saved = {name: jnp.asarray(value) for name, value in state_dict.items() if name != "n_averaged"}
        differing = present.keys() ^ saved.keys()
        differing |= {name for name in present.keys() & saved.keys() if np.shape(present[name]) != saved[name].shape}
        if differing or "n_averaged" not in state_dict:
            raise ValueError(f"the state dict does not fit the averaged model: they differ in {sorted(differing)[:3]}")
        self._write({name.removeprefix("module."): value for name, value in saved.items()})
        self.n_averaged = int(state_dict["n_averaged"])


def _variables(module: Any) -> dict[str, Any]:
    """The variables of a module that are parameters or buffers: all but random state."""
    flax_nnx = nnx()
    flat = flax_nnx.to_flat_state(flax_nnx.state(module))
    return {".".join(map(str, path)): v for path, v in flat if not isinstance(v, flax_nnx.RngState)}


def _values(model: Any) -> dict[str, Any]:
    """The arrays of a model by name."""
    if is_nnx(model):
        return {name: variable.get_value() for name, variable in _variables(model).items()}
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {dotted(path): leaf for path, leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray, np.generic))}


def _parameters(model: Any) -> set[str]:
    """The names of those that an optimizer would update."""
    if is_nnx(model):
        variables = _variables(model).items()
        return {n for n, v in variables if isinstance(v, nnx().Param) and is_inexact_array(v.get_value())}
    return {name for name, value in _values(model).items() if is_inexact_array(value)}


def update_bn(loader: Iterable[Any], model: Any, device: Any = None) -> None:
    """Take the batch statistics of a ``flax.nnx`` module from one pass over data, as after averaging its weights.

    Args:
      loader: batches; of a tuple or list the first entry is the input.
      model: a module with ``nnx.BatchNorm`` layers (an :class:`AveragedModel` of one will do). It is called in training
        mode, and left in the mode it had. A model without such layers is left alone.
      device: where batches are put first.

    Raises:
      TypeError: not a ``flax.nnx`` module.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> update_bn([jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[4.0, 5.0], [4.0, 5.0]])], norm)
    >>> print(norm.mean.get_value())
    [3. 4.]
    """
    module = model.module if isinstance(model, AveragedModel) else model
    if not is_nnx(module):
        raise TypeError(f"update_bn takes a flax.nnx module, got {type(module).__name__}")
    nodes = [node for _, node in nnx().iter_graph(module)]
    norms = [node for node in nodes if isinstance(node, nnx().BatchNorm)]
    if not norms:
        return
    modes = [
        (node, name, getattr(node, name))
        for node in nodes
        if isinstance(node, nnx().Module)
        for name in ("use_running_average", "deterministic")
        if hasattr(node, name)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.mean.set_value(jnp.zeros_like(norm.mean.get_value()))
        norm.var.set_value(jnp.ones_like(norm.var.get_value()))
    try:
        module.train()
        for index, batch in enumerate(loader):
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            for norm in norms:  # the mean of all batches so far
                norm.momentum = index / (index + 1)
            module(inputs if device is None else jax.device_put(inputs, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for node, name, mode in modes:
            setattr(node, name, mode)


class SWALR(LRScheduler):
    """Anneals the learning rate to ``swa_lr`` and keeps it there, as ``torch.optim.swa_utils.SWALR``.

    Args:
      optimizer: the optimizer whose groups are written.
      swa_lr: the last rate, one or a list with one for each group.
      anneal_epochs: how many epochs it takes, at least 0.
      anneal_strategy: ``"cos"`` or ``"linear"``.
      last_epoch: index of the last epoch done; -1 starts.
      key: which number of the groups is scheduled.

    Raises:
      ValueError: a list of another length than the groups, an unknown strategy, a negative number of epochs.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD([jnp.ones(2)], lr=1.0)
    >>> scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=2, anneal_strategy="linear")
    >>> for epoch in range(3):
    ...     optimizer.step([jnp.ones(2)])
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
        *,
        key: str = "lr",
    ):
        with building(optimizer):
            for group, rate in zip(optimizer.param_groups, per_group("swa_lr", swa_lr, optimizer), strict=True):
                group["swa_lr"] = rate
            if anneal_strategy not in ("cos", "linear"):
                raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy}")
            if not isinstance(anneal_epochs, int) or anneal_epochs < 0:
                raise ValueError(f"anneal_epochs must be equal or greater than 0, got {anneal_epochs}")
            self._anneal_strategy = anneal_strategy
            self.anneal_epochs = anneal_epochs
            super().__init__(optimizer, last_epoch, key=key)

    def get_lr(self) -> list[Rate]:
        """The next rates from the present ones."""
        self._warn_outside_step()
        step = self._step_count - 1
        if self.anneal_epochs == 0:
            step = max(1, step)
        before, now = self._share(step - 1), self._share(step)
        rates = []
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            last = group["swa_lr"]
            start = last if before == 1 else (rate - before * last) / (1 - before)
            rates.append(last * now + start * (1 - now))
        return rates

    def _share(self, step: int) -> float:
        share = max(0, min(1, step / max(1, self.anneal_epochs)))
        return (1 - math.cos(math.pi * share)) / 2 if self._anneal_strategy == "cos" else share

    def _adopt_groups(self) -> None:
        groups = self.optimizer.param_groups
        known = [group["swa_lr"] for group in groups if "swa_lr" in group]
        for group, rate in zip(groups, extended("swa_lr", known, len(groups)), strict=True):
            group.setdefault("swa_lr", rate)
        super()._adopt_groups()
