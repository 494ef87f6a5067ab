"""What the facade works on: a mutable parameter with its gradient."""

import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.containers import as_array, not_deleted, own_memory
from optimjax._core.sparse import is_sparse
from optimjax._core.tree import check_gradient, copied_array

__all__ = ["Parameter", "flatten", "unflatten", "value_of"]


# What an array has and a parameter shows; it has its own shape, dtype, ndim and size.
_OF_ARRAYS = frozenset(name for name in dir(jax.Array) if not name.startswith("_"))

# What scripts of PyTorch ask a parameter for, and where that is.
_ELSEWHERE = {
    "data": "p.value is its array, and can be set",
    "detach": "p.value is an array without a history; jax.lax.stop_gradient(p.value) inside a loss",
    "clone": "p.value is immutable and need not be cloned; optim.Parameter(p.value) is another parameter",
    "numpy": "np.asarray(p.value)",
    "cpu": "np.asarray(p.value)",
    "cuda": "arrays live where JAX puts them; p.value = jax.device_put(p.value, device)",
    "to": "p.value = jax.device_put(p.value, device); another dtype needs another parameter",
    "backward": "there is no tape: optimizer.backward(loss_fn, ...) differentiates a function",
    "requires_grad_": "p.requires_grad = True",
    "zero_": "p.value = jnp.zeros_like(p.value)",
    "fill_": "p.value = jnp.full_like(p.value, x)",
    "copy_": "p.value = x",
    "add_": "p += x",
    "sub_": "p -= x",
    "mul_": "p *= x",
    "div_": "p /= x",
}


