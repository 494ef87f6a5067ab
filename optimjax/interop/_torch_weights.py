"""The weights of a model: from PyTorch into a module of ``flax.nnx``, and back."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimjax._core.containers import as_array as own_array
from optimjax._core.reading import reading
from optimjax._params.source import named_parameters
from optimjax._storage.placement import place
from optimjax.interop._torch_arrays import as_array, as_tensors, is_array
from optimjax.interop._torch_flax import Rename, flax_layout, variables
from optimjax.interop._torch_layout import LayoutLike, Parts, join, parts_of, split

__all__ = ["groups", "load_weights", "weights"]


def load_weights(
    model: Any,
    state_dict: Mapping[str, Any],
    *,
    rename: Rename = None,
    layout: Mapping[str, LayoutLike] | None = None,
) -> dict[str, Parts]:
    """Load the ``state_dict()`` of a PyTorch model into a ``flax.nnx`` module: parameters and batch statistics.

    Arrays take the dtype and the place that the module's have. Under ``jax.jit`` or ``jax.grad`` the arrays may be
    tracers, if the module was made inside.

    Args:
      model: the module, of the same structure.
      state_dict: tensors of PyTorch, or arrays of NumPy or JAX, by PyTorch's names.
      rename: see :func:`flax_layout`.
      layout: see :func:`flax_layout`.

    Returns:
      The layout, for the optimizer's state and for the way back.

    Raises:
      ValueError: a name or a shape does not fit, or the module has parameters or statistics that are not in
        ``state_dict``. Nothing has changed then.
      TypeError: an entry is not an array, or is complex where the module's is real.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from optimjax.interop.torch import load_weights
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> layout = load_weights(model, {"weight": np.arange(6.0).reshape(2, 3), "bias": np.zeros(2)})
    >>> print(model.kernel[...])
    [[0. 3.]
     [1. 4.]
     [2. 5.]]
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"the weights of a model are a dict by name, got {type(state_dict).__name__}")
    if strange := [name for name, value in state_dict.items() if not is_array(value)]:
        raise TypeError(f"{strange[0]!r} of the weights is not an array, but {state_dict[strange[0]]!r}")
    found = flax_layout(model, state_dict, rename=rename, layout=layout)
    own = variables(model)
    new: dict[str, Any] = {}
    for name, parts in found.items():
        with reading():
            array = as_array(state_dict[name])
        for part, value in zip(parts, _split(name, parts, array), strict=True):
            ours = part.name or name
            new[ours] = _fitting(name, ours, value, own)
    if missing := [name for name in own if name not in new]:
        raise ValueError(f"the weights lack {missing} of the module; none was changed")
    for name, value in new.items():
        own[name].set_value(value)
    return found


def _split(name: str, parts: Parts, array: Any) -> list[Any]:
    try:
        return split(parts, array)
    except ValueError as error:
        raise ValueError(f"{name!r} {error}") from None


def _fitting(name: str, ours: str, value: Any, own: Mapping[str, Any]) -> Any:
    """The value as an array of the shape, dtype and place of the variable."""
    if ours not in own:
        raise ValueError(f"the layout of {name!r} names {ours!r}, which the module does not have")
    old = own[ours].get_value()
    if value.shape != old.shape:
        raise ValueError(f"{name!r} gives {ours!r} the shape {tuple(value.shape)}, the module has {tuple(old.shape)}")
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(old):
        raise TypeError(f"{name!r} is complex, {ours!r} is not")
    if isinstance(value, Tracer) or isinstance(old, Tracer):
        return jnp.asarray(value, old.dtype)
    return place(own_array(value, old.dtype), old)


def weights(model: Any, layout: Mapping[str, LayoutLike], *, tensors: bool = False) -> dict[str, Any]:
    """The weights of a module under PyTorch's names and with PyTorch's axes.

    ``torch_model.load_state_dict(weights(model, layout, tensors=True))`` takes them. ``num_batches_tracked`` is not
    among them; PyTorch then keeps its own.

    Args:
      model: a ``flax.nnx`` module, or a dict of arrays by our names.
      layout: what :func:`load_weights` or :func:`flax_layout` returned.
      tensors: whether to make tensors of PyTorch; else they are NumPy arrays, which :func:`save` writes as tensors.

    Raises:
      ValueError: the model lacks a parameter, or has another shape than the layout says.
      ImportError: tensors are asked for, and PyTorch is not installed.

    >>> from flax import nnx
    >>> from optimjax.interop.torch import flax_layout, weights
    >>> model = nnx.Conv(3, 8, (5, 5), use_bias=False, rngs=nnx.Rngs(0))
    >>> weights(model, flax_layout(model, ["weight"]))["weight"].shape
    (8, 3, 5, 5)
    """
    if isinstance(model, Mapping):
        own = dict(model)
    else:
        own = {name: variable.get_value() for name, variable in variables(model).items()}
    found: dict[str, Any] = {}
    for name, given in layout.items():
        parts = parts_of(given, name)
        names = [part.name or name for part in parts]
        if missing := [each for each in names if each not in own]:
            raise ValueError(f"{name!r} is {', '.join(map(repr, names))} here, and the model lacks {missing}")
        try:
            array = join(parts, [as_array(own[each]) for each in names]) if parts else None
        except ValueError as error:
            raise ValueError(f"{', '.join(map(repr, names))} {error}") from None
        if array is not None:
            found[name] = array if isinstance(array, Tracer) else np.asarray(array)
    return as_tensors(found) if tensors else found


def groups(model: Any, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a state dict that :func:`from_torch` returned, with the parameters of a module, for a constructor.

    An optimizer that is made of them takes the state dict: ``load_state_dict`` then sets the rates and the other
    options, which therefore need not be given.

    Args:
      model: a ``flax.nnx`` module, or another tree that :func:`optimjax.named_parameters` takes.
      state_dict: the optimizer's, with our names.

    Raises:
      ValueError: a group has no names, or names what the model does not have.

    >>> from flax import nnx
    >>> import optimjax as optim
    >>> from optimjax.interop.torch import groups
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> saved = {"state": {}, "param_groups": [{"lr": 0.5, "params": [0], "param_names": ["bias"]}]}
    >>> optimizer = optim.SGD(groups(model, saved))
    >>> optimizer.load_state_dict(saved)
    <All keys matched successfully>
    >>> optimizer.param_groups[0]["lr"]
    0.5
    """
    own = dict(named_parameters(model))
    made = []
    for index, group in enumerate(state_dict["param_groups"]):
        names = group.get("param_names")
        if names is None:
            raise ValueError(f"param_groups[{index}] has no names: give them to from_torch, as names=")
        if missing := [name for name in names if name not in own]:
            raise ValueError(f"param_groups[{index}] names {missing}, which the model does not have, but {list(own)}")
        kept = {key: group[key] for key in ("algorithm", "matrix_axes") if group.get(key) is not None}
        made.append({"params": [(name, own[name]) for name in names], **kept})
    return made
