"""L-BFGS on unconstrained problems of CUTEst: ours, PyTorch's, optax's and SciPy's.

`pip install ".[test]"`, then `python benchmarks/lbfgs.py [--rounds 7] [names...]` prints tables in Markdown.

The problems are in `cutest_problems.py`. A run has **reached** the minimum where

    f <= f* + 1e-4 |f*| + 1e-8

with the documented least value f*, of which six digits are known; ✗ stands where it has not. All run in float64 with a
history of 10 pairs, a first trial step of 1 and a line search, until no element of the gradient is larger than 1e-6,
nothing moves any more, or after 5000 evaluations of value and gradient together. Solvers take turns; times are medians
over the rounds, after compiling. Ours and optax's are one compiled program for the whole run; PyTorch and SciPy call a
compiled function, and have one thread, because more make so little work slower.

"optimjax, 10⁶ f" minimizes the function a million times as large, with tolerances as much larger. PyTorch, and so do
we, stores a pair (s, y) only where y · s > 1e-10. Close to the minimum of a small function that keeps every pair out,
and the directions are made from old ones.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy
import scipy.optimize
import torch
from cutest_problems import PROBLEMS, Problem
from threadpoolctl import threadpool_limits

from optimjax import functional as F
from optimjax._command.timing import interleaved

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
    ratio: float  # of our time to its
    reached: bool


def ours(f: Callable[..., Any], scale: float = 1) -> Callable[..., Any]:
    tolerances = {name: scale * value for name, value in OPTIONS.items() if "tolerance" in name}
    algorithm = F.lbfgs(**OPTIONS | tolerances)

    @jax.jit
    def solve(x: jax.Array) -> Any:
        x, state = algorithm.update(x, None, algorithm.init(x), loss_fn=lambda x: scale * f(x))
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


SOLVERS = {
    "optimjax": ours,
    "optimjax, 10⁶ f": partial(ours, scale=1e6),
    "torch": of_torch,
    "optax": of_optax,
    "scipy": of_scipy,
}


def measure(problem: Problem, rounds: int) -> dict[str, Run]:
    function, value = problem.function, jax.jit(problem.function)
    x = jnp.asarray(problem.start, jnp.float64)
    target = problem.least + 1e-4 * abs(problem.least) + 1e-8
    solvers = {name: solver(function) for name, solver in SOLVERS.items()}
    ends = {name: jax.block_until_ready(solve(x)) for name, solve in solvers.items()}
    timings = interleaved({name: partial(solve, x) for name, solve in solvers.items()}, rounds=rounds, warm_up=0)
    runs = {}
    for name, (end, evaluations) in ends.items():
        lowest = float(value(end))
        ratio = timings.ratio("optimjax", name)
        runs[name] = Run(lowest, int(evaluations), timings.median(name), ratio, lowest <= target)
    return runs


def summary(results: dict[str, dict[str, Run]]) -> None:
    """What one cannot see in the table at once."""
    common = [runs for runs in results.values() if all(run.reached for run in runs.values())]
    print(f"\n{len(results)} problems, of which all solve {len(common)}; the columns after the first are on these:\n")
    print(
        "| | reached, of all | evaluations | fewer than ours | more | our time in its, median |\n" + "| --- " * 6 + "|"
    )
    for name in SOLVERS:
        reached = sum(runs[name].reached for runs in results.values())
        total = sum(runs[name].evaluations for runs in common)
        fewer, more = (
            sum(sign * (runs["optimjax"].evaluations - runs[name].evaluations) > 0 for runs in common)
            for sign in (1, -1)
        )
        ratio = statistics.median(runs[name].ratio for runs in common)
        print(f"| {name} | {reached} | {total} | {fewer} | {more} | {ratio:.2f} |")
    print()
    for problem, runs in results.items():
        ended = [f"{name} at {run.value:.3g}" for name, run in runs.items() if not run.reached]
        if ended:
            print(f"{problem} not reached: {', '.join(ended)}")


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("names", nargs="*", metavar="name", help="of problems; all of them unless given")
    options = parser.parse_args()
    known = {problem.name: problem for problem in PROBLEMS}
    unknown = set(options.names) - known.keys()
    if unknown:
        parser.error(f"there is no problem {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    print(f"jax {jax.__version__}, optax {optax.__version__}, torch {torch.__version__}, scipy {scipy.__version__}\n")
    print("| problem | n |" + "".join(f" {name}, evaluations |" for name in SOLVERS), end="")
    print("".join(f" {name}, ms |" for name in SOLVERS) + "\n" + "| --- " * (2 + 2 * len(SOLVERS)) + "|")
    torch.set_num_threads(1)
    threadpool_limits(1)  # SciPy's linear algebra
    results = {}
    for problem in [known[name] for name in options.names] or PROBLEMS:
        runs = results[problem.name] = measure(problem, options.rounds)
        cells = [f"{run.evaluations}{'' if run.reached else ' ✗'}" for run in runs.values()]
        cells += [f"{1e3 * run.seconds:.2f}" for run in runs.values()]
        print(f"| {problem.name} | {len(problem.start)} | {' | '.join(cells)} |", flush=True)
    summary(results)


if __name__ == "__main__":
    main()
