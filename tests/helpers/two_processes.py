"""What each of two processes runs, for test_processes.py: two devices each, and arrays that neither sees whole."""

import copy
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

port, process, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

import optimjax as optim  # noqa: E402
from optimjax import functional as F  # noqa: E402
from optimjax.swa_utils import AveragedModel  # noqa: E402

WHOLE = {"w": np.arange(32, dtype=np.float32).reshape(8, 4) / 32, "b": np.ones(4, np.float32)}
SPECS = {"w": P("d"), "b": P()}
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


def spread(tree: Any, specs: Any = SPECS) -> Any:
    def one(array: np.ndarray, spec: P) -> Any:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    return jax.tree.map(one, tree, specs)


def whole(tree: Any) -> Any:
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def loss_fn(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def by_loss(optimizer: Any, x: Any) -> None:
    optimizer.step(loss_fn, x)


def by_backward(optimizer: Any, x: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(loss_fn, x)
    optim.clip_grad_norm_(optimizer, 0.1, error_if_nonfinite=True)
    optimizer.step()


def by_gradients(optimizer: Any, x: Any) -> None:
    optimizer.step(jax.jit(jax.grad(loss_fn))(optimizer.params, x))


LOOKS = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "functional_state": lambda optimizer: optimizer.load_functional_state(*optimizer.functional_state()),
    "deepcopy": copy.deepcopy,
    "state": lambda optimizer: [dict(entries) for entries in optimizer.state.values()],
}

ours, theirs = spread(WHOLE), jax.tree.map(jnp.asarray, WHOLE)
x = spread(X, P())
steps = [by_loss, by_gradients, by_backward]
for index, cls in enumerate((optim.AdamW, optim.SGD, optim.Adagrad, optim.NAdam, optim.ASGD, optim.Adafactor)):
    step, look = steps[index % 3], list(LOOKS)[index % len(LOOKS)]
    optimizer, twin = cls(ours, lr=0.1), cls(theirs, lr=0.1)
    for _ in range(2):
        step(optimizer, x)
        step(twin, X)
        LOOKS[look](optimizer)
    step(optimizer, x)
    step(twin, X)
    for name, value in optimizer.params.items():
        assert value.sharding.is_equivalent_to(ours[name].sharding, value.ndim), (cls, name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole(optimizer.params), twin.params
    )

optimizer = optim.AdamW(ours, lr=0.1)
optimizer.donate = True
for look in LOOKS.values():
    by_loss(optimizer, x)
    look(optimizer)
averaged = AveragedModel(optimizer.params)
for _ in range(2):
    by_loss(optimizer, x)
    averaged.update_parameters(optimizer.params)
assert np.isfinite(whole(averaged.module)["w"]).all()
scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
for _ in range(3):
    scheduler.step(optimizer.backward(loss_fn, x))
optimizer.zero_grad()

# Saving: one file cannot have it, Orbax can.
try:
    optim.save(folder / "run.safetensors", optimizer.state_dict())
except ValueError as error:
    if "Orbax" not in str(error):
        raise
else:
    raise AssertionError("optim.save wrote what this process does not see")
saved = optimizer.state_dict()
state = {str(key): entries for key, entries in saved["state"].items()}  # Orbax makes strings of keys
with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder / "orbax", state)
    places = ocp.checkpoint_utils.construct_restore_args(state)
    restored = checkpointer.restore(folder / "orbax", restore_args=places)
by_loss(optimizer, x)
optimizer.load_state_dict({"state": restored, "param_groups": saved["param_groups"]})
jax.tree.map(
    np.testing.assert_array_equal,
    whole(optimizer.state_dict()["state"][0]["exp_avg"]),
    whole(saved["state"][0]["exp_avg"]),
)

# In the background, and back under another sharding: a new optimizer's functional state is the template.
other = optim.AdamW(spread(WHOLE, {"w": P(None, "d"), "b": P("d")}), lr=0.3)
start = other.functional_state()
with ocp.CheckpointManager(folder / "manager", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
    for step in range(2):
        by_loss(optimizer, x)
        parts = {
            "arrays": ocp.args.StandardSave(optimizer.functional_state()),
            "groups": ocp.args.JsonSave(optimizer.state_dict()["param_groups"]),
        }
        manager.save(step, args=ocp.args.Composite(**parts))
    kept = whole(optimizer.functional_state())
    by_loss(optimizer, x)
    manager.wait_until_finished()
    assert manager.all_steps() == [1], manager.all_steps()
    parts = {"arrays": ocp.args.StandardRestore(start), "groups": ocp.args.JsonRestore()}
    restored = manager.restore(1, args=ocp.args.Composite(**parts))
other.load_state_dict({"state": {}, "param_groups": restored["groups"]})
other.load_functional_state(*restored["arrays"])
jax.tree.map(np.testing.assert_array_equal, whole(other.functional_state()), kept)
for ours_now, began in zip(*map(jax.tree.leaves, (other.functional_state(), start)), strict=True):
    assert ours_now.sharding.is_equivalent_to(began.sharding, ours_now.ndim)
by_loss(other, x)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole(other.params), whole(optimizer.params))

# A file that one process has written; each reads its parts of the arrays.
if process == 0:
    optim.save(folder / "whole.safetensors", kept)
multihost_utils.sync_global_devices("written")
loaded = optim.load(folder / "whole.safetensors", like=start)
assert jax.tree.structure(loaded) == jax.tree.structure(start)
jax.tree.map(np.testing.assert_array_equal, whole(loaded), kept)
for ours_now, began in zip(*map(jax.tree.leaves, (loaded, start)), strict=True):
    assert ours_now.sharding == began.sharding

# The functional core, in a jit of one's own.
adam = F.adamw(lr=0.1)
ours = spread(WHOLE)  # those of the beginning are gone: an optimizer that donates has had them
params, state = ours, adam.init(ours)
update = jax.jit(lambda params, state, x: adam.update(params, jax.grad(loss_fn)(params, x), state))
for _ in range(2):
    params, state = update(params, state, x)
assert np.isfinite(whole(params)["w"]).all()

lbfgs = optim.LBFGS(ours, lr=0.1, max_iter=2, history_size=2)
by_loss(lbfgs, x)
lbfgs.state_dict()
by_loss(lbfgs, x)
print("done", process, flush=True)
