"""A compiled update needs no memory of its own, and the state has exactly the bytes that the table of cases says."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, Case

from optimjax._core.guard import FREE
from optimjax._engine.bucket import update_bucket
from optimjax._engine.watch import Tally

variants = pytest.mark.parametrize(
    ("case", "options", "kept"),
    [
        pytest.param(case, options, kept, id=f"{case}-{label}")
        for case in CASES
        for label, options, kept in zip(("base", "full"), case.variants(), case.kept, strict=True)
    ],
)
ROWS, COLUMNS = 600, 500
LITTLE = 0.01  # of the parameters


def of(case: Case) -> dict[str, jax.Array]:
    return {"w": jnp.ones((ROWS, COLUMNS)), "v": jnp.ones((ROWS, COLUMNS))}


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def temporary(compiled: Any) -> float:
    """Temporary memory as a share of the parameters."""
    return compiled.memory_analysis().temp_size_in_bytes / (2 * ROWS * COLUMNS * 4)


@variants
def test_a_functional_update_in_place(usual: Any, case: Case, options: dict[str, Any], kept: int) -> None:
    """The state comes first where it alone is given away, or the parameters would take its memory."""
    algorithm, params = case.factory(**options), of(case)
    state = algorithm.init(params)
    update = jax.jit(algorithm.update, donate_argnums=(0, 2))
    assert temporary(update.lower(params, params, state).compile(usual)) < case.temporary
    if case.optimizer.definition.arithmetic.takes == "element" and not case.sparse:
        first = jax.jit(lambda *args: algorithm.update(*args)[::-1], donate_argnums=2)
        assert temporary(first.lower(params, params, state).compile(usual)) < LITTLE


@variants
@pytest.mark.parametrize("donate", [False, True])
def test_the_program_of_a_step(usual: Any, case: Case, options: dict[str, Any], kept: int, donate: bool) -> None:
    if case.sparse:
        pytest.skip("the gradients are sparse, see test_sparse_programs.py")
    optimizer = case.optimizer(of(case), **case.ours(options))
    grads = {parameter: parameter.value for parameter in optimizer.param_groups[0]["params"]}
    plan, rows = optimizer._stepper.planner.planned(optimizer.param_groups, optimizer.state, grads, Tally(), False)
    (call,) = plan.calls(grads, rows, donate, FREE)
    compiled: Any = update_bucket.donating((1, 2) if donate else (1,)).lower(*call.args).compile(usual)
    elementwise = case.optimizer.definition.arithmetic.takes == "element"
    assert temporary(compiled) < (LITTLE if elementwise and not donate else case.temporary)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes(call.args[1:3] if donate else call.args[1])


@variants
def test_bytes_of_the_state(case: Case, options: dict[str, Any], kept: int) -> None:
    params = of(case)
    each = 4 * (kept * ROWS * COLUMNS + len(case.scalar_slots) + bool(case.reduced_slots) * (ROWS + COLUMNS))
    state = case.factory(**options).init(params)
    assert nbytes(state[1:]) == 2 * each
    optimizer = case.optimizer(params, **case.ours(options))
    optimizer.step(params)
    assert sum(entry.nbytes for entry in optimizer.state.values()) == 2 * each
