"""A sparse gradient made of rows."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.sparse import BCOO

__all__ = ["row_sparse"]


def row_sparse(ids: Any, values: Any, shape: Any, **flags: Any) -> BCOO:
    return BCOO((jnp.asarray(values), jnp.asarray(ids)[:, None]), shape=shape, **flags)
