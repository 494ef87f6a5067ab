"""`update_bn` computes the mean of the batch statistics, and restores the model after an error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from averaged_nets import Net
from flax import nnx

from optimjax import swa_utils


def test_update_bn_is_the_mean_over_batches(torch: Any) -> None:
    model = Net(nnx.Rngs(0))
    model.norm.use_running_average = True
    batches = [np.random.default_rng(k).normal(size=(4, 2)).astype(np.float32) + k for k in range(3)]
    swa_utils.update_bn([(jnp.asarray(batch), None) for batch in batches], model)
    hidden = [np.asarray(model.linear(batch)) for batch in batches]
    np.testing.assert_allclose(model.norm.mean.get_value(), np.mean([h.mean(0) for h in hidden], 0), rtol=1e-5)
    np.testing.assert_allclose(model.norm.var.get_value(), np.mean([h.var(0) for h in hidden], 0), rtol=1e-4)
    assert model.norm.momentum == 0.99
    assert model.norm.use_running_average is True
    assert model.dropout.deterministic is False

    reference = torch.nn.BatchNorm1d(3)
    torch.optim.swa_utils.update_bn([torch.tensor(h) for h in hidden], reference)
    np.testing.assert_allclose(model.norm.mean.get_value(), reference.running_mean.numpy(), rtol=1e-5)
    # PyTorch keeps the unbiased variance of a batch, flax the biased one.
    np.testing.assert_allclose(model.norm.var.get_value() * 4 / 3, reference.running_var.numpy(), rtol=1e-4)


def failing_loader() -> Any:
    yield jnp.ones((4, 2))
    raise OSError("disk")


def same(a: Any, b: Any) -> None:
    if jnp.issubdtype(a.dtype, jax.dtypes.extended):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def test_update_bn_leaves_a_model_without_batch_norm_alone_and_restores_after_an_error() -> None:
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    swa_utils.update_bn(iter([None]), linear)  # not even called
    model = Net(nnx.Rngs(0))
    with pytest.raises(AttributeError, match="ndim"):
        swa_utils.update_bn([None], model)
    assert model.norm.momentum == 0.99
    for loader, error in (([jnp.ones((4, 2)), None], AttributeError), ([], ValueError), (failing_loader(), OSError)):
        before = nnx.to_pure_dict(nnx.state(model))
        model.norm.use_running_average = True
        with pytest.raises(error):
            swa_utils.update_bn(loader, model)
        jax.tree.map(same, nnx.to_pure_dict(nnx.state(model)), before)
        assert (model.norm.momentum, model.norm.use_running_average) == (0.99, True)
    averaged = swa_utils.AveragedModel(model)
    swa_utils.update_bn([jnp.ones((4, 2))], averaged)
    assert not np.allclose(averaged.module.norm.mean.get_value(), model.norm.mean.get_value())
