"""Time a step that touches 256 rows of an embedding table: SparseAdam alongside dense Adam and PyTorch's SparseAdam.

`python benchmarks/sparse.py` prints, for tables of 10^4, 10^5 and 10^6 rows of 32 floats, the median and the least time
of steps in random order, and of the functional updates the temporary memory. Where the cost grows with the rows that a
step touches and not with the table, the three tables give the same figures.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

import optimjax as optim
from optimjax import functional as F

try:
    import torch
except ImportError:
    torch = None

TOUCHED, WIDTH = 256, 32
Run = Callable[[], Any]


def functional(algorithm: F.Algorithm, rows: int, grad: Any) -> tuple[Run, int]:
    """A jitted pure update with parameters and state donated, and its temporary memory in bytes."""
    table = jnp.zeros((rows, WIDTH))
    held = table, algorithm.init(table)
    compiled = jax.jit(algorithm.update, donate_argnums=(0, 2)).lower(held[0], grad, held[1]).compile()

    def run() -> Any:
        nonlocal held
        held = compiled(held[0], grad, held[1])
        return held[0]

    analysis: Any = compiled.memory_analysis()
    return run, analysis.temp_size_in_bytes


def facade(rows: int, grad: BCOO, donate: bool) -> Run:
    optimizer = optim.SparseAdam(jnp.zeros((rows, WIDTH)))
    optimizer.donate = donate

    def run() -> Any:
        optimizer.step(grad)
        return optimizer.params

    return run


def pytorch(rows: int, ids: Any, values: Any) -> Run:
    assert torch is not None
    torch.set_num_threads(1)  # so little work is slower on more
    table = torch.zeros((rows, WIDTH), requires_grad=True)
    table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=True)
    return torch.optim.SparseAdam([table]).step


class Row(NamedTuple):
    """The figures of a contender: milliseconds, and temporary memory where it is known."""

    median: float
    least: float
    temporary: int | None


def measure(rows: int, rounds: int) -> dict[str, Row]:
    rng = np.random.default_rng(0)
    ids, values = rng.integers(0, rows, TOUCHED), rng.normal(size=(TOUCHED, WIDTH)).astype(np.float32)
    grad = BCOO((jnp.asarray(values), jnp.asarray(ids[:, None])), shape=(rows, WIDTH))
    runs: dict[str, tuple[Run, int | None]] = {
        "SparseAdam, functional, donated": functional(F.sparse_adam(), rows, grad),
        "SparseAdam, class, donate = True": (facade(rows, grad, donate=True), None),
        "SparseAdam, class": (facade(rows, grad, donate=False), None),
        "Adam, functional, donated": functional(F.adam(), rows, grad.todense()),
    }
    if torch is not None:
        runs["torch SparseAdam"] = pytorch(rows, torch.tensor(ids), torch.tensor(values)), None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name in rng.permutation(list(runs)):  # for what ran before has filled the caches
            start = time.perf_counter()
            jax.block_until_ready(runs[name][0]())
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Row(statistics.median(times[name]), min(times[name]), runs[name][1]) for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[10**4, 10**5, 10**6])
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0]}", f"torch {torch.__version__}" if torch is not None else "")
    for rows in options.rows:
        print(f"\n{rows} rows, {rows * WIDTH * 4 / 1e6:.1f} MB{'median ms':>27}{'least':>10}{'temp kB':>10}")
        for name, row in measure(rows, options.rounds).items():
            temporary = "" if row.temporary is None else f"{row.temporary / 1e3:10.0f}"
            print(f"{name:36}{row.median:10.3f}{row.least:10.3f}{temporary}", flush=True)


if __name__ == "__main__":
    main()
