"""Measure what Muon's ways of multiplying bring: matrices of one shape together, and the Gram iteration.

`python benchmarks/muon_iteration.py` prints, for some counts and sizes of square matrices, medians over interleaved
steps in milliseconds of processor time (the sum over all cores, which other work on the machine disturbs less than wall
time); in brackets the seconds that compiling took, and the temporary memory as a share of the parameters. Matrices are
orthogonalised one by one, up to 2^20 elements together, as :mod:`optimjax.algorithms.parts.matrices` does, or all
together. A second table has the same times for matrices of other shapes with and without `gram`, the products that it
needs as a share of those without it, and the errors of both: the distance from the same iteration in float64, as a
share of the norm, for a normal matrix and for one with singular values from 1e-4 to 1.
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
from optimjax.algorithms.parts import matrices, newton_schulz

TOGETHER = {"one by one": 1, "2^20 elements": matrices.ELEMENTS, "all": 2**62}
Run = Callable[[], Any]


def functional(together: int, ns_dtype: str, arrays: list[Any], **options: Any) -> tuple[Run, float, float]:
    """A jitted pure update, the seconds of its compilation, and its temporary memory as a share of the parameters."""
    jax.clear_caches()
    matrices.ELEMENTS = together
    algorithm = F.muon(ns_dtype=ns_dtype, **options)
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
    times = medians({name: run for name, (run, _, _) in made.items()}, rounds)
    return [f"{times[n]:.3g} ({s:.2f} s, {share:.2f})" for n, (_, s, share) in made.items()]


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of each, over interleaved rounds of which two are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(-2, rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if step >= 0:
                times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}


def measure_gram(rows: int, columns: int, ns_dtype: str, rounds: int) -> list[str]:
    """The cells of a row of the second table."""
    array = jnp.asarray(spectrum("normal", rows, columns))
    made = {gram: functional(matrices.ELEMENTS, ns_dtype, [array], gram=gram)[0] for gram in (False, True)}
    times = medians({str(gram): run for gram, run in made.items()}, rounds)
    plain = 5 * (2 * rows**2 * columns + rows**3)
    products = (6 * rows**2 * columns + 11 * rows**3) / plain if columns > 1.5 * rows else 1
    errors = [
        " / ".join(f"{error(kind, rows, columns, ns_dtype, name, gram):.2g}" for gram in (False, True))
        for name in ("standard", "polar_express")
        for kind in ("normal", "graded")
    ]
    plain, gram = times["False"], times["True"]
    return [f"{plain:.3g}", f"{gram:.3g}", f"{gram / plain:.2f}", f"{products:.2f}", *errors]


def spectrum(kind: str, rows: int, columns: int) -> np.ndarray:
    """A normal matrix, or one with singular values from 1e-4 to 1."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(rows, columns))
    if kind == "graded":
        u, _, vt = np.linalg.svd(normal, full_matrices=False)
        normal = (u * np.geomspace(1e-4, 1, rows)) @ vt
    return normal.astype(np.float32)


def error(kind: str, rows: int, columns: int, ns_dtype: str, name: str, gram: bool) -> float:
    """How far the direction is from that of the plain iteration in float64, as a share of the norm."""
    grad = spectrum(kind, rows, columns)
    algorithm = F.muon(1.0, 0, ns_dtype=ns_dtype, gram=gram, ns_coefficients=name)
    ours = algorithm.update(jnp.zeros_like(grad), grad, algorithm.init(grad))[0]
    u, s, vt = np.linalg.svd(grad.astype(np.float64), full_matrices=False)
    table = newton_schulz.PRESETS[name]
    s = s / (table.margin * np.linalg.norm(s))
    for a, b, c in table.steps(5):
        s = a * s + b * s**3 + c * s**5
    truth = -(u * s) @ vt
    return float(np.linalg.norm(np.asarray(ours, np.float64) - truth) / np.linalg.norm(truth))


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
    columns = [
        "plain",
        "gram",
        "time",
        "products",
        *(f"{name}, {k}" for name in ("standard", "polar_express") for k in ("normal", "graded")),
    ]
    print("\n| matrix | | " + " | ".join(columns) + " |\n" + "| --- " * (2 + len(columns)) + "|")
    for rows, size in [(256, 256), (256, 384), (256, 512), (256, 1024), (256, 2048), (768, 3072)]:
        for ns_dtype in ("bfloat16", "float32"):
            cells = measure_gram(rows, size, ns_dtype, rounds)
            print(f"| {rows}×{size} | {ns_dtype} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
