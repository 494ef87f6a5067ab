"""Gradients can be cleared in both of PyTorch's ways, can be missing, and can be NumPy arrays."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from networks import VALUES

import optimjax as optim


def test_zero_grad_both_ways() -> None:
    w, b = optim.Parameter(jnp.ones(2)), optim.Parameter(jnp.ones(3))
    optimizer = optim.SGD([w, b], lr=0.1, momentum=0.9)
    w.grad = jnp.full(2, 3.0)
    optimizer.zero_grad(set_to_none=False)
    np.testing.assert_array_equal(w.grad, [0, 0])
    assert b.grad is None
    optimizer.step()
    assert w in optimizer.state  # a zero gradient is a gradient
    assert b not in optimizer.state
    optimizer.zero_grad()
    assert w.grad is None
    optimizer.step()  # nothing to do
    np.testing.assert_array_equal(w.value, [1, 1])


@pytest.mark.usefixtures("x64")
def test_a_missing_gradient_skips_everything_as_in_pytorch(torch: Any) -> None:
    def run(make: Any, optimizer_class: Any, to_array: Any) -> Any:
        params = [make(v) for v in VALUES]
        optimizer = optimizer_class(params, lr=0.1, weight_decay=0.5)
        for step in range(4):
            for index, p in enumerate(params):
                p.grad = None if (step + index) % 2 else to_array(np.full(VALUES[index].shape, step + 1.0))
            optimizer.step()
        return params, [int(optimizer.state[p]["step"]) for p in params]

    ours, steps = run(optim.Parameter, optim.AdamW, jnp.asarray)
    theirs, their_steps = run(
        lambda v: torch.nn.Parameter(torch.from_numpy(v.copy())), torch.optim.AdamW, torch.from_numpy
    )
    assert steps == their_steps == [2, 2, 2]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.value, b.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_gradients_may_be_numpy_arrays() -> None:
    optimizer = optim.SGD({"w": np.ones(2, np.float32)}, lr=1.0)
    optimizer.step({"w": np.full(2, 0.25)})
    assert optimizer.params["w"].dtype == jnp.float32
    np.testing.assert_array_equal(optimizer.params["w"], [0.75, 0.75])
