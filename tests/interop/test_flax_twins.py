"""A loop of Flax and optax, and its twins of docs/coming_from_flax.md, in double precision: the same numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, struct
from flax.training.train_state import TrainState

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules
from optimjax.swa_utils import AveragedModel, get_ema_multi_avg_fn

optax = pytest.importorskip("optax")
pytestmark = pytest.mark.usefixtures("x64", "lenient", "folder")

X = np.linspace(-1, 1, 32).reshape(-1, 2)
Y = (X**2).sum(1, keepdims=True)
STEPS = 30


@pytest.fixture
def lenient() -> Iterator[None]:
    """Flax and optax promote dtypes and axes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Centred(nnx.Module):
    """With a running mean. Flax's own norms keep theirs in float32."""

    def __init__(self) -> None:
        self.scale, self.mean = nnx.Param(jnp.ones(2)), nnx.BatchStat(jnp.zeros(2))

    def __call__(self, x: Any) -> Any:
        mean = x.mean(0)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        return (x - mean) * self.scale


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs, double = nnx.Rngs(0), {"param_dtype": float, "dtype": float}
        self.norm = Centred()
        self.base = nnx.Linear(2, 8, rngs=rngs, **double)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.LoRALinear(8, 1, lora_rank=2, rngs=rngs, **double)
        self.head.lora = nnx.LoRA(8, 2, 1, rngs=rngs, **double)

    def __call__(self, x: Any) -> Any:
        return self.head(self.dropout(nnx.tanh(self.base(self.norm(x)))))


def loss_fn(model: Net, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


TWINS: dict[str, tuple[Callable[[], Any], Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "adamw": (lambda: optax.adamw(1e-2), optim.AdamW, F.adamw, dict(lr=1e-2, weight_decay=1e-4),),
    "adam": (lambda: optax.adam(1e-2, 0.8, 0.95), optim.Adam, F.adam, dict(lr=1e-2, betas=(0.8, 0.95))),
    "sgd": (
        lambda: optax.sgd(1e-2, 0.9, nesterov=True), optim.SGD, F.sgd, dict(lr=1e-2, momentum=0.9, nesterov=True)
    ),
}  # fmt: skip


def values(model: Any, of: Any = ...) -> Any:
    """The arrays that do not count random draws, which each of the ways does in its own way or not at all."""
    return nnx.to_pure_dict(nnx.state(model, nnx.All(of, nnx.Not(nnx.RngState))))


def close(ours: Any, theirs: Any, rtol: float = 1e-9) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.asarray(a).dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)


def by_flax(tx: Any, wrt: Any = nnx.Param) -> tuple[Net, list[Any]]:
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model: Net, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, X, Y)
        optimizer.update(model, grads)
        return loss

    return model, [step(model, optimizer) for _ in range(STEPS)]


def by_function(algorithm: Any, wrt: Any = nnx.Param) -> tuple[Net, list[Any]]:
    model = Net()
    state = algorithm.init(nnx.state(model, wrt))

    @nnx.jit
    def step(model: Net, state: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, X, Y)
        params, state = algorithm.update(nnx.state(model, wrt), grads, state)
        nnx.update(model, params)
        return loss, state

    losses = []
    for _ in range(STEPS):
        loss, state = step(model, state)
        losses.append(loss)
    return model, losses


@pytest.mark.parametrize("name", TWINS)
def test_nnx_optimizer(name: str) -> None:
    tx, optimizer_class, factory, options = TWINS[name]
    theirs, losses = by_flax(tx())
    model = Net()
    optimizer = optimizer_class(model, **options)
    by_class = [optimizer.step(loss_fn, X, Y) for _ in range(STEPS)]
    close(values(model), values(theirs))
    np.testing.assert_allclose(by_class, losses, rtol=1e-9)
    twin, by_functions = by_function(factory(**options))
    close(values(twin), values(theirs))
    np.testing.assert_allclose(by_functions, losses, rtol=1e-9)


def test_gradients_that_are_given() -> None:
    """And a schedule: `optimizer.step(grads)` with a scheduler, `F` with the schedule of optax itself."""
    decay = optax.cosine_decay_schedule(0.1, 40)
    theirs, _ = by_flax(optax.sgd(decay))
    model = Net()
    optimizer = optim.SGD(model, lr=0.1)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    grad = nnx.jit(nnx.grad(loss_fn))
    for _ in range(STEPS):
        optimizer.step(grad(model, X, Y))
        scheduler.step()
    close(values(model), values(theirs))
    for schedule in (decay, schedules.cosine_annealing(0.1, T_max=40)):
        close(values(by_function(F.sgd(lr=schedule))[0]), values(theirs), rtol=1e-6)  # optax's is in float32


@pytest.mark.parametrize(
    "wrt", [nnx.LoRAParam, nnx.PathContains("base"), nnx.Any(nnx.LoRAParam, nnx.PathContains("norm"))]
)
def test_only_some_of_the_variables(wrt: Any) -> None:
    wrt = nnx.All(nnx.Param, wrt)
    theirs, _ = by_flax(optax.adam(1e-2), wrt)
    assert not np.allclose(*(jax.flatten_util.ravel_pytree(values(net, wrt))[0] for net in (theirs, Net())))
    close(values(theirs, nnx.All(nnx.Param, nnx.Not(wrt))), values(Net(), nnx.All(nnx.Param, nnx.Not(wrt))))
    model = Net()
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, wrt))}
    rules = [{"params": lambda name, value: name in trained}, {"params": "*", "requires_grad": False}]
    optimizer = optim.Adam(optim.group_parameters(model, rules), lr=1e-2)
    for _ in range(STEPS):
        optimizer.step(loss_fn, X, Y)
    assert set(optimizer.param_groups[0]["param_names"]) == trained
    close(values(model), values(theirs))
    close(values(by_function(F.adam(lr=1e-2), wrt)[0]), values(theirs))


