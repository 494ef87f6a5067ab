"""Only Adafactor has factored state, and an epsilon that depends on the parameter's dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax import functional as F


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(16, 16), (256,)], ids=str)
def test_the_machine_epsilon_is_that_of_the_stored_dtype(torch: Any, shape: tuple[int, ...], scale: float) -> None:
    start, *grads = np.random.default_rng(0).standard_normal((21, *shape), np.float32)
    tensor = torch.nn.Parameter(torch.tensor(start, dtype=torch.bfloat16))
    theirs = torch.optim.Adafactor([tensor])
    ours = optim.Adafactor(jnp.asarray(start, jnp.bfloat16))
    for grad in grads:
        tensor.grad = torch.tensor(scale * grad, dtype=torch.bfloat16)
        theirs.step()
        ours.step(jnp.asarray(scale * grad, jnp.bfloat16))
    reference = tensor.detach().float().numpy()
    # The epsilon of single precision would let small gradients move the parameters many times as far.
    off = np.linalg.norm(np.asarray(ours.params, np.float32) - reference)
    assert off < 0.1 * np.linalg.norm(reference - start)


def test_each_parameter_has_the_epsilon_of_its_own_dtype() -> None:
    params = {"half": jnp.ones((2, 3), jnp.bfloat16), "single": jnp.ones((2, 3)), "vector": jnp.ones(3, jnp.bfloat16)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-4), params)
    optimizer = optim.Adafactor(params)
    optimizer.step(grads)
    for name, param in params.items():
        alone = optim.Adafactor(param)
        alone.step(grads[name])
        np.testing.assert_array_equal(optimizer.params[name], alone.params)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 2)], ids=str)
def test_the_epsilon_of_the_paper_divides_nothing_by_zero(shape: tuple[int, ...]) -> None:
    """In float32 its square is zero."""
    adafactor = F.adafactor(eps=(1e-30, 1e-3))
    params = jnp.ones(shape)
    for grad in (jnp.zeros(shape), jnp.zeros(shape).at[0].set(1.0)):
        params, _ = adafactor.update(params, grad, adafactor.init(params))
        assert np.isfinite(params).all()
    assert (params[0] < 1).all()
    assert (params[1:] == 1).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_empty_parameters_leave_no_nan_behind(shape: tuple[int, ...]) -> None:
    optimizer = optim.Adafactor([jnp.zeros(shape)], weight_decay=0.1)
    optimizer.step([jnp.zeros(shape)])
    assert optimizer.params[0].shape == shape
    assert all(np.isfinite(slot).all() for slot in optimizer.state_dict()["state"][0].values())
    adafactor = F.adafactor(weight_decay=0.1)
    params = jnp.zeros(shape)
    assert jax.grad(lambda lr: adafactor.update(params, params, adafactor.init(params), lr=lr)[0].sum())(0.1) == 0


def test_the_state_of_a_matrix_is_as_long_as_its_sides() -> None:
    state = F.adafactor().init({"kernel": jnp.zeros((7, 300, 200)), "bias": jnp.zeros(200)})
    assert state.row_var["kernel"].shape == (7, 300, 1)
    assert state.col_var["kernel"].shape == (7, 1, 200)
    assert state.variance["bias"].shape == (200,)
    assert (state.row_var["bias"], state.col_var["bias"], state.variance["kernel"]) == (None, None, None)
