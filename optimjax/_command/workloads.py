"""What is timed: updates by given gradients and sweeps, each by several libraries; see `training.py` for whole steps.

A contender is a function without arguments that takes one step and returns the arrays to wait for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optimjax as optim
from optimjax import functional as F
from optimjax._command.neighbours import Neighbours
from optimjax._command.training import cross_entropy

__all__ = [
    "SETS",
    "Contenders",
    "Shapes",
    "by_class",
    "by_function",
    "by_torch",
    "donated",
    "gpt2",
    "mlp",
    "optax_update",
    "random_values",
    "sweeps",
    "torch_training",
    "train",
    "updates",
]

Shapes = list[tuple[int, ...]]
Contenders = dict[str, Callable[[], Any]]


# --- The shapes of the parameters of some models ----------------------------------------------------------------------


def mlp() -> Shapes:
    """784, 256 and 10 units."""
    return [(784, 256), (256,), (256, 10), (10,)]


def small() -> Shapes:
    """As many small arrays as hardly any model has."""
    return [(32, 32)] * 1000


def resnet50() -> Shapes:
    """Of torchvision."""
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
    """The smallest, of 124 million parameters."""
    n = 768
    block: Shapes = [(n,), (n,), (n, 3 * n), (3 * n,), (n, n), (n,), (n,), (n,), (n, 4 * n), (4 * n,), (4 * n, n), (n,)]
    return [(50257, n), (1024, n), *(block * 12), (n,), (n,)]


SETS: dict[str, Callable[[], Shapes]] = {"mlp": mlp, "small": small, "resnet50": resnet50, "gpt2": gpt2}


# --- One update by given gradients ------------------------------------------------------------------------------------


def random_values(shapes: Shapes) -> list[np.ndarray]:
    """Normal ones, in single precision."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def donated(update: Callable[..., Any]) -> Any:
    """The compiled update, whose state is donated; parameters are not, as in the class.

    The state is returned first: JAX gives donated memory to the first outputs that fit, and parameters fit as well.
    """
    return jax.jit(lambda params, grads, state: update(params, grads, state)[::-1], donate_argnums=2)


def by_function(init: Callable[..., Any], update: Callable[..., Any], params: Any, grads: Any) -> Callable[[], Any]:
    """A pure update; the first call makes the state and compiles."""
    compiled, held = donated(update), {"params": params}

    def run() -> Any:
        if "state" not in held:
            held["state"] = init(params)
        held["state"], held["params"] = compiled(held["params"], grads, held["state"])
        return held["params"]

    return run


def optax_update(tx: Any) -> Callable[..., Any]:
    """A transformation as ``update(params, grads, state)``."""

    def update(params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    return update


def by_class(optimizer: optim.Optimizer, grads: Any) -> Callable[[], Any]:
    """``step(grads)``."""

    def run() -> Any:
        optimizer.step(grads)
        return optimizer.params

    return run


def by_torch(
    neighbours: Neighbours, name: str, values: Sequence[np.ndarray], options: dict[str, Any]
) -> Callable[[], Any]:
    """``step()`` of the class of this name, with gradients that are a tenth of the values."""
    tensors = [neighbours.tensor(value).requires_grad_() for value in values]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.grad = neighbours.tensor(value * np.float32(0.1))
    optimizer = getattr(neighbours.torch.optim, name)(tensors, **options)

    def run() -> None:
        optimizer.step()
        neighbours.wait()

    return run


def updates(neighbours: Neighbours, shapes: Shapes) -> Contenders:
    """AdamW by all that are there."""
    values = random_values(shapes)
    params, grads = [jnp.asarray(v) for v in values], [jnp.asarray(v * np.float32(0.1)) for v in values]
    adamw = F.adamw(lr=1e-3)
    runs: Contenders = {
        "optimjax, class": by_class(optim.AdamW(params, lr=1e-3), grads),
        "optimjax, function": by_function(adamw.init, adamw.update, params, grads),
    }
    if neighbours.optax is not None:
        tx = neighbours.optax.adamw(1e-3, weight_decay=1e-2)
        runs["optax"] = by_function(tx.init, optax_update(tx), params, grads)
    if neighbours.torch is not None:
        for kind in ("foreach", "fused"):
            runs[f"PyTorch, {kind}"] = by_torch(neighbours, "AdamW", values, {"lr": 1e-3, kind: True})
    return runs


# --- A sweep of learning rates ----------------------------------------------------------------------------------------

HIDDEN = 64


def first_weights() -> dict[str, np.ndarray]:
    """Of a network with 64, 64 and 10 units."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(64, HIDDEN)) / 8, rng.normal(size=(HIDDEN, 10)) / 8
    arrays = {"w1": first, "b1": np.zeros(HIDDEN), "w2": second, "b2": np.zeros(10)}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def train(images: Any, labels: Any, lr: Any, weight_decay: Any = 1e-2) -> Any:
    """The losses ``[steps]`` of one training by AdamW, of which a sweep makes many.

    ``images`` are ``[steps, batch, 64]``, ``labels`` ``[steps, batch]``.
    """
    adamw = F.adamw(lr=lr, weight_decay=weight_decay)

    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
        hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
        return cross_entropy(hidden @ params["w2"] + params["b2"], labels)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        return adamw.update(params, grads, state), loss

    params = jax.tree.map(jnp.asarray, first_weights())
    return jax.lax.scan(step, (params, adamw.init(params)), (images, labels))[1]


def torch_training(neighbours: Neighbours, images: Any, labels: Any, lr: float, fused: bool | None) -> np.ndarray:
    """The same by PyTorch."""
    torch: Any = neighbours.torch
    start = {name: neighbours.tensor(array) for name, array in first_weights().items()}
    layers = torch.nn.Linear(64, HIDDEN), torch.nn.Linear(HIDDEN, 10)
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).to(images.device)
    with torch.no_grad():
        for index, layer in enumerate(layers, 1):
            layer.weight.copy_(start[f"w{index}"].T)
            layer.bias.copy_(start[f"b{index}"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)
    criterion = torch.nn.CrossEntropyLoss()
    losses = []
    for batch, digits in zip(images, labels, strict=True):
        optimizer.zero_grad()
        loss = criterion(model(batch), digits)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu().numpy()


def sweeps(neighbours: Neighbours, images: np.ndarray, labels: np.ndarray, rates: np.ndarray, every: int) -> Contenders:
    """A sweep of rates, and the runs one after the other; of PyTorch's only every so many, as long as one another."""
    ours = partial(train, jnp.asarray(images), jnp.asarray(labels))
    one = jax.jit(ours)
    runs: Contenders = {
        "optimjax.sweep": lambda: optim.sweep(ours, lr=rates).values,
        "one after the other, jax.jit": lambda: [one(rate) for rate in rates.astype(np.float32)],
    }
    if neighbours.torch is not None:
        tensors = neighbours.tensor(images), neighbours.tensor(labels).long()
        for fused in (None, True):
            runs[f"PyTorch, {'fused' if fused else 'default'}"] = lambda fused=fused: [
                torch_training(neighbours, *tensors, rate, fused) for rate in rates[::every].tolist()
            ]
    return runs