def test_metrics() -> None:
    """Updated from what `backward` returns, inside a loss that is given them, and by Flax."""
    theirs = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    for loss in by_flax(optax.sgd(0.1))[1]:
        theirs.update(loss=np.float32(loss))

    def measured(model: Net, metrics: Any) -> Any:
        loss = loss_fn(model, X, Y)
        metrics.update(loss=loss.astype(np.float32))
        return loss

    inside = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    optimizer = optim.SGD(Net(), lr=0.1)
    for _ in range(STEPS):
        optimizer.step(measured, inside)
    outside = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    optimizer = optim.SGD(Net(), lr=0.1)

    def with_aux(model: Net) -> Any:
        loss = loss_fn(model, X, Y)
        return loss, loss

    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = optimizer.backward(with_aux, has_aux=True)
        optimizer.step()
        outside.update(loss=np.float32(loss))
    for ours in (inside, outside):
        np.testing.assert_allclose(ours.compute()["loss"], theirs.compute()["loss"], rtol=1e-6)  # float32 sums


def test_a_run_that_has_begun() -> None:
    """Steps of optax, then of ours from its state; and through a file, of optax's own again."""
    model = Net()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    def go_on(model: Net, optimizer: Any) -> None:
        for _ in range(10):
            optimizer.update(model, nnx.grad(loss_fn)(model, X, Y))

    go_on(model, optimizer)
    optim.save("run.safetensors", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
    ours = nnx.clone(model)
    adamw = optim.AdamW(ours, lr=1e-2, weight_decay=1e-4)
    params, state = adamw.functional_state()
    theirs = optimizer.opt_state[0]
    moments = {
        name: jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))
        for name, tree in {"exp_avg": theirs.mu, "exp_avg_sq": theirs.nu}.items()
    }
    adamw.load_functional_state(params, state._replace(step=jnp.asarray(theirs.count[...]), **moments))
    go_on(model, optimizer)
    for _ in range(10):
        adamw.step(loss_fn, X, Y)
    close(values(ours), values(model))

    again = Net()
    again_optimizer = nnx.Optimizer(again, optax.adamw(1e-2), wrt=nnx.Param)
    saved = optim.load("run.safetensors")
    nnx.update(again, saved["model"])
    nnx.update(again_optimizer, saved["optimizer"])
    go_on(again, again_optimizer)
    for a, b in zip(*map(jax.tree.leaves, (values(again), values(model))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(nnx, "EMA"), reason="a newer Flax has it")
def test_an_average_of_the_weights() -> None:
    model = Net()
    optimizer = optim.SGD(model, lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    theirs = nnx.EMA(model, 0.9, only=nnx.Param)
    functional = F.ema(decay=0.9)
    state = functional.update(nnx.state(model, nnx.Param), functional.init(nnx.state(model, nnx.Param)))
    for _ in range(STEPS):
        optimizer.step(loss_fn, X, Y)
        averaged.update_parameters(model)
        theirs.update(nnx.state(model, nnx.Param))
        state = functional.update(nnx.state(model, nnx.Param), state)
    expected = values(theirs.apply_to(Net()), nnx.Param)
    close(values(averaged.module, nnx.Param), expected)
    close(nnx.to_pure_dict(functional.params(state)), expected)


class OurTrainState(struct.PyTreeNode):
    """That of the page."""

    params: Any
    state: Any
    apply_fn: Any = struct.field(pytree_node=False)
    algorithm: Any = struct.field(pytree_node=False)

    def apply_gradients(self, *, grads: Any) -> Any:
        params, state = self.algorithm.update(self.params, grads, self.state)
        return self.replace(params=params, state=state)


@pytest.mark.parametrize("name", TWINS)
def test_a_train_state_of_linen(name: str, compilations: Callable[[], int]) -> None:
    tx, optimizer_class, factory, options = TWINS[name]
    net = linen.Sequential([linen.Dense(8, param_dtype=float), linen.tanh, linen.Dense(1, param_dtype=float)])
    params = net.init(jax.random.key(0), X)["params"]

    def loss(params: Any) -> Any:
        return ((net.apply({"params": params}, X) - Y) ** 2).mean()

    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    theirs = TrainState.create(apply_fn=net.apply, params=params, tx=tx())
    made: list[Any] = []
    for _ in range(2):  # made again, it is an equal static field
        algorithm = factory(**options)
        made.append(OurTrainState(params, algorithm.init(params), net.apply, algorithm))
    step(made[0]), step(theirs)
    before = compilations()
    ours = made[1]
    for _ in range(STEPS):
        ours, theirs = step(ours), step(theirs)
    assert compilations() == before
    close(ours.params, theirs.params)
    assert ours.state.step == theirs.step == STEPS
    optimizer = optimizer_class(params, **options)
    for _ in range(STEPS):
        optimizer.step(loss)
    close(optimizer.params, theirs.params)
