"""Orbax saves and restores state dicts, as they are, and functional states, also under another sharding."""

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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optimjax as optim
from optimjax import functional as F
from optimjax import lr_scheduler as lr
from optimjax._storage.placement import canonical

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


ROWS, COLUMNS = ((Mesh(np.array(jax.devices()).reshape(shape), ("a", "b")), P("a", "b")) for shape in ((8, 1), (2, 4)))
WHOLE = {"w": np.arange(128, dtype=np.float32).reshape(16, 8) / 128, "b": np.ones(4, np.float32)}


def spread(where: Any) -> Any:
    """The matrix over all devices, the vector on each."""
    mesh, spec = where
    return {
        name: jax.device_put(array, NamedSharding(mesh, spec if array.ndim == 2 else P()))
        for name, array in WHOLE.items()
    }


def loss_fn(params: Any) -> Any:
    return jnp.sum(jnp.tanh(params["w"]) ** 2) + jnp.sum((params["b"] - 0.5) ** 2)


def places(tree: Any) -> list[Any]:
    return [canonical(x.sharding) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]


@pytest.mark.parametrize("save_args", ["StandardSave", "PyTreeSave"])
def test_a_functional_state_under_another_sharding(save_args: str, tmp_path: Path) -> None:
    """Named tuples come back by the state that a run on these devices begins with; nothing of it is computed."""
    both = F.partition({"muon": F.muon(lr=0.02), "adamw": F.adamw()}, {"w": "muon", "b": "adamw"})
    update = jax.jit(lambda run: both.update(run[0], jax.grad(loss_fn)(run[0]), run[1]))
    params = spread(ROWS)
    run = update((params, both.init(params)))
    params = spread(COLUMNS)
    start = params, both.init(params)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start)
    restore_args = save_args.replace("Save", "Restore")
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=getattr(ocp.args, save_args)(run))
        manager.wait_until_finished()
        if save_args == "PyTreeSave":
            places_of = {"restore_args": ocp.checkpoint_utils.construct_restore_args(like)}
        else:
            places_of = {}
        restored = manager.restore(0, args=getattr(ocp.args, restore_args)(like, **places_of))
    assert jax.tree.structure(restored) == jax.tree.structure(run)
    assert places(restored) == places(start)
    for ours, theirs in zip(*map(jax.tree.leaves, (restored, run)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(*map(jax.tree.leaves, (update(restored), update(run))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)  # other devices add up in another order


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(optim.AdamW, {"amsgrad": True}), (optim.SGD, {"momentum": 0.9}), (optim.Adafactor, {}), (optim.ASGD, {})],
)
def test_a_class_under_another_sharding(optimizer_class: Any, options: Any, tmp_path: Path) -> None:
    """Through its functional form, whose state a new optimizer has before its first step, and so as a template."""

    def build(where: Any) -> Any:
        groups = [{"params": {"w": spread(where)["w"]}}, {"params": {"b": spread(where)["b"]}, "lr": 0.1}]
        return optimizer_class(groups, lr=0.01, **options)

    def loss(params: Any) -> Any:
        return loss_fn(params[0] | params[1])

    optimizer, other = build(ROWS), build(COLUMNS)
    for _ in range(3):
        optimizer.step(loss)
    optimizer.param_groups[0]["lr"] = 0.05
    with ocp.CheckpointManager(tmp_path) as manager:
        parts = {
            "arrays": ocp.args.StandardSave(optimizer.functional_state()),
            "groups": ocp.args.JsonSave(optimizer.state_dict()["param_groups"]),
        }
        manager.save(3, args=ocp.args.Composite(**parts))
        manager.wait_until_finished()
        start = other.functional_state()
        parts = {"arrays": ocp.args.StandardRestore(start), "groups": ocp.args.JsonRestore()}
        restored = manager.restore(3, args=ocp.args.Composite(**parts))
    assert places(restored["arrays"]) == places(start)
    other.load_state_dict({"state": {}, "param_groups": restored["groups"]})
    other.load_functional_state(*restored["arrays"])
    assert in_detail(other) == in_detail(optimizer)
    ours, theirs = other.state_dict()["state"], optimizer.state_dict()["state"]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert ours[0].get("step") == theirs[0].get("step")
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert other.params[0]["w"].sharding.is_equivalent_to(spread(COLUMNS)["w"].sharding, 2)
    other.step(loss), optimizer.step(loss)
    for a, b in zip(*map(jax.tree.leaves, (other.params, optimizer.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_numpy_arrays_go_where_the_parameters_are(tmp_path: Path) -> None:
    """What was restored without a word about devices is placed by the optimizer that loads it."""

    def build(where: Any) -> Any:
        return optim.Adafactor(spread(where), lr=0.1)

    optimizer, other = build(ROWS), build(COLUMNS)
    optimizer.step(loss_fn)
    by_pytree_checkpointer(tmp_path, optimizer.state_dict(), False)
    with ocp.PyTreeCheckpointer() as checkpointer:
        template = optimizer.state_dict()
        as_numpy = jax.tree.map(lambda x: ocp.RestoreArgs(np.ndarray if hasattr(x, "dtype") else type(x)), template)
        restored = checkpointer.restore(tmp_path / "a", item=template, restore_args=as_numpy)
    other.load_state_dict(restored)
    reference = build(COLUMNS)
    reference.step(loss_fn)
    assert places(other.state_dict()["state"]) == places(reference.state_dict()["state"])
    for a, b in zip(*map(jax.tree.leaves, (other.state_dict(), optimizer.state_dict())), strict=True):
        np.testing.assert_array_equal(a, b)
