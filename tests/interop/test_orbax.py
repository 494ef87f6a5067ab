"""Orbax saves and restores the state dicts, as they are."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY, Case
from flax import nnx

import optimjax as optim
from optimjax import lr_scheduler as lr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports deprecates this and that
    ocp = pytest.importorskip("orbax.checkpoint")

NAMES = ("base.kernel", "base.bias", "head.kernel")
SHAPES = ((3, 2), (3,), (3, 2))


def build(case: Case, named: bool) -> Any:
    """With all the state that it can have."""
    rng = np.random.default_rng(0)
    boxes = [optim.Parameter(case.fit(rng.normal(size=shape).astype(np.float32))) for shape in SHAPES]
    params = list(zip(NAMES, boxes, strict=True)) if named else boxes
    groups = [{"params": params}] if case.takes_loss else [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    return case.optimizer(groups, **case.variants()[1])


def step(optimizer: Any, scheduler: Any) -> list[np.ndarray]:
    boxes = [box for group in optimizer.param_groups for box in group["params"]]
    if type(optimizer) is optim.LBFGS:
        optimizer.step(lambda params: sum(jnp.sum((w - 1) ** 4) for w in jax.tree.leaves(params)))
    else:
        for box in boxes:
            box.grad = jnp.cos(box.value)
        optimizer.step()
    scheduler.step()
    return [np.asarray(box) for box in boxes]


def runs() -> Iterator[tuple[str, Any, Any]]:
    for index, case in enumerate(EVERY):
        optimizer = build(case, index % 2 == 0)
        parts = [lr.LinearLR(optimizer, 0.1, total_iters=2), lr.CosineAnnealingLR(optimizer, 5)]
        yield str(case), optimizer, lr.SequentialLR(optimizer, parts, [2])


def by_pytree_checkpointer(path: Path, tree: Any, templated: bool) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path / "a", tree)
        return checkpointer.restore(path / "a", item=tree if templated else None)


def by_manager(path: Path, tree: Any, templated: bool) -> Any:
    with ocp.CheckpointManager(path) as manager:
        manager.save(7, args=ocp.args.Composite(run=ocp.args.PyTreeSave(tree)))
        manager.wait_until_finished()
        args = ocp.args.PyTreeRestore(tree) if templated else ocp.args.PyTreeRestore()
        return manager.restore(7, args=ocp.args.Composite(run=args)).run


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """What is saved of all runs after three steps, their parameters then, and what the next step makes of them."""
    whole = list(runs())
    params = {name: [step(*run) for _ in range(3)][-1] for name, *run in whole}
    saved = {name: {"optimizer": o.state_dict(), "scheduler": s.state_dict()} for name, o, s in whole}
    return {"params": params, "saved": saved, "next": {name: (step(o, s), s.get_last_lr()) for name, o, s in whole}}


@pytest.mark.parametrize(
    ("through", "templated"), [(by_pytree_checkpointer, False), (by_pytree_checkpointer, True), (by_manager, False)]
)
def test_runs_of_all_algorithms_continue_bit_for_bit(through: Any, templated: bool, run: Any, tmp_path: Path) -> None:
    """With everything that is hard to save: strings, None, booleans, tuples, numbers as keys, dicts without entries."""
    restored = through(tmp_path, {"runs": run["saved"], "epoch": 3}, templated)
    assert restored["epoch"] == 3
    for name, optimizer, scheduler in runs():
        boxes = [box for group in optimizer.param_groups for box in group["params"]]
        for box, value in zip(boxes, run["params"][name], strict=True):
            box.value = value
        optimizer.load_state_dict(restored["runs"][name]["optimizer"])
        scheduler.load_state_dict(restored["runs"][name]["scheduler"])
        assert in_detail(optimizer) == in_detail(run["saved"][name]["optimizer"]), name
        expected, rates = run["next"][name]
        for ours, theirs in zip(step(optimizer, scheduler), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert scheduler.get_last_lr() == rates


def in_detail(of: Any) -> list[str]:
    """The groups with the types of their values, which ``==`` does not tell apart."""
    state_dict = of if isinstance(of, dict) else of.state_dict()
    return [repr(sorted(group.items())) for group in state_dict["param_groups"]]


def test_a_module_and_its_optimizer_in_one_checkpoint(tmp_path: Path) -> None:
    """The model's state with its random keys alongside the state dict: the recipe of docs/saving.md."""

    def build(seed: int) -> Any:
        rngs = nnx.Rngs(seed)
        model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        return model, optim.Adam(model, lr=0.1)

    def loss(model: Any) -> Any:
        return jnp.mean(model(jnp.ones((4, 2))) ** 2)

    (model, optimizer), (other, restored) = build(0), build(1)
    optimizer.step(loss)
    saved = by_pytree_checkpointer(tmp_path, {"model": nnx.state(model), "optimizer": optimizer.state_dict()}, True)
    nnx.update(other, saved["model"])
    restored.load_state_dict(saved["optimizer"])
    for _ in range(2):
        assert restored.step(loss) == optimizer.step(loss)
    np.testing.assert_array_equal(other.layers[0].kernel[...], model.layers[0].kernel[...])
