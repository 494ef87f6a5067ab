"""A training run that may be killed at any moment: ``python resumable.py FILE`` starts or continues it."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import optimjax as optim
from optimjax.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS, EVERY = 16, 3  # how many, and after how many the run is saved


class Net(nnx.Module):
    """Batch statistics, random state and a container with numbers for names."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(nnx.relu(self.norm(self.layers[0](x)))))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def main(path: Path) -> None:
    """Train, printing each step with its loss."""
    data = np.random.default_rng(0)
    x = data.normal(size=(64, 2)).astype(np.float32)
    y = x[:, :1] * x[:, 1:]

    model = Net(nnx.Rngs(0))
    optimizer = optim.AdamW(optim.group_parameters(model, [{"params": "*.bias", "weight_decay": 0.0}]), lr=0.05)
    warmup = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 4)
    scheduler = optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [4])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    order = np.random.default_rng(1)
    start, log = 0, []

    if path.exists():
        saved = optim.load(path)
        nnx.update(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        averaged.load_state_dict(saved["averaged"])
        order.bit_generator.state = saved["order"]
        start, log = saved["step"], saved["log"]

    for step in range(start, STEPS):
        batch = order.permutation(len(x))[:16]
        loss = optimizer.step(loss_fn, x[batch], y[batch])
        log.append([float(loss), *scheduler.get_last_lr()])
        scheduler.step()
        averaged.update_parameters(model)
        print(step, float(loss).hex(), flush=True)
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            run = {
                "model": nnx.state(model),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "averaged": averaged.state_dict(),
                "order": order.bit_generator.state,
                "step": step + 1,
                "log": log,
            }
            optim.save(path, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
