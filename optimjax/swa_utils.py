"""Averages of models, with PyTorch's names: stochastic weight averaging and exponential moving averages.

Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging weights leads to wider optima and better generalization",
UAI 2018 (arXiv:1803.05407). For the same as pure functions see :func:`optimjax.functional.ema`.

Differs from PyTorch:

1. A model is a ``flax.nnx`` module or a pytree of arrays. A ``multi_avg_fn`` returns its results, because arrays cannot
   be written in place.
2. The arithmetic runs in float32 at least.
3. Models of another structure raise; PyTorch averages what it can pair. Loading checks everything first, and keeps the
   dtypes of the average.
4. ``update_bn`` raises for a loader without batches, which leaves PyTorch's model with statistics of nothing. If it
   raises, the model is as before.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.averaging import Exponential, Uniform, check_decay
from optimjax._core.containers import as_array, own_memory
from optimjax._core.foreign import is_nnx, is_torch_module, nnx
from optimjax._core.numerics import at_least_float32
from optimjax._core.reading import as_count, slot_array
from optimjax._core.tree import copied_array, distinct_names, is_inexact_array
from optimjax._facade.optimizer import Optimizer
from optimjax._facade.state_dict import as_dict
from optimjax._params.parameter import Parameter
from optimjax._params.source import not_parameters, parameters
from optimjax._storage.placement import sharding_of
from optimjax.lr_scheduler.base import LRScheduler, Rate, building, extended, per_group

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
    return [_average(function, old, new, num_averaged) for old, new in zip(averaged, current, strict=True)]


def _average(function: Any, averaged: Array, current: Array, num_averaged: Array) -> Array:
    """The next average of one array: in float32 at least, in the dtype of the average."""
    if jnp.iscomplexobj(averaged):
        parts = [_average(function, part(averaged), part(current), num_averaged) for part in (jnp.real, jnp.imag)]
        return jax.lax.complex(*parts)
    inexact = jnp.issubdtype(averaged.dtype, jnp.inexact)
    wide = at_least_float32(averaged.dtype) if inexact else jnp.dtype(jnp.float32)
    results = function(averaged.astype(wide), current.astype(wide), num_averaged.astype(wide))
    return results.astype(averaged.dtype)


class AveragedModel:
    """A copy of a model that holds the average of its parameters, as ``torch.optim.swa_utils.AveragedModel``.

    Its arrays are its own. It never shares one with the model, so it stays valid when an optimizer updates the model in
    place (``optimizer.donate``). Each lies where the model's does, on a mesh too, unless ``device`` is given.

    Args:
      model: a ``flax.nnx`` module or a pytree of arrays (``optimizer.params``), which is copied.
      device: where the average is kept; where the model's arrays are unless given.
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
      TypeError: what is given as one of them cannot be called.

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
        if is_torch_module(model):
            raise TypeError(not_parameters("model", model))
        self.module = copy.deepcopy(model) if is_nnx(model) else model
        self.n_averaged = 0
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self._device = device
        self.module = _with_arrays(self.module, {name: self._own(x) for name, x in _arrays(self.module).items()})
        for variable in _random_state(self.module):
            variable.set_value(copied_array(variable.get_value()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module."""
        return self.module(*args, **kwargs)

    def train(self, **attributes: Any) -> "AveragedModel":
        """Put the averaged module into training mode, as ``module.train(**attributes)``; returns the average.

        Raises:
          TypeError: the model is a pytree, which has no modes.
        """
        self._switch("train", attributes)
        return self

    def eval(self, **attributes: Any) -> "AveragedModel":
        """Put the averaged module into evaluation mode, as ``module.eval(**attributes)``; returns the average.

        Raises:
          TypeError: the model is a pytree, which has no modes.

        >>> from flax import nnx
        >>> averaged = AveragedModel(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        >>> averaged.eval().module.deterministic
        True
        """
        self._switch("eval", attributes)
        return self

    def _switch(self, mode: str, attributes: dict[str, Any]) -> None:
        if not hasattr(self.module, mode):
            raise TypeError(f"{mode}() needs an average of a flax.nnx module, not of a {type(self.module).__name__}")
        getattr(self.module, mode)(**attributes)

    def parameters(self) -> Iterator[Parameter]:
        """The parameters of the averaged model, as :func:`optimjax.parameters` gives them."""
        return parameters(self.module)

    def update_parameters(self, model: Any) -> None:
        """Take the present parameters of the model into the average; the first time they are copied.

        Raises:
          ValueError: the model has another structure or other shapes. Nothing has changed then.
        """
        current, averaged = _arrays(model), _arrays(self.module)
        differing = sorted(
            name
            for name in current.keys() | averaged.keys()
            if not (name in current and name in averaged and np.shape(current[name]) == np.shape(averaged[name]))
        )
        if differing:
            raise ValueError(f"the model has not the structure of the averaged one: they differ in {differing[:3]}")
        names = self._to_average(model, current) if self.n_averaged else []
        old = [averaged[name] for name in names]
        new = self._next(old, [self._placed_like(current[name], array) for name, array in zip(names, old, strict=True)])
        results = dict(zip(names, new, strict=True))
        copies = {name: self._own(x, averaged[name]) for name, x in current.items() if name not in results}
        self._commit(copies | results, self.n_averaged + 1)

    def _to_average(self, model: Any, arrays: Mapping[str, Any]) -> list[str]:
        """The names of what is averaged; the rest is copied."""
        names = arrays.keys() if self.use_buffers else _parameters(model)
        return [name for name in names if not jnp.issubdtype(arrays[name].dtype, jax.dtypes.extended)]

    def _next(self, averaged: list[Array], current: list[Array]) -> list[Array]:
        """The next averages, which share no array with the model."""
        function: Any = self.multi_avg_fn or self.avg_fn or get_swa_avg_fn()
        function = function.function if isinstance(function, _Each) else function
        if isinstance(function, (Exponential, Uniform)):
            results: Any = _averages(function, averaged, current, jnp.asarray(self.n_averaged))
            return [self._placed_like(new, old) for new, old in zip(results, averaged, strict=True)]
        if self.multi_avg_fn is None:
            results = [function(old, new, self.n_averaged) for old, new in zip(averaged, current, strict=True)]
        else:
            results = function(averaged, current, self.n_averaged) if averaged else []
        if not isinstance(results, (list, tuple)) or len(results) != len(averaged):
            raise TypeError(f"multi_avg_fn must return a list of {len(averaged)} arrays, got {results!r}")
        return [self._own(new, old) for new, old in zip(results, averaged, strict=True)]

    def _own(self, value: Any, like: Array | None = None) -> Array:
        """The value as an array of its own: in the dtype of the present one, and where that is."""
        array = as_array(value, None if like is None else like.dtype)
        if self._device is not None:
            return jax.device_put(array, self._device, may_alias=False)
        if like is not None and (sharding := sharding_of(like)) is not None:
            return jax.device_put(array, sharding, may_alias=False)
        return copied_array(array)

    def _placed_like(self, array: Any, like: Array) -> Any:
        """The array where the present one is, if somebody has placed that."""
        array = own_memory(array)
        if self._device is None and sharding_of(like) is None:
            return array
        return array if getattr(array, "sharding", None) == like.sharding else jax.device_put(array, like.sharding)

    def _commit(self, arrays: Mapping[str, Array], count: int) -> None:
        """Replace all arrays and the count, or nothing."""
        module, before, count_before = self.module, _arrays(self.module), self.n_averaged
        try:
            self.module = _with_arrays(module, arrays)
            self.n_averaged = count
        except BaseException:
            _with_arrays(module, before)
            self.module, self.n_averaged = module, count_before
            raise

    def state_dict(self) -> dict[str, Any]:
        """``{"n_averaged": n, "module.<name>": array}``, as PyTorch has it; a snapshot."""
        return {"n_averaged": self.n_averaged} | {f"module.{name}": x for name, x in _arrays(self.module).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned (NumPy, JAX or PyTorch arrays).

        Arrays are converted to the dtypes of the average.

        Raises:
          ValueError: it is not a dict, names or shapes differ, an array is of another kind (integer or complex for a
            real one), or ``n_averaged`` is not a whole number from 0 on. Nothing has changed then.
        """
        saved = as_dict(state_dict)
        present = {f"module.{name}": array for name, array in _arrays(self.module).items()}
        differing = (present.keys() | {"n_averaged"}) ^ saved.keys()
        if differing:
            names = sorted(map(str, differing))[:3]
            raise ValueError(f"the state dict does not fit the averaged model: only one of them has {names}")
        count = as_count(saved["n_averaged"], "'n_averaged' of the state dict")
        arrays = {name: self._own(_loaded(saved[name], old, name), old) for name, old in present.items()}
        self._commit({name.removeprefix("module."): array for name, array in arrays.items()}, count)


def _loaded(value: Any, present: Array, name: str) -> Array:
    """A saved array of the shape and kind of the present one."""
    where = f"{name!r} of the state dict"
    if jnp.issubdtype(present.dtype, jax.dtypes.extended):  # random keys, which have no kind
        array, same_kind = value, getattr(value, "dtype", None) == present.dtype
    else:
        array, same_kind = slot_array(value, present.dtype, where), True
    if not same_kind:
        raise ValueError(f"{where} is {value!r}, expected an array of {present.dtype}")
    if array.shape != present.shape:
        raise ValueError(f"{where} has shape {array.shape}, expected {present.shape}")
    return array


def _variables(module: Any) -> dict[str, Any]:
    """The variables of a module that are parameters or buffers: all but random state."""
    flax_nnx = nnx()
    flat = flax_nnx.to_flat_state(flax_nnx.state(module))
    return {".".join(map(str, path)): v for path, v in flat if not isinstance(v, flax_nnx.RngState)}


def _random_state(model: Any) -> list[Any]:
    """The variables of a module that are random state."""
    if not is_nnx(model):
        return []
    return [node for _, node in nnx().iter_graph(model) if isinstance(node, nnx().RngState)]


def _flat(model: Any) -> tuple[list[str], list[Any], Any]:
    """Names and leaves of a model, and its structure; a variable of a module may hold a tree."""
    tree = {name: variable.get_value() for name, variable in _variables(model).items()} if is_nnx(model) else model
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return distinct_names([path for path, _ in paths]), [leaf for _, leaf in paths], treedef


def _arrays(model: Any) -> dict[str, Any]:
    """The arrays of a model by name."""
    names, leaves, _ = _flat(model)
    arrays = (jax.Array, np.ndarray, np.generic)
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, arrays)}


def _with_arrays(model: Any, arrays: Mapping[str, Array]) -> Any:
    """A pytree with these arrays in place of its own, or the module, after they were written into it."""
    names, leaves, treedef = _flat(model)
    tree = treedef.unflatten([arrays.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)])
    if not is_nnx(model):
        return tree
    for name, variable in _variables(model).items():
        variable.set_value(tree[name])
    return model


