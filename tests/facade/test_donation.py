"""With `donate`, a step updates parameters in place and needs no memory of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax._core.guard import FREE
from optimjax._engine.bucket import update_bucket
from optimjax._engine.watch import Tally


@pytest.mark.parametrize("by_loss", [False, True])
def test_donate_updates_parameters_in_place(by_loss: bool) -> None:
    def loss(params: Any) -> Any:
        return sum(jnp.sum(jnp.cos(value)) for value in params)

    def make() -> Any:
        return optim.Adam([jnp.arange(4.0), jnp.ones((2, 2)), jnp.ones((2, 2))], lr=0.1)

    kept, donating = make(), make()
    donating.donate = True
    for _ in range(4):
        before = {name: optimizer.params for name, optimizer in (("kept", kept), ("donating", donating))}
        for optimizer in (kept, donating):
            optimizer.step(loss) if by_loss else optimizer.step(jax.grad(loss)(optimizer.params))
        assert not any(array.is_deleted() for array in before["kept"])
        assert all(array.is_deleted() for array in before["donating"])
        jax.tree.map(np.testing.assert_array_equal, kept.params, donating.params)


def test_with_donate_a_compiled_step_needs_no_memory_of_its_own(usual: Any) -> None:
    optimizer = optim.Adam([jnp.ones((256, 256)) for _ in range(3)], lr=0.1)
    grads = {box: jnp.ones((256, 256)) for box in optimizer.param_groups[0]["params"]}
    plan, rows = optimizer._stepper.planner.planned(optimizer.param_groups, optimizer.state, grads, Tally(), False)
    (call,) = plan.calls(grads, rows, True, FREE)
    compiled = update_bucket.donating((1, 2)).lower(*call.args).compile(usual)
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 1000
    assert memory.alias_size_in_bytes == 9 * 256 * 256 * 4
