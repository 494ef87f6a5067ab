"""Time `clip_grad_norm_` side by side with PyTorch's: `python benchmarks/clip.py [--sets mlp deep gpt2] [--rounds N]`.

Both take turns within one run, so that a noisy machine is noisy for both. A ratio is the median over the rounds of ours
to PyTorch's of the same round. "first" is the first call, which compiles. The norm is above the limit, so that
gradients are scaled, and every call begins with the same gradients.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import optimjax as optim
from optimjax._command.workloads import Shapes, gpt2, mlp


def deep() -> Shapes:
    """An MLP of 21 layers: 42 arrays."""
    widths = [32, *[64] * 20, 10]
    return [shape for a, b in itertools.pairwise(widths) for shape in ((a, b), (b,))]


SETS: dict[str, Callable[[], Shapes]] = {"mlp": mlp, "deep": deep, "gpt2": gpt2}


def ours(values: list[np.ndarray]) -> Callable[[], Any]:
    parameters = [optim.Parameter(jnp.zeros(value.shape)) for value in values]
    grads = [jnp.asarray(value) for value in values]

    def run() -> Any:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        yield
        optim.clip_grad_norm_(parameters, 1.0)
        jax.block_until_ready([parameter.grad for parameter in parameters])
        yield

    return run


def theirs(values: list[np.ndarray]) -> Callable[[], Any]:
    parameters = [torch.nn.Parameter(torch.zeros(value.shape)) for value in values]
    grads, kept = ([torch.tensor(value) for value in values] for _ in range(2))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad

    def run() -> Any:
        for grad, value in zip(grads, kept, strict=True):
            grad.copy_(value)
        yield
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        yield

    return run


def timed(run: Callable[[], Any]) -> float:
    """Seconds between the two yields: what comes before the first prepares."""
    call = run()
    next(call)
    start = time.perf_counter()
    next(call)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--rounds", type=int, default=0, help="how many; as many as fit into ten seconds unless given")
    options = parser.parse_args()
    print("| arrays | elements | ours ms | torch ms | ratio | first s |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.sets:
        shapes = SETS[name]()
        values = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes]
        contenders = ours(values), theirs(values)
        first, _ = map(timed, contenders)
        for run in contenders:
            timed(run)
        elements = sum(value.size for value in values)
        rounds = options.rounds or (15 if elements > 10**7 else 301)
        rows = [[timed(run) for run in contenders] for _ in range(rounds)]
        our, their = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
        ratio = statistics.median(a / b for a, b in rows)
        print(f"| {len(shapes)} | {elements:,} | {our:.3f} | {their:.3f} | {ratio:.2f} | {first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
