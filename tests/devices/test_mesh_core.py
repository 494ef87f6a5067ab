"""The functional core works on eight devices: under jit, scan and shard_map, with automatic and with explicit axes."""

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY, Case
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_rules import Factors

from optimjax import functional as F
from optimjax._core.slots import initial_slots

WHOLE = {
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32) / 4,
}
SPECS = {"b": P(), "w": P("d", None)}
DENSE = [case for case in EVERY if not case.sparse and case.factory is not F.lbfgs]
cases = pytest.mark.parametrize("case", DENSE, ids=str)
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def mesh_of(kind: Any) -> Any:
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))


def on(mesh: Any) -> Any:
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else nullcontext()


def start(case: Case) -> Any:
    return {name: array for name, array in WHOLE.items() if array.ndim == 2 or not case.matrices}


def spread(tree: Any, mesh: Any) -> Any:
    return {name: jax.device_put(array, NamedSharding(mesh, SPECS[name])) for name, array in tree.items()}


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def on_one_device(algorithm: F.Algorithm, params: Any, steps: int) -> Any:
    params = jax.tree.map(jnp.asarray, params)
    state = algorithm.init(params)
    for _ in range(steps):
        params, state = algorithm.update(params, params, state)
    return params, state


def assert_close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)


def assert_distributed(params: Any, state: Any) -> None:
    """Each axis that a slot has of its parameter lies as that does; everything is on all devices."""
    assert len(state.step.sharding.device_set) == 8
    for name in params:
        for column in state[1:]:
            for slot in jax.tree.leaves(column[name]):
                assert len(slot.sharding.device_set) == 8
                size = params[name].shape[:1] == slot.shape[:1] and slot.ndim == params[name].ndim
                parts = 8 if size and name == "w" else 1
                assert slot.addressable_shards[0].data.size == slot.size // parts, (name, slot.shape)


@kinds
@cases
def test_updates_in_a_jit(case: Case, kind: Any, compilations: Any) -> None:
    mesh = mesh_of(kind)
    algorithm = case.factory(**case.ours(case.variants()[1]))
    with on(mesh):
        params = spread(start(case), mesh)
        state = algorithm.init(params)
        assert_distributed(params, state)
        places = shardings((params, state))
        # With explicit axes the types say where results are; otherwise out_shardings must.
        update = jax.jit(algorithm.update, out_shardings=places if kind is AxisType.Auto else None)
        params, state = update(params, params, state)
        before = compilations()
        for _ in range(2):
            params, state = update(params, params, state)
        assert compilations() == before
        assert_distributed(params, state)
        for name, array in params.items():
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), array.ndim)
        assert_close((params, state), on_one_device(algorithm, start(case), 3))


@cases
def test_a_loop_over_explicit_axes(case: Case) -> None:
    """What goes round has one type, also where the state is made inside."""
    mesh = mesh_of(AxisType.Explicit)
    algorithm = case.factory(**case.ours(case.variants()[1]))

    @jax.jit
    def train(params: Any) -> Any:
        step = lambda carry, _: (algorithm.update(carry[0], carry[0], carry[1]), None)  # noqa: E731
        return jax.lax.scan(step, (params, algorithm.init(params)), length=3)[0]

    with on(mesh):
        trained = train(spread(start(case), mesh))
        assert_distributed(*trained)
        assert_close(trained, on_one_device(algorithm, start(case), 3))


@kinds
@cases
def test_in_a_shard_map(case: Case, kind: Any) -> None:
    mesh = mesh_of(kind)
    algorithm = case.factory(**case.ours(case.variants()[1]))
    params = {name: jax.device_put(array, NamedSharding(mesh, P())) for name, array in start(case).items()}
    with on(mesh):
        state = algorithm.init(params)
        update = jax.jit(
            jax.shard_map(
                lambda params, state: algorithm.update(params, params, state), mesh=mesh, in_specs=P(), out_specs=P()
            )
        )
        for _ in range(2):
            params, state = update(params, state)
    assert_close((params, state), on_one_device(algorithm, start(case), 2))


@kinds
@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()], ids=str)
def test_rows_of_a_table_in_parts(kind: Any, spec: Any, compilations: Any) -> None:
    """SparseAdam: the rows that a gradient names may lie on any device."""
    mesh = mesh_of(kind)
    algorithm = F.sparse_adam(lr=0.1)
    table = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    rows = np.array([[3], [15], [3], [-1], [40]])
    grad = BCOO(
        (jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)), jnp.asarray(rows)), shape=(16, 8)
    )
    with on(mesh):
        params = jax.device_put(table, NamedSharding(mesh, spec))
        state = algorithm.init(params)
        update = jax.jit(algorithm.update, out_shardings=shardings((params, state)) if kind is AxisType.Auto else None)
        whole = jax.device_put(grad, NamedSharding(mesh, P()))
        params, state = update(params, whole, state)
        before = compilations()
        params, state = update(params, whole, state)
        assert compilations() == before
        for array in (params, state.exp_avg):
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    expected, kept = jnp.asarray(table), algorithm.init(jnp.asarray(table))
    for _ in range(2):
        expected, kept = algorithm.update(expected, grad, kept)
    assert_close((params, state), (expected, kept))


def test_slots_of_other_ranks_are_whole() -> None:
    """Only axes that a slot shares with its parameter can be distributed alike."""
    mesh = mesh_of(AxisType.Auto)
    param = jax.device_put(WHOLE["w"], NamedSharding(mesh, P("d")))
    slots = initial_slots(Factors.rule, param, None, None)
    for factor in slots.factors:
        assert len(factor.sharding.device_set) == 8
        assert factor.sharding.is_fully_replicated
