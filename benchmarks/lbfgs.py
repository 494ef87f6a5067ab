"""L-BFGS on unconstrained problems of CUTEst: ours, PyTorch's, optax's and SciPy's.

`pip install ".[bench]"`, then `python benchmarks/lbfgs.py [--variables 200] [names...]` prints a table in Markdown.

The problems are those of `sif2jax` without constraints whose optimal value f* it documents, up to a number of
variables. A run has **reached** the optimum where

    f <= f* + 1e-4 |f*| + 1e-8

for documented values have about five digits. All run in float64 with a history of 10 pairs, a first trial step of 1 and
a line search, until no element of the gradient is larger than 1e-6, nothing moves any more, or after 5000
evaluations of value and gradient together. Times are the best of three runs after compiling. Ours and optax's are one
compiled program for the whole run; PyTorch and SciPy call a compiled function.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import sif2jax  # pyright: ignore[reportMissingImports]
import torch
from jax.flatten_util import ravel_pytree

from optimjax import functional as F

HISTORY = 10
GRADIENT = 1e-6
EVALUATIONS = 5000
OPTIONS = {
    "max_iter": EVALUATIONS,
    "max_eval": EVALUATIONS,
    "tolerance_grad": GRADIENT,
    "tolerance_change": 1e-15,
    "history_size": HISTORY,
    "line_search_fn": "strong_wolfe",
}


class Run(NamedTuple):
    """Where a solver has ended."""

    value: float
    evaluations: int
    seconds: float
    reached: bool


def ours(f: Callable[..., Any]) -> Callable[..., Any]:
    algorithm = F.lbfgs(**OPTIONS)

    @jax.jit
    def solve(x: jax.Array) -> Any:
        x, state = algorithm.update(x, None, algorithm.init(x), loss_fn=f)
        return x, state.func_evals

    return solve


def of_torch(f: Callable[..., Any]) -> Callable[..., Any]:
    value_and_grad = jax.jit(jax.value_and_grad(f))

    def solve(x: jax.Array) -> Any:
        tensor = torch.nn.Parameter(torch.from_numpy(np.array(x)))
        optimizer = torch.optim.LBFGS([tensor], **OPTIONS)

        def closure() -> float:
            value, grad = value_and_grad(tensor.detach().numpy())
            tensor.grad = torch.from_numpy(np.array(grad))
            return float(value)

        with contextlib.suppress(IndexError, ZeroDivisionError):  # of a search that meets no number
            optimizer.step(closure)
        return tensor.detach().numpy(), optimizer.state[tensor]["func_evals"]

    return solve


def of_optax(f: Callable[..., Any]) -> Callable[..., Any]:
    transformation = optax.lbfgs(memory_size=HISTORY)
    value_and_grad = optax.value_and_grad_from_state(f)

    def going_on(carry: Any) -> Any:
        _, state, evaluations, moved = carry
        gradient = optax.tree.get(state, "grad")
        return (jnp.max(jnp.abs(gradient)) > GRADIENT) & (evaluations < EVALUATIONS) & moved

    def iterate(carry: Any) -> Any:
        x, state, evaluations, _ = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = transformation.update(grad, state, x, value=value, grad=grad, value_fn=f)
        new = optax.apply_updates(x, updates)
        steps = optax.tree.get(state, "info").num_linesearch_steps
        return new, state, evaluations + steps, jnp.any(new != x)

    @jax.jit
    def solve(x: jax.Array) -> Any:
        start = iterate((x, transformation.init(x), jnp.int32(1), True))
        return jax.lax.while_loop(going_on, iterate, start)[:3:2]

    return solve


def of_scipy(f: Callable[..., Any]) -> Callable[..., Any]:
    value_and_grad = jax.jit(jax.value_and_grad(f))

    def call(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(x)
        return float(value), np.asarray(grad)

    def solve(x: jax.Array) -> Any:
        options = {"maxcor": HISTORY, "gtol": GRADIENT, "ftol": 0, "maxiter": EVALUATIONS, "maxfun": EVALUATIONS}
        result = scipy.optimize.minimize(call, np.asarray(x), jac=True, method="L-BFGS-B", options=options)
        return result.x, result.nfev

    return solve


SOLVERS = {"optimjax": ours, "torch": of_torch, "optax": of_optax, "scipy": of_scipy}


def measure(problem: Any) -> dict[str, Run]:
    x, unravel = ravel_pytree(problem.y0)
    x, args, best = x.astype(jnp.float64), problem.args, float(problem.expected_objective_value)

    def f(x: jax.Array) -> jax.Array:
        return problem.objective(unravel(x), args)

    value = jax.jit(f)
    target = best + 1e-4 * abs(best) + 1e-8
    runs = {}
    for name, solver in SOLVERS.items():
        solve = solver(f)
        end, evaluations = jax.block_until_ready(solve(x))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(solve(x))
            times.append(time.perf_counter() - start)
        lowest = float(value(end))
        runs[name] = Run(lowest, int(evaluations), min(times), lowest <= target)
    return runs


def selected(variables: int, names: list[str]) -> list[Any]:
    """The problems with a documented optimal value, by name."""
    by_name = {problem.name: problem for problem in sif2jax.unconstrained_minimisation_problems}
    if names:
        return [by_name[name] for name in names]
    return [
        by_name[name]
        for name in sorted(by_name)
        if by_name[name].expected_objective_value is not None and by_name[name].num_variables() <= variables
    ]


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variables", type=int, default=200, help="the most variables of a problem")
    parser.add_argument("names", nargs="*", help="of problems; all that qualify unless given")
    arguments = parser.parse_args()

    print("| problem | n | f* |" + "".join(f" {name} f | evaluations | ms |" for name in SOLVERS))
    print("| --- " * (3 + 3 * len(SOLVERS)) + "|")
    results = []
    for problem in selected(arguments.variables, arguments.names):
        runs = measure(problem)
        results.append(runs)
        best = float(problem.expected_objective_value)
        cells = [
            f" {run.value:.6g}{'' if run.reached else ' ✗'} | {run.evaluations} | {1e3 * run.seconds:.2f} |"
            for run in runs.values()
        ]
        print(f"| {problem.name} | {problem.num_variables()} | {best:g} |" + "".join(cells), flush=True)

    everywhere = [runs for runs in results if all(run.reached for run in runs.values())]
    none = sum(not any(run.reached for run in runs.values()) for runs in results)
    alike = sum(runs["optimjax"].evaluations == runs["torch"].evaluations for runs in results)
    print(f"\n{len(results)} problems; none reaches {none}; optimjax and torch need the same evaluations in {alike}.")
    for name in SOLVERS:
        reached = sum(runs[name].reached for runs in results)
        evaluations = np.median([runs[name].evaluations for runs in everywhere])
        total = sum(runs[name].evaluations for runs in everywhere)
        milliseconds = 1e3 * np.median([runs[name].seconds for runs in everywhere])
        print(
            f"{name}: reached {reached}; on the {len(everywhere)} that all reach {total} evaluations, median "
            f"{evaluations:.0f}, {milliseconds:.2f} ms"
        )


if __name__ == "__main__":
    main()
