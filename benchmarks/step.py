"""Time one optimizer step alongside optax and PyTorch: `python benchmarks/step.py [--sets mlp small ...] [--rounds N]`.

The contenders take turns within one run, so that a noisy machine is noisy for all; the figures are medians over the
turns. "first" is the first call in a cleared cache: making the state, tracing, lowering, compiling and one step.
"temp" is the temporary memory of the compiled functional update, of ours and of optax's, as a share of the
parameters' bytes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimjax as optim

try:
    import torch
except ImportError:
    torch = None

Shapes = list[tuple[int, ...]]


def mlp() -> Shapes:
    return [(784, 256), (256,), (256, 10), (10,)]


def small() -> Shapes:
    return [(32, 32)] * 1000


def resnet50() -> Shapes:
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, size, kernel in ((width, inputs, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, size, kernel, kernel), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    n = 768
    block: Shapes = [(n,), (n,), (n, 3 * n), (3 * n,), (n, n), (n,), (n,), (n,), (n, 4 * n), (4 * n,), (4 * n, n), (n,)]
    return [(50257, n), (1024, n), *(block * 12), (n,), (n,)]


SETS: dict[str, Callable[[], Shapes]] = {"mlp": mlp, "small": small, "resnet50": resnet50, "gpt2": gpt2}
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


class Contender:
    """A step to be timed: `run()` returns what to wait for."""

    def __init__(self, name: str, run: Callable[[], Any]):
        self.name = name
        self.run = run
        self.first = 0.0
        self.times: list[float] = []

    def call(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.run())
        return time.perf_counter() - start


def functional(init: Callable[..., Any], update: Callable[..., Any], params: Any, grads: Any) -> Contender:
    """A jitted pure update whose state is donated; parameters are not, as in the facade.

    The state is returned first: JAX gives donated memory to the first outputs that fit, and parameters fit as well.
    """
    compiled = jax.jit(lambda params, grads, state: update(params, grads, state)[::-1], donate_argnums=2)
    held = {"params": params}

    def run() -> Any:
        if "state" not in held:
            held["state"] = init(params)
        held["state"], held["params"] = compiled(held["params"], grads, held["state"])
        return held["params"]

    contender = Contender("", run)
    analysis = compiled.lower(params, grads, init(params)).compile().memory_analysis()
    contender.temp = analysis.temp_size_in_bytes if analysis else float("nan")  # pyright: ignore[reportAttributeAccessIssue]
    return contender


def optax_update(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def update(params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update


def contenders(algorithm: str, shapes: Shapes) -> tuple[list[Contender], dict[str, float]]:
    facade_class, factory, make_optax, options = ALGORITHMS[algorithm]
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    params, grads = [jnp.asarray(v) for v in values], [jnp.asarray(v * 0.1) for v in values]

    ours = factory(**options)
    tx = make_optax()
    rows = [functional(ours.init, ours.update, params, grads), functional(tx.init, optax_update(tx), params, grads)]
    temps = {name: row.temp for name, row in zip(("ours", "optax"), rows, strict=True)}  # pyright: ignore[reportAttributeAccessIssue]
    rows[0].name, rows[1].name = "optimjax functional", "optax"
    optimizer = facade_class(params, **options)
    rows.append(Contender("optimjax facade", lambda: (optimizer.step(grads), optimizer.params)[1]))
    if torch is not None:
        for kind in ("foreach", "fused"):
            tensors = [torch.tensor(v, requires_grad=True) for v in values]
            for tensor, value in zip(tensors, values, strict=True):
                tensor.grad = torch.tensor(value * 0.1)
            reference = getattr(torch.optim, facade_class.__name__)(tensors, **options, **{kind: True})
            rows.append(Contender(f"torch {kind}", lambda reference=reference: reference.step() or 0))
    return rows, temps


def measure(algorithm: str, set_name: str, rounds: int) -> None:
    shapes = SETS[set_name]()
    size = sum(int(np.prod(shape)) for shape in shapes) * 4
    rows, temps = contenders(algorithm, shapes)
    for row in rows:
        jax.clear_caches()
        row.first = row.call()
    for row in rows:  # compile again what clearing the caches has dropped
        row.call()
    for turn in range(rounds):
        for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
            row.times.append(row.call())
    reference = statistics.median(next(row for row in rows if row.name == "optax").times)
    print(f"\n{algorithm}, {set_name}: {len(shapes)} tensors, {size / 1e6:.1f} MB")
    print(f"{'':22}{'first s':>9}{'step ms':>10}{'of optax':>10}{'temp %':>9}")
    for row in rows:
        step = statistics.median(row.times)
        temp = {"optimjax functional": temps["ours"], "optax": temps["optax"]}.get(row.name)
        share = f"{100 * temp / size:9.3f}" if temp is not None else ""
        print(f"{row.name:22}{row.first:9.2f}{1e3 * step:10.3f}{step / reference:10.2f}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0]}, optax {optax.__version__}", end="")
    print(f", torch {torch.__version__}" if torch is not None else "")
    for algorithm in options.algorithms:
        for set_name in options.sets:
            measure(algorithm, set_name, options.rounds)


if __name__ == "__main__":
    main()
