"""On eight devices the class has the results of one, everything stays where it was put, and nothing compiles twice."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY, Case
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_same_places, every_kind, mesh_of, placed, spread

import optimjax as optim

WHOLE = {
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32) / 4,
}
SPECS = {"b": P(), "w": P("d", None)}
X = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)


def loss_fn(params: Any, x: Any) -> Any:
    hidden = x @ params["w"]
    return jnp.mean(jnp.tanh(hidden + params["b"][None] if "b" in params else hidden) ** 2)


def by_loss(optimizer: Any, x: Any) -> None:
    optimizer.step(loss_fn, x)


def by_gradients(optimizer: Any, x: Any) -> None:
    optimizer.step(jax.grad(loss_fn)(optimizer.params, x))


def by_backward(optimizer: Any, x: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(loss_fn, x)
    optim.clip_grad_norm_(optimizer, 10.0)
    optimizer.step()


STEPS = [by_loss, by_gradients, by_backward]


def grid() -> list[Any]:
    """Every algorithm by a loss, and some in the other forms, which share all that matters here."""
    cases = [case for case in EVERY if not case.sparse]
    rows = [(case, by_loss) for case in cases]
    rows += [(case, step) for step in STEPS[1:] for case in cases if case.reduced_slots or case.scalar_slots]
    return [pytest.param(case, step, id=f"{case}-{step.__name__}") for case, step in rows]


@every_kind
@pytest.mark.parametrize(("case", "step"), grid())
def test_steps_are_those_of_one_device_and_move_nothing(
    case: Case, step: Callable[..., None], kind: Any, compilations: Callable[[], int]
) -> None:
    mesh = mesh_of(kind)
    start = {name: array for name, array in WHOLE.items() if array.ndim == 2 or not case.matrices}
    options = case.ours(case.variants()[1])
    ours, theirs = case.optimizer(spread(start, mesh, SPECS), **options), case.optimizer(start, **options)
    x = jax.device_put(X, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if kind is AxisType.Explicit else nullcontext():
        step(ours, x)
        first = placed(ours)  # looking makes the next step work on copies
        step(ours, x)
        before = compilations()
        for _ in range(2):
            step(ours, x)
        assert compilations() == before
        assert_same_places(first, placed(ours))
    for _ in range(4):
        step(theirs, X)
    for name in start:
        assert ours.params[name].sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), start[name].ndim)
        np.testing.assert_allclose(ours.params[name], theirs.params[name], rtol=1e-4, atol=2e-5)


@every_kind
@pytest.mark.parametrize("name", ["NAdam", "Adafactor"])
def test_the_second_step_compiles_nothing(name: str, kind: Any, compilations: Callable[[], int]) -> None:
    mesh = mesh_of(kind)
    optimizer = getattr(optim, name)(spread(WHOLE, mesh, SPECS), lr=0.1)
    x = jax.device_put(X, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if kind is AxisType.Explicit else nullcontext():
        by_loss(optimizer, x)
        before = compilations()
        by_loss(optimizer, x)
        assert compilations() == before


@every_kind
@pytest.mark.parametrize("donate", [False, True])
def test_a_whole_parameter_stays_whole_whatever_its_gradient_is(kind: Any, donate: bool) -> None:
    """Warnings are errors: JAX warns of donated memory that cannot be used because results lie otherwise."""
    mesh = mesh_of(kind)
    optimizer = optim.Adam(spread({"w": WHOLE["w"]}, mesh, {"w": P()}), lr=0.1)
    optimizer.donate = donate
    grads = spread({"w": WHOLE["w"]}, mesh, SPECS)
    for _ in range(3):
        optimizer.step(grads)
    assert optimizer.params["w"].sharding.is_fully_replicated
    for _, sharding in placed(optimizer).values():
        assert sharding.is_fully_replicated


def test_an_evaluation_that_says_where_its_arguments_are_goes_on_working() -> None:
    mesh = mesh_of(AxisType.Auto)
    params = spread(WHOLE, mesh, SPECS)
    optimizer = optim.AdamW(params)
    evaluate = jax.jit(
        lambda params: params["b"].sum(), in_shardings=({"b": params["b"].sharding, "w": params["w"].sharding},)
    )
    for _ in range(2):
        by_loss(optimizer, X)
        evaluate(optimizer.params)


@pytest.mark.parametrize("donate", [False, True])
def test_slots_that_lie_otherwise_stay_so_and_come_back_so(donate: bool, compilations: Callable[[], int]) -> None:
    """The parameter is whole on each device, its moments are in parts."""
    mesh = mesh_of(AxisType.Auto)
    optimizer = optim.Adam(spread({"w": WHOLE["w"]}, mesh, {"w": P()}), lr=0.1)
    twin = optim.Adam({"w": WHOLE["w"]}, lr=0.1)
    optimizer.donate = donate
    by_loss(optimizer, X)
    (box,) = optimizer.param_groups[0]["params"]
    parts = NamedSharding(mesh, P("d"))
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[box][name] = jax.device_put(optimizer.state[box][name], parts)

    def assert_in_parts() -> None:
        assert optimizer.params["w"].sharding.is_fully_replicated
        assert optimizer.state[box]["exp_avg"].sharding.is_equivalent_to(parts, 2)

    by_loss(optimizer, X)
    before = compilations()
    by_loss(optimizer, X)
    assert compilations() == before
    assert_in_parts()
    saved = optimizer.state_dict()
    for state_dict in (saved, jax.tree.map(np.asarray, saved)):  # as it is, and as it comes from a file
        optimizer.load_state_dict(state_dict)
        assert_in_parts()
    by_loss(optimizer, X)
    assert_in_parts()
    for _ in range(4):
        by_loss(twin, X)
    np.testing.assert_allclose(optimizer.params["w"], twin.params["w"], rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("name", ["NAdam", "Adafactor", "LBFGS"])
def test_a_state_from_a_file_goes_where_the_parameters_are(name: str, kind: Any) -> None:
    mesh = mesh_of(kind)
    x = jax.device_put(X, NamedSharding(mesh, P()))
    optimizer, other = (getattr(optim, name)(spread(WHOLE, mesh, SPECS), lr=0.1) for _ in range(2))
    with jax.set_mesh(mesh) if kind is AxisType.Explicit else nullcontext():
        by_loss(optimizer, x)
        saved = jax.tree.map(
            lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, optimizer.state_dict()
        )
        other.load_state_dict(saved)
        for box in other.param_groups[0]["params"]:
            box.value = optimizer.params[box.name]
        for _ in range(2):
            by_loss(optimizer, x)
            by_loss(other, x)
        for key in WHOLE:
            np.testing.assert_allclose(other.params[key], optimizer.params[key], rtol=1e-5, atol=1e-6)
        assert_same_places(placed(optimizer), placed(other))


def test_memory_that_a_slot_was_put_into_is_kept() -> None:
    optimizer = optim.Adam({"w": WHOLE["w"]}, lr=0.1)
    by_loss(optimizer, X)
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = jax.device_put(saved["state"][0]["exp_avg"], host)
    optimizer.load_state_dict(saved)
    (box,) = optimizer.param_groups[0]["params"]
    assert optimizer.state[box]["exp_avg"].sharding.memory_kind == "pinned_host"
    assert optimizer.state[box]["exp_avg_sq"].sharding.memory_kind == device.default_memory().kind


@every_kind
def test_statistics_of_a_module_stay_where_they_are(kind: Any, compilations: Callable[[], int]) -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.norm(self.linear(x))

    def loss(net: Net, x: Any) -> Any:
        return jnp.mean(net(x) ** 3)

    mesh = mesh_of(kind)
    net, twin = Net(), Net()
    for variable in jax.tree.leaves(nnx.state(net), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, P())))
    x = jax.device_put(X, NamedSharding(mesh, P("d") if kind is AxisType.Auto else P()))
    optimizer, reference = optim.SGD(net, lr=0.1), optim.SGD(twin, lr=0.1)
    with jax.set_mesh(mesh) if kind is AxisType.Explicit else nullcontext():
        optimizer.step(loss, x)
        before = compilations()
        for _ in range(3):
            optimizer.step(loss, x)
        assert compilations() == before
    for _ in range(4):
        reference.step(loss, X)
    for ours, theirs in zip(jax.tree.leaves(nnx.state(net)), jax.tree.leaves(nnx.state(twin)), strict=True):
        assert ours.sharding.is_fully_replicated
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@every_kind
def test_copies_lie_as_what_they_copy(kind: Any) -> None:
    mesh = mesh_of(kind)
    optimizer = optim.NAdam(spread(WHOLE, mesh, SPECS), lr=0.1)
    with jax.set_mesh(mesh) if kind is AxisType.Explicit else nullcontext():
        by_loss(optimizer, jax.device_put(X, NamedSharding(mesh, P())))
    assert_same_places(placed(optimizer), placed(copy.deepcopy(optimizer)))
    optimizer.load_functional_state(*optimizer.functional_state())
    assert_same_places(placed(copy.deepcopy(optimizer)), placed(optimizer))


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adafactor", "Muon", "ASGD", "NAdam"])
def test_explicit_shardings_may_differ(name: str) -> None:
    """Of gradient and parameter, and of a slot that somebody has placed otherwise; each keeps its own."""
    mesh = mesh_of(AxisType.Explicit)
    rows, columns = NamedSharding(mesh, P("d")), NamedSharding(mesh, P(None, "d"))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(WHOLE["w"], rows)}
        optimizer, twin = (getattr(optim, name)(given, lr=0.1) for given in (params, {"w": WHOLE["w"]}))
        grads = {"w": jax.device_put(WHOLE["w"], columns)}
        optimizer.step(grads)
        (box,) = optimizer.param_groups[0]["params"]
        for slot, value in list(optimizer.state.get(box, {}).items()):
            if getattr(value, "shape", None) == box.shape:
                optimizer.state[box][slot] = jax.device_put(value, columns)
        optimizer.step(grads)
        assert optimizer.params["w"].sharding.is_equivalent_to(rows, 2)
        for value in optimizer.state.get(box, {}).values():
            assert getattr(value, "shape", None) != box.shape or value.sharding.is_equivalent_to(columns, 2)
    for _ in range(2):
        twin.step({"w": WHOLE["w"]})
    np.testing.assert_allclose(optimizer.params["w"], twin.params["w"], rtol=1e-4, atol=2e-5)
