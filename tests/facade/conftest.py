"""A fixture that several files of this folder ask for."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's usual rules, which some layers of flax need."""
    with jax.numpy_dtype_promotion("standard"):
        yield
