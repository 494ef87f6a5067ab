"""Is Muon worth it? A small transformer for characters, trained by AdamW and by Muon with AdamW for the rest.

    python benchmarks/muon_or_adamw.py [--steps 300] [--seeds 3] [--out muon_or_adamw.png]

Both have the same sweep of rates, the same schedule (warm-up, then cosine), the same weight decay, and for each seed
the same initial weights and batches. Muon's updates are as large as those of AdamW
(``adjust_lr_fn="match_rms_adamw"``), so one rate is for all parameters. The text is the documentation that Python
ships (``pydoc_data.topics``), a tenth of which is held out.

Printed are, for each rate, the mean of the last held-out losses with its standard deviation over the seeds, and the
time of a step; then how many steps each takes, at its best rate, to some losses. The picture has the curves of the
best rates, with their range over the seeds. Ten minutes on two cores.
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

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 4, 64, 32
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
WEIGHT_DECAY = 0.1
EVERY = 10  # steps between two looks at the held-out text
NAMES = ("AdamW", "Muon and AdamW")


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


def make(name: str, model: Transformer, rate: float) -> optim.Optimizer:
    params: Any = model
    if name != "AdamW":
        options = {"lr": rate, "weight_decay": WEIGHT_DECAY, "adjust_lr_fn": "match_rms_adamw"}
        params = optim.muon_groups(model, exclude=["head.*"], **options)
    return optim.AdamW(params, lr=rate, weight_decay=WEIGHT_DECAY)


def train(name: str, rate: float, seed: int, steps: int) -> list[float]:
    """The losses on held-out text, one for every ten steps."""
    numbers, letters = text()
    border = int(0.9 * len(numbers))
    model = Transformer(letters, nnx.Rngs(seed))
    optimizer = make(name, model, rate)
    scheduler = optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    held_out = jnp.asarray(batches(numbers[border:], 0, 1, 64)[0])
    losses = []
    for step, tokens in enumerate(batches(numbers[:border], seed, steps, BATCH)):
        optimizer.step(loss_fn, jnp.asarray(tokens))
        scheduler.step()
        if (step + 1) % EVERY == 0:
            losses.append(float(evaluate(model, held_out)))
    return losses


def sweep(name: str, seeds: int, steps: int) -> np.ndarray:
    """The losses, of shape (rates, seeds, looks)."""
    runs = []
    for rate in RATES:
        start = time.perf_counter()
        curves = [train(name, rate, seed, steps) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / seeds / steps
        last = [curve[-1] for curve in curves]
        spread = statistics.stdev(last) if seeds > 1 else 0.0
        print(f"| {name} | {rate:g} | {statistics.mean(last):.3f} ± {spread:.3f} | {1e3 * seconds:.0f} |", flush=True)
        runs.append(curves)
    return np.array(runs)


def steps_to(curves: np.ndarray, loss: float) -> str:
    """The number of steps until the mean over the seeds is at the loss; a dash where it never is."""
    there = curves.mean(0) <= loss
    return f"{EVERY * (1 + there.argmax())}" if there.any() else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="muon_or_adamw.png")
    arguments = parser.parse_args()
    print("| | rate | held-out loss at the end | ms a step |\n| --- | --- | --- | --- |")
    best = {}
    for name in NAMES:
        runs = sweep(name, arguments.seeds, arguments.steps)
        best[name] = runs[runs[..., -1].mean(-1).argmin()]
    ends = [curves.mean(0)[-1] for curves in best.values()]
    goals = [*(loss for loss in (3.0, 2.5, 2.0, 1.5) if loss > max(ends)), max(ends)]
    print("\n| steps to a held-out loss of | " + " | ".join(f"{goal:.3g}" for goal in goals) + " |")
    print("| --- " * (1 + len(goals)) + "|")
    for name, curves in best.items():
        print(f"| {name} | " + " | ".join(steps_to(curves, goal) for goal in goals) + " |")
    draw(best, arguments.out)


def draw(best: dict[str, np.ndarray], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curves in best.items():
        steps = EVERY * (1 + np.arange(curves.shape[-1]))
        (line,) = axes.plot(steps, curves.mean(0), label=name)
        axes.fill_between(steps, curves.min(0), curves.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="step", ylabel="held-out loss (nats a character)")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
