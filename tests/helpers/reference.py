"""The same run in PyTorch, through the facade and through the functional core.

Parameters are a list of NumPy arrays; gradients are a list over steps of such lists, ``None`` where one is missing,
complex ones in PyTorch's convention. Each run returns the final parameters and the state of each parameter.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax.experimental.sparse import BCOO

__all__ = [
    "Entries",
    "Result",
    "assert_same",
    "facade",
    "functional",
    "functional_steps",
    "gradient_for_us",
    "pytorch",
    "random_entries",
    "random_gradients",
    "random_parameters",
]


class Entries(NamedTuple):
    """A sparse gradient, which names some entries of a parameter, some of them twice."""

    indices: np.ndarray  # integers, [entries, sparse axes]
    values: np.ndarray  # [entries, *the other axes]
    shape: tuple[int, ...]


Arrays = Sequence[np.ndarray]
Gradients = Sequence[Sequence[np.ndarray | Entries | None]]


class Result(NamedTuple):
    """Parameters after the last step, and for each parameter its state by name."""

    params: list[Any]
    state: list[dict[str, Any]]


def random_parameters(shapes: Sequence[tuple[tuple[int, ...], Any]], seed: int = 0) -> list[np.ndarray]:
    """Normally distributed arrays of these shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return [_normal(rng, shape, dtype) for shape, dtype in shapes]


def random_gradients(params: Arrays, steps: int, seed: int = 1, spread: float = 0.5) -> list[list[np.ndarray]]:
    """Gradients whose scale differs between steps and between elements by about ``exp(spread)``."""
    rng = np.random.default_rng(seed)
    return [
        [
            np.asarray(_normal(rng, p.shape, p.dtype) * np.exp(spread * rng.standard_normal(p.shape)), p.dtype)
            for p in params
        ]
        for _ in range(steps)
    ]


def random_entries(params: Arrays, steps: int, seed: int = 1) -> list[list[Entries]]:
    """Sparse gradients of a few entries: rows, or with a second axis for arrays of more than two axes parts of rows."""
    rng = np.random.default_rng(seed)

    def one(p: np.ndarray) -> Entries:
        sparse, entries = p.shape[: max(1, p.ndim - 1)], 3 if p.size else 0
        indices = [rng.integers(0, size, entries) for size in sparse]
        indices = np.stack(indices, axis=-1) if sparse else np.zeros((entries, 0), int)
        return Entries(indices, _normal(rng, (entries, *p.shape[len(sparse) :]), p.dtype), p.shape)

    return [[one(p) for p in params] for _ in range(steps)]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    values = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return np.asarray(values, dtype)


def pytorch(torch: Any, case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run in PyTorch, by its plain implementation, one tensor at a time."""
    tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    cls = case.reference(torch)
    plain = {"foreach": False} if "foreach" in inspect.signature(cls).parameters else {}
    optimizer = cls(tensors, **plain, **case.theirs(options))
    for step in grads:
        for tensor, grad in zip(tensors, step, strict=True):
            tensor.grad = None if grad is None else case.torch_gradient(torch, _tensor(torch, grad))
        optimizer.step()
    state = [{name: np.asarray(value) for name, value in optimizer.state[t].items()} for t in tensors]
    return Result([t.detach().numpy() for t in tensors], state)


def facade(case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run by ``step(grads)``."""
    optimizer = case.optimizer([jnp.asarray(p) for p in params], **case.ours(options))
    for step in grads:
        optimizer.step([gradient_for_us(grad) for grad in step])
    boxes = optimizer.param_groups[0]["params"]
    return Result(optimizer.params, [dict(optimizer.state[box]) for box in boxes])


def functional(case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run in one compiled loop over the functional ``update``; no gradient may be missing."""
    algorithm = case.factory(**case.ours(options))
    columns = [np.stack([gradient_for_us(step[i]) for step in grads]) for i in range(len(params))]

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        start = params, algorithm.init(params)
        return jax.lax.scan(lambda carry, g: (algorithm.update(carry[0], g, carry[1]), None), start, grads)[0]

    return _result(*run([jnp.asarray(p) for p in params], columns))


def functional_steps(case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run by one call of ``update`` after the other: runs that differ in values alone compile nothing new."""
    algorithm = case.factory(**case.ours(options))
    values: Any = [jnp.asarray(p) for p in params]
    state = algorithm.init(values)
    for step in grads:
        values, state = algorithm.update(values, [gradient_for_us(grad) for grad in step], state)
    return _result(values, state)


def _result(params: Any, state: Any) -> Result:
    """What a functional run has ended with, by parameter."""
    columns = state._asdict()
    step = columns.pop("step")
    rows = [{"step": step} | {name: column[i] for name, column in columns.items()} for i in range(len(params))]
    return Result(params, [{name: slot for name, slot in row.items() if slot is not None} for row in rows])


def _tensor(torch: Any, grad: np.ndarray | Entries) -> Any:
    if isinstance(grad, Entries):
        return torch.sparse_coo_tensor(grad.indices.T, grad.values, grad.shape, check_invariants=True)
    return torch.from_numpy(grad)


def gradient_for_us(grad: Any) -> Any:
    """The gradient for us: `jax.grad` returns the conjugate of what PyTorch returns."""
    if isinstance(grad, Entries):
        return BCOO((jnp.asarray(grad.values), jnp.asarray(grad.indices)), shape=grad.shape)
    return None if grad is None else np.conj(grad)


def assert_same(ours: Result, theirs: Result, with_step: bool = True) -> None:
    for mine, reference in zip(ours.params, theirs.params, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(ours.state, theirs.state, strict=True):
        mine, reference = dict(mine), dict(reference)
        if not with_step:  # the functional state counts where PyTorch's SGD does not
            mine.pop("step")
            reference.pop("step", None)
        assert mine.keys() == reference.keys()
        for name, value in reference.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
