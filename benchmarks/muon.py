"""Time Muon, and Muon with AdamW for the rest, alongside optax: `python benchmarks/muon.py [--layers N] [--rounds N]`.

The parameters have the shapes of GPT-2 small: in each layer four matrices, from 768×768 to 768×3072; the mixed step
also has its embeddings, norms and biases. Contenders take turns, in compiling with cleared caches and in stepping; the
figures are medians over the turns, of times and of ratios. "float32" computes what optax computes; "bfloat16" is the
default, which is PyTorch's. "first" is one first call: making the state, tracing, lowering, compiling and one step.
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
from optimjax import functional as F

KERNELS = ((-1,), (-2,))  # of shape (in, out), as optax takes them to be
Tree = dict[str, Any]


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """By name, as dotted names are with layers in a list."""
    n = width
    block = {
        "ln_1.scale": (n,),
        "ln_1.bias": (n,),
        "qkv.kernel": (n, 3 * n),
        "qkv.bias": (3 * n,),
        "out.kernel": (n, n),
        "out.bias": (n,),
        "ln_2.scale": (n,),
        "ln_2.bias": (n,),
        "up.kernel": (n, 4 * n),
        "up.bias": (4 * n,),
        "down.kernel": (4 * n, n),
        "down.bias": (n,),
    }
    found = {"wte": (50257, n), "wpe": (1024, n)}
    for layer in range(layers):
        found |= {f"{layer}.{name}": shape for name, shape in block.items()}
    return found | {"ln_f.scale": (n,), "ln_f.bias": (n,)}


def is_matrix(name: str) -> bool:
    return name.endswith("kernel")


class Contender:
    """A step to be timed: `run()` returns what to wait for; `compile()` traces, lowers and compiles it, if it can."""

    def __init__(self, name: str, run: Callable[[], Any], compile: Callable[[], Any] | None = None):
        self.name = name
        self.run = lambda: jax.block_until_ready(run())
        self.compile = compile or (lambda: None)
        self.steps: list[float] = []
        self.compilations: list[float] = []
        jax.clear_caches()
        self.first = seconds(self.run)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pure(name: str, init: Callable[..., Any], update: Callable[..., Any], params: Tree, grads: Tree) -> Contender:
    """A jitted pure update, whose state is donated."""
    compiled = jax.jit(lambda params, grads, state: update(params, grads, state)[::-1], donate_argnums=2)
    held: dict[str, Any] = {"params": params}
    abstract = jax.eval_shape(init, params)

    def run() -> Any:
        if "state" not in held:
            held["state"] = init(params)
        held["state"], held["params"] = compiled(held["params"], grads, held["state"])
        return held["params"]

    return Contender(name, run, lambda: compiled.lower(params, grads, abstract).compile())


def of_optax(name: str, tx: optax.GradientTransformation, params: Tree, grads: Tree) -> Contender:
    def update(params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return pure(name, tx.init, update, params, grads)


def facade(name: str, make: Callable[[], optim.Optimizer], grads: Tree) -> Contender:
    held: list[optim.Optimizer] = []

    def run() -> Any:
        if not held:
            held.append(make())
        held[0].step(grads)
        return held[0].params

    return Contender(name, run)


def of_muon(params: Tree, grads: Tree) -> list[Contender]:
    """The matrices alone; optax first."""
    tx = optax.contrib.muon(0.02, weight_decay=0.1)
    options: dict[str, Any] = {"lr": 0.02, "matrix_axes": KERNELS}
    rows = [of_optax("optax.contrib.muon", tx, params, grads)]
    for dtype in ("float32", "bfloat16"):
        for gram in (False, True):
            rule = F.muon(**options, ns_dtype=dtype, gram=gram)
            rows.append(pure(f"F.muon, {dtype}{', gram' * gram}", rule.init, rule.update, params, grads))
    for dtype in ("float32", "bfloat16"):
        rows.append(facade(f"optim.Muon, {dtype}", lambda d=dtype: optim.Muon(params, **options, ns_dtype=d), grads))
    return rows


def of_mixed(params: Tree, grads: Tree) -> list[Contender]:
    """Muon for the matrices, AdamW for the rest; optax first."""
    labels = {name: "muon" if is_matrix(name) else "adamw" for name in params}
    tx = optax.partition(
        {"muon": optax.contrib.muon(0.02, weight_decay=0.1), "adamw": optax.adamw(3e-4, weight_decay=0.01)}, labels
    )
    rows = [of_optax("optax.partition", tx, params, grads)]
    for dtype in ("float32", "bfloat16"):
        options: dict[str, Any] = {"lr": 0.02, "matrix_axes": KERNELS, "ns_dtype": dtype}
        both = F.partition({"muon": F.muon(**options), "adamw": F.adamw(3e-4)}, labels)
        rows.append(pure(f"F.partition, {dtype}", both.init, both.update, params, grads))

        def make(options: dict[str, Any] = options) -> optim.Optimizer:
            rules = [{"params": "*.kernel", "algorithm": "Muon", **options}]
            return optim.AdamW(optim.group_parameters(params, rules), lr=3e-4)

        rows.append(facade(f"optim.AdamW with Muon, {dtype}", make, grads))
    return rows


def compare(title: str, rows: list[Contender], rounds: int) -> None:
    """Print the table of contenders, the first of which the others are compared with."""
    for turn in range(rounds):
        for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
            jax.clear_caches()
            row.compilations.append(seconds(row.compile))
    for row in rows:  # compile again what clearing the caches has dropped
        row.run()
    for turn in range(rounds):
        for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
            row.steps.append(seconds(row.run))
    reference = rows[0]
    print(f"\n| {title} | step, s | of optax | compile, s | of optax | first step, s | of optax |")
    print("| --- " * 7 + "|")
    for row in rows:
        step = f"{statistics.median(row.steps):.3g} | {paired(row.steps, reference.steps):.2f}"
        compilation = "| "  # of an optimizer, which compiles in its first step
        if row.compile() is not None:
            ratio = paired(row.compilations, reference.compilations)
            compilation = f"{statistics.median(row.compilations):.2f} | {ratio:.2f}"
        print(
            f"| {row.name} | {step} | {compilation} | {row.first:.2f} | {row.first / reference.first:.2f} |", flush=True
        )


def paired(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0]}, optax {optax.__version__}")
    rng = np.random.default_rng(0)
    every = shapes(options.layers, options.width)
    grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in every.items()}
    params = {name: 0.02 * grad for name, grad in grads.items()}
    title = f"{options.layers} layers of width {options.width}"
    matrices = [{name: value for name, value in tree.items() if is_matrix(name)} for tree in (params, grads)]
    compare(f"Muon, {title}", of_muon(*matrices), options.rounds)
    compare(f"Muon and AdamW, {title}", of_mixed(params, grads), options.rounds)


if __name__ == "__main__":
    main()
