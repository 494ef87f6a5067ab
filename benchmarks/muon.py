"""Measure what it brings to orthogonalise matrices of one shape together: Muon's step, compilation and memory.

`python benchmarks/muon.py` prints, for some counts and sizes of square matrices, medians over interleaved steps in
milliseconds of processor time (the sum over all cores, which other work on the machine disturbs less than wall time);
in brackets the seconds that compiling took, and the temporary memory as a share of the parameters. Matrices are
orthogonalised one by one, up to 2^20 elements together, as :mod:`optimjax.algorithms.muon` does, or all together.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimjax import functional as F
from optimjax.algorithms import muon

TOGETHER = {"one by one": 1, "2^20 elements": muon.ELEMENTS, "all": 2**62}
Run = Callable[[], Any]


def functional(together: int, ns_dtype: str, arrays: list[Any]) -> tuple[Run, float, float]:
    """A jitted pure update, the seconds of its compilation, and its temporary memory as a share of the parameters."""
    jax.clear_caches()
    muon.ELEMENTS = together
    algorithm = F.muon(ns_dtype=ns_dtype)
    state = algorithm.init(arrays)
    start = time.perf_counter()
    update = jax.jit(algorithm.update).lower(arrays, arrays, state).compile()
    seconds = time.perf_counter() - start
    analysis: Any = update.memory_analysis()
    share = analysis.temp_size_in_bytes / sum(array.nbytes for array in arrays)
    return lambda: jax.block_until_ready(update(arrays, arrays, state)), seconds, share


def measure(count: int, size: int, ns_dtype: str, rounds: int) -> list[str]:
    """The cells of a row."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(size, size)).astype(np.float32)) for _ in range(count)]
    made = {name: functional(together, ns_dtype, arrays) for name, together in TOGETHER.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for step in range(-2, rounds):
        for name, (run, _, _) in made.items():
            start = time.process_time()
            run()
            if step >= 0:
                times[name].append(time.process_time() - start)
    return [f"{1e3 * statistics.median(times[n]):.3g} ({s:.2f} s, {share:.2f})" for n, (_, s, share) in made.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("| matrices | | " + " | ".join(TOGETHER) + " |\n" + "| --- " * 5 + "|")
    for count, size in [(64, 32), (64, 64), (24, 256), (16, 512), (4, 1024)]:
        for ns_dtype in ("bfloat16", "float32"):
            print(
                f"| {count} of {size}×{size} | {ns_dtype} | "
                + " | ".join(measure(count, size, ns_dtype, rounds))
                + " |"
            )


if __name__ == "__main__":
    main()
