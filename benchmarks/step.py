"""Time one optimizer step alongside optax and PyTorch: `python benchmarks/step.py [--sets mlp small ...] [--rounds N]`.

The contenders take turns within one run, so that a noisy machine is noisy for all; milliseconds are medians over the
turns, "of optax" is the median of the ratios turn by turn. "first" is the first call in a cleared cache: making the
state, tracing, lowering, compiling and one step. "temp" is the temporary memory of the compiled functional update, of
ours and of optax's, as a share of the parameters' bytes. `python -m optimjax bench` is the short form.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimjax as optim
from optimjax._command.neighbours import Neighbours
from optimjax._command.timing import interleaved, timed
from optimjax._command.workloads import (
    SETS,
    Contenders,
    Shapes,
    by_class,
    by_function,
    by_torch,
    donated,
    optax_update,
    random_values,
)

ALGORITHMS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "adamw": (
        optim.AdamW,
        optim.functional.adamw,
        lambda: optax.adamw(1e-3, weight_decay=1e-2),
        dict(lr=1e-3, weight_decay=1e-2),
    ),
    "sgd momentum": (
        optim.SGD,
        optim.functional.sgd,
        lambda: optax.sgd(1e-3, momentum=0.9),
        dict(lr=1e-3, momentum=0.9),
    ),
}


def temporary(init: Any, update: Any, params: Any, grads: Any) -> float:
    """Bytes of temporary memory of the compiled update."""
    analysis = donated(update).lower(params, grads, init(params)).compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis else float("nan")


def contenders(algorithm: str, shapes: Shapes, neighbours: Neighbours) -> tuple[Contenders, dict[str, float]]:
    """Those of this algorithm, and the temporary memory of some."""
    facade_class, factory, make_optax, options = ALGORITHMS[algorithm]
    values = random_values(shapes)
    params, grads = [jnp.asarray(v) for v in values], [jnp.asarray(v * 0.1) for v in values]
    ours, tx = factory(**options), make_optax()
    pure: dict[str, tuple[Any, Any]] = {
        "optimjax functional": (ours.init, ours.update),
        "optax": (tx.init, optax_update(tx)),
    }
    temps = {name: temporary(init, update, params, grads) for name, (init, update) in pure.items()}
    runs: Contenders = {name: by_function(init, update, params, grads) for name, (init, update) in pure.items()}
    runs["optimjax facade"] = by_class(facade_class(params, **options), grads)
    if neighbours.torch is not None:
        for kind in ("foreach", "fused"):
            runs[f"torch {kind}"] = by_torch(neighbours, facade_class.__name__, values, {**options, kind: True})
    return runs, temps


def measure(algorithm: str, set_name: str, rounds: int, neighbours: Neighbours) -> None:
    shapes = SETS[set_name]()
    size = sum(int(np.prod(shape)) for shape in shapes) * 4
    runs, temps = contenders(algorithm, shapes, neighbours)
    first = {}
    for name, run in runs.items():
        jax.clear_caches()
        first[name] = timed(run)
    timings = interleaved(runs, rounds=rounds, warm_up=1)  # which compiles again what clearing the caches has dropped
    print(f"\n{algorithm}, {set_name}: {len(shapes)} tensors, {size / 1e6:.1f} MB")
    print(f"{'':22}{'first s':>9}{'step ms':>10}{'of optax':>10}{'temp %':>9}")
    for name in runs:
        share = f"{100 * temps[name] / size:9.3f}" if name in temps else ""
        step, ratio = 1e3 * timings.median(name), timings.ratio(name, "optax")
        print(f"{name:22}{first[name]:9.2f}{step:10.3f}{ratio:10.2f}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0]}, optax {optax.__version__}", end="")
    neighbours = Neighbours.find()
    print(f", torch {neighbours.torch.__version__}" if neighbours.torch is not None else "")
    for algorithm in options.algorithms:
        for set_name in options.sets:
            measure(algorithm, set_name, options.rounds, neighbours)


if __name__ == "__main__":
    main()
