"""The same run in PyTorch, through the facade and through the functional core.

Parameters are a list of NumPy arrays; gradients are a list over steps of such lists, ``None`` where one is missing,
complex ones in PyTorch's convention. Each run returns the final parameters and the state of each parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case

__all__ = ["Result", "facade", "functional", "pytorch", "random_gradients", "random_parameters"]

Arrays = Sequence[np.ndarray]
Gradients = Sequence[Sequence[np.ndarray | None]]


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


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    values = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return np.asarray(values, dtype)


def pytorch(torch: Any, case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run in PyTorch, by its plain implementation, one tensor at a time."""
    tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    optimizer = getattr(torch.optim, case.torch)(tensors, foreach=False, **options)
    for step in grads:
        for tensor, grad in zip(tensors, step, strict=True):
            tensor.grad = None if grad is None else torch.from_numpy(grad)
        optimizer.step()
    state = [{name: np.asarray(value) for name, value in optimizer.state[t].items()} for t in tensors]
    return Result([t.detach().numpy() for t in tensors], state)


def facade(case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run by ``step(grads)``."""
    optimizer = case.optimizer([jnp.asarray(p) for p in params], **options)
    for step in grads:
        optimizer.step([_conjugate(grad) for grad in step])
    boxes = optimizer.param_groups[0]["params"]
    return Result(optimizer.params, [dict(optimizer.state[box]) for box in boxes])


def functional(case: Case, options: Mapping[str, Any], params: Arrays, grads: Gradients) -> Result:
    """The run in one compiled loop over the functional ``update``; no gradient may be missing."""
    algorithm = case.factory(**options)
    columns = [np.stack([_conjugate(step[i]) for step in grads]) for i in range(len(params))]

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        start = params, algorithm.init(params)
        return jax.lax.scan(lambda carry, g: (algorithm.update(carry[0], g, carry[1]), None), start, grads)[0]

    final, state = run([jnp.asarray(p) for p in params], columns)
    fields = state._asdict()
    step = fields.pop("step")
    return Result(
        final, [{"step": step} | {name: tree[i] for name, tree in fields.items()} for i in range(len(params))]
    )


def _conjugate(grad: Any) -> Any:
    """What `jax.grad` returns where PyTorch returns ``grad``."""
    return None if grad is None else np.conj(grad)
