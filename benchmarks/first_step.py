"""Time the first step in a new process alongside optax: `python benchmarks/first_step.py [--sets mlp ...]`.

Each figure is from a process of its own, which has imported everything and has parameters and gradients; the contenders
take turns. "state" is making the state, "update" tracing, lowering, compiling and one step (of the facade, which makes
the state in its first step, "update" is all). A ratio is the median over the rounds of the ratios within one round.

With `--cached`, a process fills a persistent compilation cache first, and the figures are those of a second process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from step import ALGORITHMS, SETS, optax_update

CONTENDERS = ("optax", "functional", "facade")
COMPILED = "/jax/core/compile/backend_compile_duration"


def first_step(contender: str, algorithm: str, set_name: str) -> dict[str, float]:
    """The seconds of one first step, in this process."""
    facade_class, factory, make_optax, options = ALGORITHMS[algorithm]
    shapes = SETS[set_name]()
    params, grads = (jax.device_put([np.full(shape, value, np.float32) for shape in shapes]) for value in (1.0, 0.1))
    jax.block_until_ready((params, grads))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # what any first program costs is not counted
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(duration_secs) if event == COMPILED else None
    )
    start = time.perf_counter()
    if contender == "facade":
        optimizer = facade_class(params, **options)
        made = time.perf_counter()
        optimizer.step(grads)
        result = optimizer.params
    else:
        tx: Any = make_optax() if contender == "optax" else factory(**options)
        update = optax_update(tx) if contender == "optax" else tx.update
        step = jax.jit(lambda params, grads, state: update(params, grads, state)[::-1], donate_argnums=2)
        state = tx.init(params)
        made = time.perf_counter()
        result = step(params, grads, state)
    jax.block_until_ready(result)
    end = time.perf_counter()
    return {
        "total": end - start,
        "state": made - start,
        "update": end - made,
        "compile": sum(compiled),
        "programs": len(compiled),
    }


def in_new_process(contender: str, algorithm: str, set_name: str, cache: str | None) -> dict[str, float]:
    """The same in another process."""
    command = [sys.executable, __file__, "--one", contender, algorithm, set_name]
    if cache is not None:
        command += ["--cache", cache]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(algorithm: str, set_name: str, rounds: int, cached: bool) -> None:
    """Print the table for one set of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, name)) if cached else None for name in CONTENDERS}
        if cached:
            for name in CONTENDERS:
                in_new_process(name, algorithm, set_name, caches[name])
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for turn in range(rounds):
            for name in (*CONTENDERS[turn % 3 :], *CONTENDERS[: turn % 3]):
                runs[name].append(in_new_process(name, algorithm, set_name, caches[name]))
    print(f"\n{algorithm}, {set_name}: {len(SETS[set_name]())} tensors{', second process' * cached}")
    head = "first s", "of optax", "state s", "update s", "of optax", "XLA s", "programs"
    print(" " * 12 + "".join(f"{title:>10}" for title in head))
    for name in CONTENDERS:
        columns = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        ratios = {
            key: statistics.median(a[key] / b[key] for a, b in zip(runs[name], runs["optax"], strict=True))
            for key in ("total", "update")
        }
        print(
            f"{name:12}{columns['total']:10.2f}{ratios['total']:10.2f}{columns['state']:10.2f}{columns['update']:10.2f}"
            f"{ratios['update']:10.2f}{columns['compile']:10.2f}{columns['programs']:10.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cached", action="store_true", help="of a second process, with a persistent cache")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cache is not None:
        jax.config.update("jax_compilation_cache_dir", options.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if options.one is not None:
        print(json.dumps(first_step(*options.one)))
        return
    print(f"jax {jax.__version__} on {jax.devices()[0]}")
    for algorithm in options.algorithms:
        for set_name in options.sets:
            measure(algorithm, set_name, options.rounds, options.cached)


if __name__ == "__main__":
    main()
