"""What tests with models of PyTorch and of Flax share."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["attention"]


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Attention in the precision of its arguments: that of ``jax.nn`` is in float32 at most."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(jnp.asarray(query.shape[-1], query.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
