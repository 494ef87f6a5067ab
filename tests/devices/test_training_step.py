"""Micro-batches, clipping and skipped steps on eight devices: the results of one, and nothing moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_same_places, every_kind, mesh_of, placed, spread

import optimjax as optim
from optimjax import functional as F

pytestmark = pytest.mark.usefixtures("x64")
BATCH = np.random.default_rng(1).normal(size=(32, 16))
PARAMS = {"b": np.linspace(-1, 1, 8), "w": np.random.default_rng(0).normal(size=(16, 8)) / 4}
SPECS = {"b": P(), "w": P("d", None)}
WHOLE = {"b": P(), "w": P()}  # the batch is distributed, as in plain data parallelism


def loss_fn(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


def gradients(scale: float) -> Any:
    return {name: scale * np.cos(array) for name, array in PARAMS.items()}


@every_kind
@pytest.mark.parametrize("micro_batches", [2, 4, 8])  # of 16, 8 and 4 rows: the last of fewer than there are devices
def test_micro_batches_of_a_distributed_batch(
    kind: Any, micro_batches: int, compilations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimjax._engine.watch._has_run", lambda counts: False)  # as many on their way as there may be
    mesh = mesh_of(kind)
    x = jax.device_put(BATCH, NamedSharding(mesh, P("d", None)))
    options = dict(lr=0.1, max_grad_norm=0.01, skip_nonfinite=True)
    with jax.set_mesh(mesh):
        many = optim.NAdam(spread(PARAMS, mesh, WHOLE), **options)
        one = optim.NAdam({name: jnp.asarray(array) for name, array in PARAMS.items()}, **options)
        for step in range(6):
            loss = many.step(loss_fn, x, micro_batches=micro_batches)
            if step == 0:
                before = placed(many)
            if step == 2:  # the little program that chooses numbers has seen both kinds of what it is given
                compiled = compilations()
        assert compilations() == compiled
    for _ in range(6):
        expected = one.step(loss_fn, BATCH)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), many.params, one.params)
    assert_same_places(before, placed(many))


@every_kind
@pytest.mark.parametrize("donate", [False, True], ids=["copying", "in place"])
def test_clipped_and_skipped_steps(kind: Any, donate: bool) -> None:
    mesh = mesh_of(kind)
    options = dict(lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    with jax.set_mesh(mesh):
        many = optim.Adam(spread(PARAMS, mesh, SPECS), **options)
        many.donate = donate
        one = optim.Adam(PARAMS, **options)
        for scale in (1.0, np.inf, 0.01, np.nan, 2.0):
            many.step(spread(gradients(scale), mesh, SPECS))
            one.step(gradients(scale))
            np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-12)
        assert many.skipped == one.skipped == 2
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), many.params, one.params)
        assert many.state_dict()["state"][0]["step"] == 3

        algorithm = F.adam(**options)
        params = spread(PARAMS, mesh, SPECS)
        state = jax.jit(algorithm.init)(params)
        update = jax.jit(algorithm.update)
        for scale in (1.0, np.inf, 0.01, np.nan, 2.0):
            params, state = update(params, spread(gradients(scale), mesh, SPECS), state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), params, one.params)
        assert (state.step, state.skipped) == (3, 2)


def test_the_optimizer_moves_to_fewer_devices_between_skipped_steps() -> None:
    mesh = mesh_of(jax.sharding.AxisType.Auto)
    optimizer = optim.Adam(spread(PARAMS, mesh, SPECS), lr=0.1, skip_nonfinite=True)
    for scale in (np.nan, 1.0):
        optimizer.step(spread(gradients(scale), mesh, SPECS))
    one = optim.Adam({name: jax.device_put(np.asarray(p)) for name, p in optimizer.params.items()}, lr=0.1)
    one.load_state_dict(jax.tree.map(np.asarray, optimizer.state_dict()))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.value = jax.device_put(np.asarray(parameter.value))
        for name, value in optimizer.state[parameter].items():
            if name != "step":
                optimizer.state[parameter][name] = jax.device_put(np.asarray(value))
    for scale in (np.nan, 1.0, 2.0):
        optimizer.step(gradients(scale))
        if np.isfinite(scale):
            one.step(gradients(scale))
    jax.tree.map(np.testing.assert_array_equal, optimizer.params, one.params)
    assert optimizer.skipped == 2
