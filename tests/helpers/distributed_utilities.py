"""Clipping, averages and files on several devices: ``python distributed_utilities.py DEVICES [RANK PROCESSES PORT]``.

An assertion fails where something is wrong; it is quiet otherwise.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optimjax as optim
from optimjax._engine import selections as clipping
from optimjax.swa_utils import AveragedModel, get_ema_avg_fn

compiled: list[str] = []


def listen(event: str, *_: Any, **__: Any) -> None:
    if event.endswith("backend_compile_duration"):
        compiled.append(event)


def place(value: np.ndarray, mesh: Any, *spec: Any) -> jax.Array:
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda i: value[i])


def tree(mesh: Any, x: float = 1.0) -> dict[str, jax.Array]:
    """One array sharded by rows, one whole on each device, one of another dtype sharded by columns."""
    return {
        "rows": place(np.full((8, 2), x, np.float32), mesh, "d"),
        "whole": place(np.full(3, 2 * x, np.float32), mesh),
        "columns": place(np.full((2, 8), 3 * x, jnp.bfloat16), mesh, None, "d"),
    }


def local(array: jax.Array) -> list[np.ndarray]:
    return [np.asarray(shard.data, np.float32) for shard in array.addressable_shards]


def placed_alike(array: jax.Array, other: jax.Array) -> bool:
    return array.sharding.is_equivalent_to(other.sharding, array.ndim)


def memory(arrays: dict[str, jax.Array]) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for array in arrays.values() for shard in array.addressable_shards}


def check(arrays: dict[str, Any], mesh: Any, x: float) -> None:
    """They have these values, and lie where they lay."""
    for name, expected in tree(mesh, x).items():
        assert placed_alike(arrays[name], expected), (name, arrays[name].sharding)
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_allclose(local(arrays[name]), local(expected), rtol=1e-2)


def clipping_keeps_shardings(mesh: Any) -> None:
    norm = np.sqrt(16 + 3 * 4 + 16 * 9)
    parameters = [optim.Parameter(array) for array in tree(mesh).values()]

    def clip(limit: Any) -> dict[str, Any]:
        for parameter, grad in zip(parameters, tree(mesh).values(), strict=True):
            parameter.grad = grad
        total = optim.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
        np.testing.assert_allclose(float(total), norm, rtol=1e-3)
        return dict(zip(tree(mesh), (parameter.grad for parameter in parameters), strict=True))

    for selections in (64, 0):  # in one program, and in those of a few gradients
        clipping.SELECTIONS, clipping._seen = selections, set()
        check(clip(0.5), mesh, 0.5 / norm)
        before = len(compiled)
        check(clip(np.float32(1)), mesh, 1 / norm)
        check(clip(2), mesh, 2 / norm)
        assert len(compiled) == before
    clipped, _ = optim.clip_grad_norm(tree(mesh), 0.5, float("inf"))
    check(clipped, mesh, 0.5 / 3)


def clipping_values_keeps_shardings(mesh: Any) -> None:
    grads = tree(mesh)
    clamped = optim.clip_grad_value(grads, 0.5)
    for name, array in clamped.items():
        assert placed_alike(array, grads[name])
        assert all((part == 0.5).all() for part in local(array))


def averages_keep_shardings(mesh: Any) -> None:
    for options in ({}, {"avg_fn": get_ema_avg_fn(0.5)}, {"avg_fn": lambda old, new, n: (old + new) / 2}):
        averaged = AveragedModel(tree(mesh), **options)
        check(averaged.module, mesh, 1.0)
        counts = []
        for x in (2.0, 4.0):
            model = tree(mesh, x)
            averaged.update_parameters(model)
            assert not memory(model) & memory(averaged.module)
            counts.append(len(compiled))
        check(averaged.module, mesh, 3.0)
        saved = averaged.state_dict()
        averaged.update_parameters(tree(mesh, 3.0))
        assert len(compiled) == counts[-1]
        averaged.load_state_dict(saved)
        check(averaged.module, mesh, 3.0)
        assert not memory(averaged.module) & memory({name: x for name, x in saved.items() if name != "n_averaged"})
        whole = {name: np.full(x.shape, 7.0, np.float32) for name, x in saved.items() if name != "n_averaged"}
        averaged.load_state_dict(whole | {"n_averaged": 1})  # from a file, say
        assert all(placed_alike(averaged.module[name], x) for name, x in tree(mesh).items())
        assert all((part == 7).all() for x in averaged.module.values() for part in local(x))


def files_refuse_what_no_process_sees_whole(mesh: Any) -> None:
    path = Path(tempfile.mkdtemp()) / "a.safetensors"
    grads = tree(mesh)
    if jax.process_count() == 1:
        optim.save(path, grads)
        assert (optim.load(path)["rows"] == 1).all()
        return
    optim.save(path, {"whole": grads["whole"]})
    assert (optim.load(path)["whole"] == 2).all()
    with pytest.raises(ValueError, match=r"cannot save 'state\.0': it is distributed over several .* use Orbax"):
        optim.save(path, {"state": [grads["rows"]]})
    assert list(optim.load(path)) == ["whole"]


def main(devices: int, *cluster: int) -> None:
    """Everything, with axes of both kinds."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    jax.monitoring.register_event_duration_secs_listener(listen)
    if cluster:
        rank, processes, port = cluster
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, rank)
        assert jax.process_count() == processes
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            clipping_keeps_shardings(mesh)
            clipping_values_keeps_shardings(mesh)
            averages_keep_shardings(mesh)
            files_refuse_what_no_process_sees_whole(mesh)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