def _parameters(model: Any) -> list[str]:
    """The names of those that an optimizer would update."""
    names, leaves, treedef = _flat(model)
    trained = [True] * len(leaves)
    if is_nnx(model):
        variables, values = _variables(model), treedef.unflatten(leaves)
        is_param = {name: isinstance(variable, nnx().Param) for name, variable in variables.items()}
        trained = [is_param[name] for name in sorted(values) for _ in jax.tree.leaves(values[name])]
    return [n for n, leaf, each in zip(names, leaves, trained, strict=True) if each and is_inexact_array(leaf)]


def update_bn(loader: Iterable[Any], model: Any, device: Any = None) -> None:
    """Take the batch statistics of a ``flax.nnx`` module from one pass over data, as after averaging its weights.

    Args:
      loader: batches; of a tuple or list the first entry is the input.
      model: a module with ``nnx.BatchNorm`` layers (an :class:`AveragedModel` of one will do). It is called in training
        mode, and left in the mode it had. A model without such layers is left alone.
      device: where batches are put first.

    Raises:
      TypeError: not a ``flax.nnx`` module.
      ValueError: the loader has no batches. Whatever is raised, also by the module or the loader, variables and modes
        of the module are as before.

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
    before = [(node, node.get_value()) for node in nodes if isinstance(node, nnx().Variable)]
    modes = [
        (node, name, getattr(node, name))
        for node in nodes
        if isinstance(node, nnx().Module)
        for name in ("use_running_average", "deterministic")
        if hasattr(node, name)
    ]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.mean.set_value(jnp.zeros_like(norm.mean.get_value()))
            norm.var.set_value(jnp.ones_like(norm.var.get_value()))
        module.train()
        count = 0
        for count, batch in enumerate(loader, 1):
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            for norm in norms:  # the mean of all batches so far
                norm.momentum = (count - 1) / count
            module(inputs if device is None else jax.device_put(inputs, device))
        if not count:
            raise ValueError("the loader has no batches; a generator can be used only once")
    except BaseException:
        for variable, value in before:
            variable.set_value(value)
        raise
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

    _state = ("_anneal_strategy",)

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
            self._anneal_strategy = anneal_strategy
            self.anneal_epochs = anneal_epochs
            super().__init__(optimizer, last_epoch, key=key)

    def _check_arguments(self) -> None:
        strategy, epochs = self._anneal_strategy, self.anneal_epochs
        if strategy not in ("cos", "linear"):
            raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {strategy}")
        if not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"anneal_epochs must be equal or greater than 0, got {epochs}")

    def _arguments_elsewhere(self) -> dict[str, Any]:
        return {"swa_lr": [group["swa_lr"] for group in self.optimizer.param_groups]}

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
