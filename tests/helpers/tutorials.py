"""Layers, data and loss of the scripts of tutorials, alike in both libraries."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["assert_same_layer", "dataset", "linear", "mse_loss"]


def linear(layer: Any) -> nnx.Linear:
    """The same layer as a `torch.nn.Linear`, which keeps its weight transposed."""
    ours = nnx.Linear(layer.in_features, layer.out_features, rngs=nnx.Rngs(0))
    ours.kernel.set_value(jnp.asarray(layer.weight.detach().numpy().T))
    ours.bias.set_value(jnp.asarray(layer.bias.detach().numpy()))
    return ours


def assert_same_layer(ours: Any, layer: Any) -> None:
    np.testing.assert_allclose(ours.kernel[...].T, layer.weight.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.bias[...], layer.bias.detach().numpy(), rtol=1e-12, atol=1e-12)


def dataset(inputs: int, outputs: int, size: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(4, inputs)), rng.normal(size=(4, outputs))) for _ in range(size)]


def mse_loss(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)
