"""Time value, gradient and update of a small `flax.nnx` network: `step(loss_fn, ...)` alongside `nnx.Optimizer`.

`python benchmarks/loss_step.py` prints medians over interleaved calls, in microseconds, and medians of their ratios.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optimjax as optim
from optimjax._command.timing import interleaved


class Network(nnx.Module):
    """Three layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss_fn(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model: Network, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    x, y = jnp.ones((32, 64)), jnp.zeros((32, 10))
    ours = optim.SGD(Network(nnx.Rngs(0)), lr=1e-3, momentum=0.9)
    model = Network(nnx.Rngs(0))
    theirs = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)
    runs = {
        "optimizer.step(loss_fn, x, y)": lambda: ours.step(loss_fn, x, y),
        "nnx.jit and nnx.Optimizer": lambda: train_step(model, theirs, x, y),
    }
    timings = interleaved(runs, rounds=1000, warm_up=10)
    for name in runs:
        ratio = timings.ratio("optimizer.step(loss_fn, x, y)", name)
        print(f"{name:32}{1e6 * timings.median(name):8.0f} µs, of which the first takes {ratio:.2f}")


if __name__ == "__main__":
    main()
