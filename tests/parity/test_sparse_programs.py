"""An update by a sparse gradient copies no table, and JAX's transformations go through it."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from sparse_gradients import row_sparse

import optimjax as optim
from optimjax import functional as F

# --- cost -----------------------------------------------------------------------------------------------------------


def arrays_made(text: str, shape: str) -> list[str]:
    """The operations of a compiled program whose result has this shape; what is only handed on is left out."""
    made = re.findall(rf"= {re.escape(shape)}\S* ([a-z-]+)\(", text)
    return [operation for operation in made if operation not in ("parameter", "get-tuple-element", "bitcast")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sparse_axes", [1, 2])
def test_a_donated_update_copies_no_table(usual: Any, sparse_axes: int, dtype: str) -> None:
    rows, width, nse = 5000, 8, 16
    algorithm = F.sparse_adam()
    table = jnp.ones((rows, width), dtype)
    shape = (nse, width) if sparse_axes == 1 else (nse,)

    def update(table: Any, state: Any, ids: Any, values: Any) -> Any:
        return algorithm.update(table, BCOO((values, ids), shape=table.shape), state)

    arguments = table, algorithm.init(table), jnp.zeros((nse, sparse_axes), jnp.int32), jnp.ones(shape, dtype)
    compiled: Any = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile(usual)
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= 3 * table.nbytes
    assert analysis.temp_size_in_bytes < 16 * 4 * nse * width * 2
    assert analysis.temp_size_in_bytes < table.nbytes / 2
    letter = {"float32": "f32", "float16": "f16"}[dtype]
    for shape in (f"{letter}[{rows},{width}]", f"{letter}[{rows * width}]", f"f32[{rows},{width}]"):
        assert set(arrays_made(compiled.as_text(), shape)) <= {"fusion", "scatter", "while"}
    assert "copy" not in arrays_made(compiled.as_text(), f"{letter}[{rows},{width}]")


@pytest.mark.parametrize("donate", [False, True])
def test_the_class_updates_its_state_in_place_and_the_table_when_told(donate: bool) -> None:
    optimizer = optim.SparseAdam(jnp.ones((1000, 8)))
    optimizer.donate = donate
    grad = row_sparse([3, 1, 3], jnp.ones((3, 8)), (1000, 8))
    optimizer.step(grad)

    def places() -> list[int]:
        (bucket,) = optimizer._stepper.planner.plan.buckets  # reading the state would protect it
        return [array.unsafe_buffer_pointer() for array in (optimizer.params, *bucket.store.slots[0])]

    before = places()
    optimizer.step(grad)
    after = places()
    assert after[1:] == before[1:]
    assert (after[0] == before[0]) == donate


def test_as_many_ids_compile_once(compilations: Callable[[], int]) -> None:
    optimizer = optim.SparseAdam([jnp.ones((9, 2)), jnp.ones((9, 2))], lr=0.1)
    rng = np.random.default_rng(0)
    grads = [[row_sparse(rng.integers(0, 12, 4), jnp.ones((4, 2)), (9, 2)) for _ in range(2)] for _ in range(4)]
    optimizer.step(grads[0])
    before = compilations()
    for grad in grads[1:]:
        optimizer.step(grad)
        optimizer.param_groups[0]["lr"] *= 0.5
    assert compilations() == before


def test_nobody_pays_for_sparse_arrays_who_has_none() -> None:
    code = "import sys, optimjax; sys.exit('jax.experimental.sparse' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- JAX's transformations ------------------------------------------------------------------------------------------


def test_scan_and_vmap() -> None:
    algorithm = F.sparse_adam(lr=0.1)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 8, (2, 5, 3)))  # runs, steps, ids
    values = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 2)), jnp.float32)

    def train(ids: Any, values: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            return algorithm.update(carry[0], row_sparse(*batch, (7, 2)), carry[1]), None

        table = jnp.ones((7, 2))
        return jax.lax.scan(step, (table, algorithm.init(table)), (ids, values))[0]

    together = jax.vmap(train)(ids, values)
    for run in range(2):
        params, state = jnp.ones((7, 2)), algorithm.init(jnp.ones((7, 2)))
        for step in range(5):
            params, state = algorithm.update(params, row_sparse(ids[run, step], values[run, step], (7, 2)), state)
        chex.assert_trees_all_close(jax.tree.map(lambda x, run=run: x[run], together), (params, state), rtol=1e-6)


def test_derivatives(x64: None) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    values = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))

    def final(lr: Any, table: Any, values: Any) -> Any:
        algorithm = F.sparse_adam(lr=lr)
        state = algorithm.init(table)
        for ids in ([3, 1, 3, 5], [1, 0, 5, 0]):
            table, state = algorithm.update(table, row_sparse(ids, values, (5, 2)), state)
        return jnp.sum(table**3)

    jax.test_util.check_grads(final, (0.1, table, values), order=1, modes=["rev", "fwd"])
