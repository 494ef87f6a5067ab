"""A sweep of learning rates by `optimjax.sweep`, alongside one PyTorch run after the other.

    python benchmarks/sweep.py [--rates 64] [--steps 200] [--rounds 5] [--out sweep.png]

The network has 64, 64 and 10 units and learns the handwritten digits in batches of 64, with AdamW; rates go from 1e-4
to 1. All begin with the same weights and see the same batches. Contenders take turns: the sweep, which is one compiled
program, the same function compiled for one run and called once for each rate, and PyTorch's loop, with its usual
threads and with one, with its default implementation of AdamW and with `fused=True`. Of PyTorch's runs every eighth is
made, and its time counts eightfold, because each takes as long as any other. Both sides are warm; "first" is the
sweep's first call, which compiles.

It also prints how far the losses of the sweep are from those of separate runs, and from PyTorch's, and with `--out`
draws the losses of a sweep over rates and one over rates and weight decay.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import optimjax as optim
from optimjax import functional as F
from optimjax._command.timing import interleaved, timed
from optimjax.demo import Data

WIDTH, EVERY = 64, 8


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(64, WIDTH)) / 8, rng.normal(size=(WIDTH, 10)) / 8
    arrays = {"w1": first, "b1": np.zeros(WIDTH), "w2": second, "b2": np.zeros(10)}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def loss_fn(params: Any, images: Any, labels: Any) -> Any:
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    log_probabilities = jax.nn.log_softmax(hidden @ params["w2"] + params["b2"])
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()


def train(images: Any, labels: Any, lr: Any, weight_decay: Any = 1e-2) -> Any:
    """The losses of one training, of which a sweep makes many."""
    adamw = F.adamw(lr=lr, weight_decay=weight_decay)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        return adamw.update(params, grads, state), loss

    params = jax.tree.map(jnp.asarray, weights())
    return jax.lax.scan(step, (params, adamw.init(params)), (images, labels))[1]


def torch_run(images: Any, labels: Any, lr: float, threads: int, fused: bool | None) -> np.ndarray:
    torch.set_num_threads(threads)
    start = weights()
    layers = torch.nn.Linear(64, WIDTH), torch.nn.Linear(WIDTH, 10)
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    with torch.no_grad():
        for index, layer in enumerate(layers, 1):
            layer.weight.copy_(torch.from_numpy(start[f"w{index}"].T))
            layer.bias.copy_(torch.from_numpy(start[f"b{index}"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)
    criterion = torch.nn.CrossEntropyLoss()
    losses = []
    for batch, digits in zip(images, labels, strict=True):
        optimizer.zero_grad()
        loss = criterion(model(batch), digits)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="where the picture goes")
    options = parser.parse_args()
    data, threads = Data.load(), torch.get_num_threads()
    images, labels = map(jnp.stack, zip(*list(data.batches(99, 0))[: options.steps], strict=True))
    rates = np.geomspace(1e-4, 1, options.rates)
    tensors = torch.tensor(np.asarray(images)), torch.tensor(np.asarray(labels)).long()
    ours = partial(train, images, labels)
    one = jax.jit(ours)

    runs: dict[str, Callable[[], Any]] = {
        "optimjax.sweep": lambda: optim.sweep(ours, lr=rates).values,
        "one run after the other, jax.jit": lambda: [one(rate) for rate in rates.astype(np.float32)],
    }
    for fused in (None, True):
        for count in dict.fromkeys((threads, 1)):
            name = f"PyTorch, {'fused' if fused else 'default'}, {count} thread{'s' * (count > 1)}"
            runs[name] = lambda fused=fused, count=count: [
                torch_run(*tensors, rate, count, fused) for rate in rates[::EVERY].tolist()
            ]
    first = timed(runs["optimjax.sweep"])
    timings = interleaved(runs, rounds=options.rounds, warm_up=1)
    for name in timings.seconds:
        if "PyTorch" in name:
            timings.seconds[name] = [EVERY * spent for spent in timings.seconds[name]]
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}, {threads} threads")
    print(f"{options.rates} rates, {options.steps} steps; first call of the sweep {first:.2f} s\n")
    print("| | seconds | the sweep takes of it | quartiles |\n| --- | --- | --- | --- |")
    for name in runs:
        low, high = timings.quartiles("optimjax.sweep", name)
        ratio = timings.ratio("optimjax.sweep", name)
        print(f"| {name} | {timings.median(name):.3f} | {ratio:.3f} | {low:.3f} to {high:.3f} |", flush=True)

    result = optim.sweep(ours, lr=rates)
    separate = np.stack([one(rate) for rate in rates.astype(np.float32)])
    theirs = np.stack([torch_run(*tensors, rate, 1, None) for rate in rates.tolist()])
    for name, other in (("separate runs", separate), ("PyTorch", theirs)):
        apart = np.abs(np.asarray(result.values) - other) / np.abs(other)
        for steps in (20, options.steps):
            print(f"losses of {steps} steps, relative to {name}: {apart[:, :steps].max():.1e} at most", end="")
            print(f", {np.median(apart[:, :steps].max(1)):.1e} in the median run")
    if options.out:
        draw(result, optim.sweep(ours, lr=rates[::4], weight_decay=np.geomspace(1e-3, 10, 13)), options.out)


def draw(rates: Any, grid: Any, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    optim.plot.heat_map(rates, ax=left)
    optim.plot.heat_map(
        grid, lambda losses: losses[..., -21:].mean(-1), ax=right, label="loss, mean of the last 21 steps"
    )
    figure.savefig(path)


if __name__ == "__main__":
    main()
