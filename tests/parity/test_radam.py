"""RAdam computes the length of its average exactly, also in traced steps, which have a form of their own."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimjax.algorithms.radam import length

STEPS = [1, 2, 3, 4, 5, 6, 7, 10, 30, 100, 1000, 1600, 1700, 3000, 100_000]  # both sides of where the form changes


def formula(step: int, beta2: float) -> float:
    """The paper's, with digits enough for what cancels."""
    with localcontext() as context:
        context.prec = 50
        power = Decimal(beta2) ** step
        return float(2 / (1 - Decimal(beta2)) - 1 - 2 * step * power / (1 - power))


@pytest.mark.parametrize("beta2", [0.5, 0.6, 0.9, 0.999, 0.9999, 0.999999])
@pytest.mark.parametrize(("wide", "rtol"), [(False, 1e-6), (True, 1e-14)], ids=["float32", "float64"])
def test_length_is_exact_to_rounding(request: pytest.FixtureRequest, beta2: float, wide: bool, rtol: float) -> None:
    if wide:
        request.getfixturevalue("x64")
    ours = jax.jit(jax.vmap(lambda step: length(step, beta2)))(jnp.array(STEPS, float))
    np.testing.assert_allclose(ours, [formula(step, beta2) for step in STEPS], rtol=rtol)