class Parameter:
    """One array, which can be replaced, and its gradient: what ``torch.nn.Parameter`` is to an optimizer.

    Usable wherever ``jax.numpy`` takes an array, with the arithmetic operators and with an array's attributes and
    methods (``p.T``, ``p.mean()``, ``p.at[0].set(1)``, which return arrays and leave the parameter as it is).

    Args:
      value: a real or complex floating array of any shape (or a Python float).
      name: shown in messages and used to match saved state.
      requires_grad: ``False`` freezes the parameter: it gets no gradient from :meth:`optimjax.Optimizer.backward`, and
        ``step(grads)`` and ``step(loss_fn)`` leave it and its state alone.

    Raises:
      TypeError: the value is not a floating-point array.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> w = optim.Parameter(jnp.array([3.0, 4.0]), name="w")
    >>> w.grad = 2 * w.value
    >>> optim.SGD([w], lr=0.1).step()
    >>> print(f"{jnp.sum(w):.1f}", w.shape)
    5.6 (2,)
    """

    __slots__ = ("__weakref__", "_grad", "_requires_grad", "_value", "name")

    def __init__(self, value: Any, *, name: str | None = None, requires_grad: bool = True):
        self._value = _floating(value, name)
        self._grad: Any = None
        self.name = name
        self.requires_grad = requires_grad

    @property
    def value(self) -> Array:
        """The array. Setting checks shape and dtype: ``ValueError`` or ``TypeError`` where they differ."""
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._write(self._checked(value))

    def _write(self, value: Array) -> None:
        """Set the value without checks."""
        self._value = value

    @property
    def grad(self) -> Any:
        """The gradient, ``None`` until there is one; an array or a sparse ``BCOO``. Setting checks shape and kind."""
        return self._grad

    @grad.setter
    def grad(self, grad: Any) -> None:
        if grad is not None:
            check_gradient(self.__str__, self, grad)
            grad = grad if is_sparse(grad) else as_array(grad)
        self._grad = grad

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained; ``TypeError`` for what is neither ``True`` nor ``False``."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if not isinstance(wanted, (bool, np.bool_)):
            raise TypeError(f"requires_grad must be True or False, got {wanted!r}")
        self._requires_grad = bool(wanted)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the value."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.value.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.value.size

    def _checked(self, value: Any) -> Array:
        array = as_array(not_deleted(value))
        if array.shape != self.shape:
            raise ValueError(f"value of parameter {str(self)!r} must keep shape {self.shape}, got {array.shape}")
        if array.dtype != self.dtype:
            raise TypeError(f"value of parameter {str(self)!r} must keep dtype {self.dtype}, got {array.dtype}")
        return array

    def __getattr__(self, name: str) -> Any:
        """The attributes and methods of the array, such as ``p.T``, ``p.mean()`` and ``p.at``."""
        if name in _OF_ARRAYS:
            return getattr(self.value, name)
        hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"a Parameter has no attribute {name!r}{hint}", name=name, obj=self)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *_OF_ARRAYS})

    __array_priority__ = 100  # `numpy_array @ parameter` is left to the parameter

    def __jax_array__(self) -> Array:
        return self.value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.value, dtype=dtype)

    def __getitem__(self, index: Any) -> Array:
        return self.value[index]

    def __iter__(self) -> Iterator[Array]:
        return iter(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        return self.name or "parameter"

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        frozen = "" if self.requires_grad else ", requires_grad=False"
        return f"Parameter({name}{self.value!r}{frozen})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parameter":
        # The array is copied, too: an optimizer may update either of them in place.
        twin = Parameter(copied_array(self.value), name=self.name, requires_grad=self.requires_grad)
        twin._grad = self._grad
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        return _restore_parameter, (self.value, self.name, self.requires_grad, self._grad)


def _restore_parameter(value: Any, name: str | None, requires_grad: bool, grad: Any) -> Parameter:
    parameter = Parameter(value, name=name, requires_grad=requires_grad)
    parameter.grad = grad
    return parameter


def _add_operators() -> None:
    """`w * x`, `x @ w`, `-w`, ...: a parameter in an expression stands for its value. Equality stays identity.

    `w -= x` changes the parameter, as PyTorch does: an array in its place would leave the parameter as it was.
    """

    def forward(function: Any) -> Any:
        return lambda self, other: function(self.value, value_of(other))

    def reflected(function: Any) -> Any:
        return lambda self, other: function(value_of(other), self.value)

    def in_place(function: Any) -> Any:
        def operate(self: Parameter, other: Any) -> Parameter:
            self.value = function(self.value, own_memory(value_of(other)))
            return self

        return operate

    def unary(function: Any) -> Any:
        return lambda self: function(self.value)

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
        setattr(Parameter, f"__{name}__", forward(getattr(operator, name)))
        setattr(Parameter, f"__r{name}__", reflected(getattr(operator, name)))
        setattr(Parameter, f"__i{name}__", in_place(getattr(operator, name)))
    for name in ("lt", "le", "gt", "ge"):
        setattr(Parameter, f"__{name}__", forward(getattr(operator, name)))
    for name in ("neg", "pos", "abs"):
        setattr(Parameter, f"__{name}__", unary(getattr(operator, name)))


def value_of(x: Any) -> Any:
    """The array of a parameter; anything else as it is."""
    return x.value if isinstance(x, Parameter) else x


_add_operators()


# `__jax_array__` alone does not satisfy jnp.sum(parameter) on JAX 0.10; a registered node passes.
def flatten(parameter: Parameter) -> tuple[tuple[Array], tuple[str | None, bool]]:
    """For JAX: the array, and what is static."""
    return (parameter.value,), (parameter.name, parameter.requires_grad)


def unflatten(aux: tuple[str | None, bool], children: Any) -> Any:
    """For JAX: a parameter that is bound to nothing."""
    # JAX unflattens with tracers and with placeholders of any type, so nothing may be checked here.
    parameter = Parameter.__new__(Parameter)
    (parameter._value,), parameter._grad = children, None
    parameter.name, parameter.requires_grad = aux
    return parameter


jax.tree_util.register_pytree_node(Parameter, flatten, unflatten)


def _floating(value: Any, name: str | None) -> Array:
    which = f"parameter {name!r}" if name else "a parameter"
    try:
        array = as_array(not_deleted(value_of(value)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{which} must be a floating array, got {value!r}") from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"{which} must be a floating array, got {array.dtype}: {value!r}")
    return jnp.asarray(array, array.dtype)  # of a Python number without its weak type, or the second step would compile
