"""Muon moves as in the package of its author, ``muon-optimizer``, and orthogonalises as its iteration does."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from muon_runs import direction, normal

import optimjax as optim

SHAPES = pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)], ids=str)


@pytest.fixture
def author(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, in the precision of its arguments: rounding to bfloat16 would hide every other difference."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    return pytest.importorskip("muon")


@pytest.mark.parametrize("momentum", [0.95, 0.5])
@pytest.mark.parametrize("nesterov", [True, False])
@SHAPES
def test_a_run(torch: Any, author: Any, x64: None, shape: tuple[int, int], nesterov: bool, momentum: float) -> None:
    weight, grads = (
        normal(*shape),
        1e6 * normal(25, *shape, seed=1),
    )  # the author adds 1e-7 to the norm, PyTorch does not
    theirs = torch.tensor(weight)
    buffer = torch.zeros_like(theirs)
    ours = optim.Muon(
        [jnp.asarray(weight)], lr=0.02, weight_decay=0.1, momentum=momentum, nesterov=nesterov, ns_dtype=None
    )
    for grad in grads:
        update = author.muon_update(torch.tensor(grad), buffer, beta=momentum, nesterov=nesterov)
        theirs.mul_(1 - 0.02 * 0.1).add_(update, alpha=-0.02)
        ours.step([jnp.asarray(grad)])
    np.testing.assert_allclose(ours.params[0], theirs.numpy(), rtol=0, atol=2e-12)
    np.testing.assert_allclose(ours.state_dict()["state"][0]["momentum_buffer"], buffer.numpy(), rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 5, 10])
@SHAPES
def test_the_iteration(torch: Any, author: Any, x64: None, shape: tuple[int, int], steps: int, gram: bool) -> None:
    grad = normal(*shape)
    theirs = author.zeropower_via_newtonschulz5(torch.tensor(1e6 * grad), steps).numpy()
    ours = direction(1e6 * grad, ns_steps=steps, gram=gram) / np.sqrt(max(1, shape[0] / shape[1]))
    np.testing.assert_allclose(-ours, theirs, rtol=0, atol=1e-12)
