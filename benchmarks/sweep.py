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
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import optimjax as optim
from optimjax._command.neighbours import Neighbours
from optimjax._command.timing import interleaved, timed
from optimjax._command.workloads import sweeps, torch_training, train
from optimjax.demo import Data

EVERY = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="where the picture goes")
    options = parser.parse_args()
    data, neighbours, threads = Data.load(), Neighbours.find(), torch.get_num_threads()
    images, labels = (np.stack(column) for column in zip(*islice(data.batches(99, 0), options.steps), strict=True))
    rates = np.geomspace(1e-4, 1, options.rates)

    def with_threads(run: Callable[[], Any], count: int) -> Any:
        torch.set_num_threads(count)
        return run()

    runs = {}
    for name, run in sweeps(neighbours, images, labels, rates, EVERY).items():
        if "PyTorch" in name:
            for count in dict.fromkeys((threads, 1)):
                runs[f"{name}, {count} thread{'s' * (count > 1)}"] = partial(with_threads, run, count)
        else:
            runs[name] = run
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

    ours = partial(train, jnp.asarray(images), jnp.asarray(labels))
    one, result = jax.jit(ours), optim.sweep(ours, lr=rates)
    separate = np.stack([one(rate) for rate in rates.astype(np.float32)])
    tensors = torch.from_numpy(images), torch.from_numpy(labels).long()
    theirs = np.stack([torch_training(neighbours, *tensors, rate, None) for rate in rates.tolist()])
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
