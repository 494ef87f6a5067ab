"""Problems that LBFGS solves, and the same run of them in both libraries."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim

__all__ = [
    "FIXED",
    "WOLFE",
    "Problem",
    "Trace",
    "our_run",
    "problem",
    "rosenbrock",
    "rosenbrock_of_x",
    "state_of",
    "torch_optimizer",
    "torch_run",
    "torch_step",
]

WOLFE = {"line_search_fn": "strong_wolfe"}
FIXED = {"lr": 1e-3}


class Problem(NamedTuple):
    """A loss, written once for both libraries: ``loss(lib, x, *data)``; ``data`` are NumPy arrays."""

    loss: Callable[..., Any]
    start: np.ndarray
    data: tuple[np.ndarray, ...] = ()
    lr: float = 0.1  # that converges without a line search

    def ours(self, params: Sequence[Any]) -> Any:
        return self.loss(jnp, params[0], *map(jnp.asarray, self.data))


def rosenbrock(lib: Any, x: Any) -> Any:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(lib: Any, x: Any, matrix: Any, b: Any) -> Any:
    return x @ (matrix @ x) / 2 - b @ x


def logistic(lib: Any, x: Any, images: Any, digits: Any) -> Any:
    scores = images @ x.reshape(64, 10)
    return (lib.log(lib.exp(scores).sum(1)) - (scores * digits).sum(1)).mean() + 1e-3 * (x * x).sum()


@functools.cache
def problem(name: str) -> Problem:
    if name.startswith("rosenbrock"):
        return Problem(rosenbrock, np.resize([-1.2, 1.0], int(name[10:])), lr=1e-3)
    if name == "quadratic":
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((30, 30))
        return Problem(quadratic, np.zeros(30), (matrix @ matrix.T / 30 + np.eye(30) / 10, rng.standard_normal(30)))
    datasets = pytest.importorskip("sklearn.datasets")
    images, digits = datasets.load_digits(return_X_y=True)
    return Problem(logistic, np.zeros(640), (images[:500] / 16, np.eye(10)[digits[:500]]))


class Trace(NamedTuple):
    """After each step: parameters, evaluations, iterations, and the losses that the steps have returned."""

    params: list[np.ndarray]
    counts: list[tuple[int, int]]
    losses: list[float]


def torch_step(torch: Any, optimizer: Any, problem: Problem) -> float:
    (tensor,) = optimizer.param_groups[0]["params"]
    data = [torch.from_numpy(array) for array in problem.data]

    def closure() -> Any:
        optimizer.zero_grad()
        loss = problem.loss(torch, tensor, *data)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def torch_optimizer(torch: Any, start: np.ndarray, options: Mapping[str, Any]) -> Any:
    return torch.optim.LBFGS([torch.nn.Parameter(torch.from_numpy(start.copy()))], **options)


def torch_run(torch: Any, problem: Problem, options: Mapping[str, Any], steps: int, ulps: int = 0) -> Trace:
    start = problem.start + ulps * 2.0**-52
    optimizer, trace = torch_optimizer(torch, start, options), Trace([], [], [])
    (tensor,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        trace.losses.append(torch_step(torch, optimizer, problem))
        trace.params.append(tensor.detach().numpy().copy())
        trace.counts.append((optimizer.state[tensor]["func_evals"], optimizer.state[tensor]["n_iter"]))
    return trace


def state_of(optimizer: Any) -> Any:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def our_run(problem: Problem, options: Mapping[str, Any], steps: int) -> Trace:
    optimizer, trace = optim.LBFGS([jnp.asarray(problem.start)], **options), Trace([], [], [])
    for _ in range(steps):
        trace.losses.append(float(optimizer.step(problem.ours)))
        trace.params.append(np.asarray(optimizer.params[0]))
        trace.counts.append((state_of(optimizer)["func_evals"], state_of(optimizer)["n_iter"]))
    return trace


def rosenbrock_of_x(params: Any) -> Any:
    return rosenbrock(jnp, params["x"])
