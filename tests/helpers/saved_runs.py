"""Short runs whose state is saved, loaded and compared."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case

import optimjax as optim

__all__ = [
    "NAMES",
    "VARIANTS",
    "assert_equal",
    "boxes_of",
    "build",
    "grads",
    "momentum",
    "named",
    "plain",
    "run",
    "run_adam",
    "step_by_name",
    "stepped",
    "values",
]

SHAPES = [(3, 2), (3,), (3, 2)]
NAMES = ("base.kernel", "base.bias", "head.kernel")
VARIANTS = [pytest.param(case, index, id=f"{case}-{index}") for case in CASES for index in (0, 1)]


@functools.cache
def values(seed: int = 0, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in SHAPES)


def grads(step: int, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    return values(1000 + step, dtype)


def build(case: Case, index: int = 1, params: Any = None, **options: Any) -> Any:
    """Two groups, the second with a rate of its own."""
    a, b, c = map(optim.Parameter, case.fit(values() if params is None else params))
    options = {**case.variants()[index], **options}
    return case.optimizer([{"params": [a, b]}, {"params": [c], "lr": 0.02}], **options)


def boxes_of(optimizer: Any) -> list[Any]:
    return [box for group in optimizer.param_groups for box in group["params"]]


def run(optimizer: Any, start: int, stop: int) -> list[np.ndarray]:
    boxes = boxes_of(optimizer)
    for step in range(start, stop):
        for box, grad in zip(boxes, grads(step, boxes[0].dtype), strict=True):
            box.grad = grad.reshape(box.shape)
        optimizer.step()
    return [np.asarray(box) for box in boxes]


def plain(tree: Any) -> Any:
    """Comparable with ``==``: arrays become dtype and list."""
    return jax.tree.map(lambda x: (str(x.dtype), np.asarray(x).tolist()) if hasattr(x, "dtype") else x, tree)


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def run_adam(steps: int = 2, **options: Any) -> Any:
    optimizer = build(CASES[1], 1, values(dtype=np.float32), **options)
    run(optimizer, 0, steps)
    return optimizer


def named(order: tuple[int, ...], params: Any = None) -> Any:
    params = values(dtype=np.float32) if params is None else params
    return optim.Adam([(NAMES[i], optim.Parameter(params[i])) for i in order], lr=0.1)


def step_by_name(optimizer: Any, start: int, stop: int) -> dict[str, np.ndarray]:
    for step in range(start, stop):
        gradients = dict(zip(NAMES, grads(step, np.float32), strict=True))
        optimizer.step({name: gradients[name] for name in optimizer.param_groups[0]["param_names"]})
    return {name: np.asarray(value) for name, value in optimizer.params.items()}


def momentum(groups: dict[str, tuple[int, ...]] | list[dict[str, tuple[int, ...]]], lr: float = 0.1) -> Any:
    """SGD with momentum over named parameters of these shapes, in one group or several."""
    parts = groups if isinstance(groups, list) else [groups]
    named = [[(name, optim.Parameter(jnp.ones(shape))) for name, shape in part.items()] for part in parts]
    return optim.SGD([{"params": params} for params in named], lr=lr, momentum=0.9)


def stepped(optimizer: Any, value: float) -> Any:
    """After one step, whose gradients are the momenta then: ``value`` for the first parameter, then one more each."""
    for index, box in enumerate(boxes_of(optimizer)):
        box.grad = jnp.full(box.shape, value + index)
    optimizer.step()
    return optimizer
