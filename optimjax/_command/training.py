"""Whole training steps to be timed: value, gradient and AdamW's update of a model, by several libraries.

A contender is a function without arguments that takes one step and returns the loss to wait for.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optimjax as optim
from optimjax import functional as F
from optimjax._command.neighbours import Neighbours

__all__ = ["by_class", "by_flax", "by_hand", "by_torch", "cross_entropy", "training_steps"]

RATE, DECAY = 1e-3, 1e-2
Contender = Callable[[], Any]


def cross_entropy(scores: Any, labels: Any) -> Any:
    """The mean over labels ``[...]``, of scores ``[..., classes]``."""
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1).mean()


def loss_fn(model: Any, x: Any, y: Any) -> Any:
    return cross_entropy(model(x), y)


def by_class(model: Any, x: Any, y: Any, *, donate: bool = False, **options: Any) -> Contender:
    """``step(loss_fn, x, y)``."""
    optimizer = optim.AdamW(model, lr=RATE, weight_decay=DECAY, **options)
    optimizer.donate = donate
    return lambda: optimizer.step(loss_fn, x, y)


def by_flax(model: Any, x: Any, y: Any, optax: Any, *, cached: bool = False) -> Contender:
    """``nnx.jit`` with ``nnx.Optimizer``, or ``nnx.cached_partial`` of it."""
    from flax import nnx

    optimizer = nnx.Optimizer(model, optax.adamw(RATE, weight_decay=DECAY), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss

    run = nnx.cached_partial(step, model, optimizer) if cached else functools.partial(step, model, optimizer)
    return lambda: run(x, y)


def by_hand(model: Any, x: Any, y: Any, init: Callable[..., Any], update: Callable[..., Any]) -> Contender:
    """A compiled function of flat lists of arrays, which are updated in place: the least that a call can cost."""
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, treedef = jax.tree.flatten(params)
    state, structure = jax.tree.flatten(init(leaves))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(leaves: Any, state: Any, x: Any, y: Any) -> Any:
        def loss_of(leaves: Any) -> Any:
            return loss_fn(nnx.merge(graph, jax.tree.unflatten(treedef, leaves), rest), x, y)

        loss, grads = jax.value_and_grad(loss_of)(leaves)
        leaves, after = update(leaves, grads, jax.tree.unflatten(structure, state))
        return leaves, jax.tree.leaves(after), loss

    def run() -> Any:
        nonlocal leaves, state
        leaves, state, loss = step(leaves, state, x, y)
        return loss

    return run


def by_torch(
    neighbours: Neighbours, model: Any, x: np.ndarray, y: np.ndarray, *, compiled: bool = False, **options: Any
) -> Contender:
    """PyTorch's loop; value and gradient by ``torch.compile`` if ``compiled``."""
    torch: Any = neighbours.torch
    inputs, labels = neighbours.tensor(x), neighbours.tensor(y).long().flatten()
    model = model.to(inputs.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, **options)
    criterion = torch.nn.CrossEntropyLoss()

    def forward_and_back() -> Any:
        loss = criterion(model(inputs).flatten(0, -2), labels)
        loss.backward()
        return loss

    evaluate = torch.compile(forward_and_back) if compiled else forward_and_back

    def run() -> None:
        optimizer.zero_grad()
        evaluate()
        optimizer.step()
        neighbours.wait()

    return run


# --- A small network --------------------------------------------------------------------------------------------------

WIDTHS, BATCH = (784, 256, 256, 10), 128


def training_steps(neighbours: Neighbours) -> dict[str, Contender]:
    """A multilayer perceptron by all that are there."""
    from flax import nnx

    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, WIDTHS[0])).astype(np.float32)
    digits = rng.integers(0, WIDTHS[-1], BATCH).astype(np.int32)
    x, y = jnp.asarray(images), jnp.asarray(digits)

    def model() -> Any:
        rngs = nnx.Rngs(0)
        return nnx.Sequential(*_layers(lambda *sizes: nnx.Linear(*sizes, rngs=rngs), nnx.relu))

    adamw = F.adamw(lr=RATE, weight_decay=DECAY)
    runs = {
        "optimjax, step(loss_fn)": by_class(model(), x, y),
        "optimjax, function in jax.jit": by_hand(model(), x, y, adamw.init, adamw.update),
    }
    if neighbours.optax is not None:
        runs["nnx.jit, nnx.Optimizer, optax"] = by_flax(model(), x, y, neighbours.optax)
    if neighbours.torch is not None:
        nn: Any = neighbours.torch.nn
        for kind in (None, True):
            theirs = nn.Sequential(*_layers(nn.Linear, nn.ReLU()))
            name = f"PyTorch, {'fused' if kind else 'default'}"
            runs[name] = by_torch(neighbours, theirs, images, digits, fused=kind)
    return runs


def _layers(linear: Callable[[int, int], Any], activation: Any) -> list[Any]:
    """Linear layers, with the activation between them."""
    layers = [part for sizes in itertools.pairwise(WIDTHS) for part in (linear(*sizes), activation)]
    return layers[:-1]
