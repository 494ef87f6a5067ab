"""Time a whole training step: value, gradient and AdamW's update, by the class, by Flax, by hand, and by PyTorch.

`python benchmarks/training_step.py` prints, for a network of three layers and for a small transformer, medians over
turns and medians of ratios turn by turn. PyTorch has turns of its own with the class, because its threads go on waiting
for work for a while, in the turn of whoever comes next. `--compile` adds `torch.compile`, which compiles for a minute.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from optimjax._command.neighbours import Neighbours
from optimjax._command.timing import interleaved
from optimjax._command.training import DECAY, RATE, by_class, by_flax, by_hand, by_torch
from optimjax._command.workloads import optax_update

BATCH, WIDTH, LAYERS, HEADS, LENGTH, WORDS = 128, 128, 4, 4, 32, 64


class Layers(nnx.Module):
    """Three layers."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = [(64, 128), (128, 128), (128, 10)]
        self.layers = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Block(nnx.Module):
    """Attention and two layers, each after a norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Four blocks of width 128."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TorchBlock(torch.nn.Module):
    """The same block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        h = self.first(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x)), approximate="tanh"))


def torch_layers() -> Any:
    nn = torch.nn
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def torch_transformer() -> Any:
    blocks = [TorchBlock() for _ in range(LAYERS)]
    return torch.nn.Sequential(torch.nn.Embedding(WORDS, WIDTH), *blocks, torch.nn.Linear(WIDTH, WORDS))


def in_jax(make: Callable[[], Any], x: Any, y: Any) -> dict[str, Callable[[], Any]]:
    tx = optax.adamw(RATE, weight_decay=DECAY)
    return {
        "step(loss_fn, x, y)": by_class(make(), x, y),
        "  donate = True": by_class(make(), x, y, donate=True),
        "  max_grad_norm": by_class(make(), x, y, max_grad_norm=1.0),
        "  max_grad_norm, skip_nonfinite": by_class(make(), x, y, max_grad_norm=1.0, skip_nonfinite=True),
        "nnx.jit": by_flax(make(), x, y, optax),
        "nnx.cached_partial": by_flax(make(), x, y, optax, cached=True),
        "jax.jit of flat lists": by_hand(make(), x, y, tx.init, optax_update(tx)),
    }


def in_torch(make: Callable[[], Any], torch_model: Callable[[], Any], x: Any, y: Any, compiled: bool) -> Any:
    step = functools.partial(by_torch, Neighbours.find(), x=np.asarray(x), y=np.asarray(y))
    runs = {
        "step(loss_fn, x, y)": by_class(make(), x, y),
        "PyTorch, eager": step(model=torch_model()),
        "PyTorch, eager, fused=True": step(model=torch_model(), fused=True),
    }
    if compiled:
        runs["torch.compile, fused=True"] = step(model=torch_model(), compiled=True, fused=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of the two networks")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.normal(size=(BATCH, 64)), jnp.float32), jnp.asarray(rng.integers(0, 10, BATCH))
    words = jnp.asarray(rng.integers(0, WORDS, (8, LENGTH)), jnp.int32)
    networks = {
        f"three layers, batch {BATCH}": (lambda: Layers(nnx.Rngs(0)), torch_layers, images, labels),
        f"transformer, {LAYERS} blocks of {WIDTH}": (lambda: Transformer(nnx.Rngs(0)), torch_transformer, words, words),
    }
    for title, (make, torch_model, x, y) in networks.items():
        report(title, in_jax(make, x, y), given.seconds)
        of_torch = in_torch(make, torch_model, x, y, given.compile)
        report(f"{title}; PyTorch has {torch.get_num_threads()} threads", of_torch, given.seconds)


def report(title: str, runs: Any, seconds: float) -> None:
    timings = interleaved(runs, seconds=seconds, warm_up=5)
    first = next(iter(runs))
    print(f"{title}; {len(timings.seconds[first])} turns")
    print(f"{'':34}{'median ms':>10}   ours / it (middle half)")
    for name in runs:
        low, high = timings.quartiles(first, name)
        ratio = f"{timings.ratio(first, name):.2f} ({low:.2f} to {high:.2f})" if name != first else "1"
        print(f"{name:34}{1e3 * timings.median(name):10.3f}   {ratio}")
    print()


if __name__ == "__main__":
    main()
