"""A whole run in Orbax's checkpoint manager: written in the background while the run goes on, and continued from it."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim
from optimjax.swa_utils import AveragedModel, get_ema_multi_avg_fn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports deprecates this and that
    ocp = pytest.importorskip("orbax.checkpoint")

WIDTH = 256  # large enough that a checkpoint is still being written when the next step is done


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(jax.nn.relu(self.hidden(self.dropout(self.norm(self.first(x))))))


class Batches:
    """An iterator over data with a state, as Grain's have it: a dict that JSON can hold."""

    def __init__(self) -> None:
        self.next_index, self.random = 0, np.random.default_rng(7)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        self.next_index += 1
        return self.random.normal(size=(8, 4)).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self.next_index, "random": self.random.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> None:
        self.next_index, self.random.bit_generator.state = state["next_index"], state["random"]


def loss_fn(model: Net, x: Any) -> Any:
    return ((model(x) - x.sum(1, keepdims=True)) ** 2).mean()


class Run:
    """Muon and AdamW in one optimizer, warm-up and cosine, an average of the weights, and the data."""

    def __init__(self, donate: bool) -> None:
        self.model, self.batches = Net(), Batches()
        groups = optim.muon_groups(self.model, exclude=["head.*"], lr=0.02)
        groups[-1]["note"] = "a string of the user's"
        self.optimizer = optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9))
        self.optimizer.donate = donate
        parts = [
            optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=2),
            optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 6),
        ]
        self.scheduler = optim.lr_scheduler.SequentialLR(self.optimizer, parts, [2])
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def step(self) -> Any:
        loss = self.optimizer.step(loss_fn, next(self.batches))
        self.scheduler.step()
        self.averaged.update_parameters(self.model)
        return loss

    def parts(self) -> dict[str, Any]:
        return {
            "model": nnx.state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "averaged": self.averaged.state_dict(),
        }

    def save(self, manager: Any, step: int) -> None:
        trees = {name: ocp.args.PyTreeSave(tree) for name, tree in self.parts().items()}
        manager.save(step, args=ocp.args.Composite(**trees, data=ocp.args.JsonSave(self.batches.get_state())))

    def restore(self, manager: Any, step: int) -> None:
        # Where keys are numbers, Orbax needs a template, or makes strings of them; the state dicts do not mind.
        trees = {name: ocp.args.PyTreeRestore() for name in ("optimizer", "scheduler")}
        trees |= {name: ocp.args.PyTreeRestore(self.parts()[name]) for name in ("model", "averaged")}
        restored = manager.restore(step, args=ocp.args.Composite(**trees, data=ocp.args.JsonRestore()))
        nnx.update(self.model, restored["model"])
        self.optimizer.load_state_dict(restored["optimizer"])
        self.scheduler.load_state_dict(restored["scheduler"])
        self.averaged.load_state_dict(restored["averaged"])
        self.batches.set_state(restored["data"])


def bits(run: Run) -> list[Any]:
    """Everything of a run, arrays as their bytes."""
    leaves = jax.tree.leaves(run.parts())
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key) else x for x in leaves
    ]
    return [np.asarray(x).tobytes() if hasattr(x, "dtype") else x for x in leaves]


@pytest.mark.parametrize("donate", [False, True])
def test_a_run_goes_on_while_its_checkpoints_are_written(donate: bool, tmp_path: Path) -> None:
    run, at, losses = Run(donate), {}, {}
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in range(8):
            if step in (2, 4, 5):
                run.save(manager, step)
                at[step] = bits(run)
            losses[step] = run.step()
        end = bits(run)
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [4, 5]  # the oldest is gone

        for step in (4, 5):
            again = Run(donate)
            again.step()  # whatever it was before
            again.restore(manager, step)
            assert bits(again) == at[step]
            assert [again.step() for _ in range(step, 8)] == [losses[index] for index in range(step, 8)]
            assert bits(again) == end
    group = again.optimizer.param_groups[-1]
    assert (group["note"], group["betas"]) == ("a string of the user's", (0.8, 0.9))
