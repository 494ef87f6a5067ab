"""Is Muon worth it? A small transformer for characters, trained by AdamW and by Muon with AdamW for the rest.

    python benchmarks/muon_or_adamw.py [--steps 300] [--seeds 3] [--out muon_or_adamw.png]

Both have a sweep of as many rates, the same schedule (warm-up, cosine), the same initial weights and batches for each
seed. The text is the documentation that Python ships (``pydoc_data.topics``). Printed are, for each rate, the mean of
the last losses on held-out text with its spread over the seeds, and how many steps the best rate of each takes to the
loss that AdamW ends with. The picture has the curves of the best rates. Ten minutes on two cores.
"""

import argparse
import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optimjax as optim

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 3, 64, 16
ADAMW_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MUON_RATES = (3e-3, 1e-2, 3e-2, 1e-1)  # of the matrices; the rest has the best rate of AdamW alone
EVERY = 10  # steps between two looks at the held-out text


class Block(nnx.Module):
    """Attention and a multilayer perceptron, each after a norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.before_attention(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class Transformer(nnx.Module):
    """Embeddings, blocks, and a head that shares nothing with the embedding."""

    def __init__(self, letters: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(letters, WIDTH, rngs=rngs)
        self.place = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, letters, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.place(jnp.arange(LENGTH))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: Transformer, tokens: Any) -> Any:
    logits = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()


evaluate = nnx.jit(loss_fn)


def text() -> tuple[np.ndarray, int]:
    """The characters as numbers, and how many there are."""
    joined = "\n".join(topics.values())
    letters, numbers = np.unique(list(joined), return_inverse=True)
    return numbers.astype(np.int32), len(letters)


def batches(numbers: np.ndarray, seed: int, count: int, size: int) -> np.ndarray:
    starts = np.random.default_rng(seed).integers(0, len(numbers) - LENGTH - 1, (count, size))
    return numbers[starts[..., None] + np.arange(LENGTH + 1)]


def make(name: str, model: Transformer, rate: float, rest: float) -> optim.Optimizer:
    if name == "AdamW":
        return optim.AdamW(model, lr=rate)
    return optim.AdamW(optim.muon_groups(model, exclude=["head.*"], lr=rate), lr=rest)


def train(name: str, rate: float, rest: float, seed: int, steps: int) -> list[float]:
    """The losses on held-out text, one for every ten steps."""
    numbers, letters = text()
    border = int(0.9 * len(numbers))
    model = Transformer(letters, nnx.Rngs(seed))
    optimizer = make(name, model, rate, rest)
    scheduler = optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    held_out = jnp.asarray(batches(numbers[border:], 0, 1, 64)[0])
    losses = []
    for step, tokens in enumerate(batches(numbers[:border], seed, steps, BATCH)):
        optimizer.step(loss_fn, jnp.asarray(tokens))
        scheduler.step()
        if (step + 1) % EVERY == 0:
            losses.append(float(evaluate(model, held_out)))
    return losses


def sweep(name: str, rates: tuple[float, ...], rest: float, seeds: int, steps: int) -> dict[float, list[list[float]]]:
    runs = {}
    for rate in rates:
        start = time.perf_counter()
        runs[rate] = [train(name, rate, rest, seed, steps) for seed in range(seeds)]
        last = [curve[-1] for curve in runs[rate]]
        spread = statistics.stdev(last) if seeds > 1 else 0.0
        print(
            f"| {name} | {rate:g} | {statistics.mean(last):.3f} ± {spread:.3f} | "
            f"{(time.perf_counter() - start) / seeds / steps * 1e3:.1f} |",
            flush=True,
        )
    return runs


def best(runs: dict[float, list[list[float]]]) -> float:
    return min(runs, key=lambda rate: statistics.mean(curve[-1] for curve in runs[rate]))


def steps_to(curves: list[list[float]], loss: float) -> float:
    """The mean number of steps until the loss is reached; infinite where a run does not."""
    return statistics.mean(
        next((EVERY * (i + 1) for i, value in enumerate(curve) if value <= loss), float("inf")) for curve in curves
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="muon_or_adamw.png")
    arguments = parser.parse_args()
    print("| | rate | held-out loss at the end | ms a step |\n| --- | --- | --- | --- |")
    adamw = sweep("AdamW", ADAMW_RATES, 0.0, arguments.seeds, arguments.steps)
    rest = best(adamw)
    muon = sweep("Muon and AdamW", MUON_RATES, rest, arguments.seeds, arguments.steps)
    goal = statistics.mean(curve[-1] for curve in adamw[rest])
    print(f"\nSteps to the loss that AdamW ends with, {goal:.3f}:")
    for name, runs in (("AdamW", adamw), ("Muon and AdamW", muon)):
        print(f"  {name}, rate {best(runs):g}: {steps_to(runs[best(runs)], goal):.0f} of {arguments.steps}")
    draw({"AdamW": adamw[rest], "Muon and AdamW": muon[best(muon)]}, arguments.out)


def draw(curves: dict[str, list[list[float]]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, runs in curves.items():
        runs_array = np.array(runs)
        steps = EVERY * (1 + np.arange(runs_array.shape[1]))
        (line,) = axes.plot(steps, runs_array.mean(0), label=name)
        axes.fill_between(steps, runs_array.min(0), runs_array.max(0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel="held-out loss (nats a character)")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
