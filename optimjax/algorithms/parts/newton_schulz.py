"""Newton-Schulz: a matrix is brought towards the nearest one with orthonormal rows or columns, by products alone.

A step is an odd polynomial of degree five of the singular values, :math:`a s + b s^3 + c s^5`. Which polynomials, is
said by three numbers for all steps, or by a table with three for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from optimjax.rule import Number, Numeric, Structural, at_least_float32, one_of, sqrt

__all__ = ["PRESETS", "Coefficients", "Precision", "Steps", "Table", "check_steps", "orthogonalize", "table_of"]

Triple = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Table:
    """The polynomials of an iteration, one a step, and the norm that a matrix is divided by before.

    Attributes:
      triples: coefficients; the last ones are used again in the steps that follow.
      margin: by which the norm is multiplied, so that rounding leaves no singular value above 1.
      adds: whether epsilon is added to the norm; otherwise it is the norm's lower bound.
      least: the fewest steps that make sense.
    """

    triples: tuple[tuple[float, float, float], ...]
    margin: float = 1.0
    adds: bool = False
    least: int = 0

    def steps(self, count: int) -> tuple[tuple[float, float, float], ...]:
        """The coefficients of so many steps: the first ones, or all and the last ones again."""
        return (self.triples + self.triples[-1:] * count)[:count]


_JORDAN = (3.4445, -4.7750, 2.0315)

# Amsel and others, "The Polar Express", 2025 (arXiv:2505.16932), algorithm 1; the same in NoahAmsel/PolarExpress,
# polar_express.py. Each polynomial is the best one for the singular values that the one before can leave.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01  # of the same algorithm: it divides the argument of every polynomial but the last one, and the norm

PRESETS: Mapping[str, Table] = {
    # Jordan, KellerJordan/Muon, muon.py, and PyTorch, whose lower bound of the norm it has here; Jordan adds 1e-7.
    "standard": Table((_JORDAN,)),
    # You Jiacheng, for five steps: KellerJordan/modded-nanogpt at 0674386, train_gpt_medium.py, which adds 1e-7. The
    # same in microsoft/dion, newton_schulz_triton.py, and Emerging-Optimizers (NVIDIA), muon_utils.py ("quintic").
    "quintic": Table(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        adds=True,
    ),
    # The table with its safety factor is "polar_express" of Emerging-Optimizers, too, which rounds it to five digits.
    # microsoft/dion and modded-nanogpt have another table, made for five steps and a factor of 1.02.
    "polar_express": Table(
        (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
        margin=_SAFETY,
        adds=True,
    ),
    # DeepSeek-AI, "DeepSeek-V4", 2026, section 2.4, equation 28: the norm alone. Eight steps come near 1, and two
    # converge. The same in Emerging-Optimizers, muon_utils.py ("deepseekv4").
    "deepseek_v4": Table((_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, least=10),
}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_table(value: Any) -> bool:
    """Whether a value is a name or a sequence of tuples, not three numbers; a tuple that holds an array is a value."""
    if isinstance(value, str):
        return True
    rows = value if isinstance(value, (tuple, list)) else ()
    return len(rows) > 0 and all(isinstance(row, (tuple, list)) and all(map(_is_plain, row)) for row in rows)


@dataclass(frozen=True)
class _Polynomials(Numeric):
    """Three numbers, with PyTorch's error for another number of them; or a table, which is compiled in."""

    items: tuple[Numeric, ...] = (Numeric(),) * 3
    fixed: Callable[[Any], bool] | None = _is_table

    def check(self, name: str, value: Any) -> None:
        """See :class:`optimjax.rule.Numeric`."""
        if isinstance(value, str):
            table_of(value)
            return
        rows = value if self.is_fixed(value) else [] if self.may_be_value(value) else [value]
        for row in rows:
            if not isinstance(row, (tuple, list)) or len(row) != 3:
                raise ValueError(f"Coefficients must be a tuple of exactly 3 values, got {row!r}")
        super().check(name, value)


def _steps(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value >= 100:
        raise ValueError(f"Number of steps must be less than 100 for computational efficiency, got {value}")
    if value < 0:
        raise ValueError(f"Number of steps must be at least 0, got {value}")


Coefficients = Annotated[
    tuple[Number, Number, Number] | Sequence[tuple[float, float, float]] | str | Mapping[Any, Any], _Polynomials()
]
Steps = Annotated[int, Structural(_steps)]
Precision = Annotated[str | None, one_of(None, "bfloat16", "float32", "float64")]  # float16 loses small gradients


def table_of(value: str | tuple[tuple[float, float, float], ...] | None) -> Table | None:
    """The table that the flag of :data:`Coefficients` stands for; ``None`` where there are three numbers.

    Raises:
      ValueError: no preset has this name.
    """
    if not isinstance(value, str):
        return None if value is None else Table(value)
    if value not in PRESETS:
        names = ", ".join(map(repr, PRESETS))
        raise ValueError(
            f"ns_coefficients must be three numbers, a sequence of triples or one of {names}, got {value!r}"
        )
    return PRESETS[value]


def check_steps(value: str | tuple[tuple[float, float, float], ...] | None, steps: int) -> None:
    """Raise where a preset would be cut off before what sets it apart.

    Raises:
      ValueError: with the number of steps that it needs.
    """
    table = table_of(value)
    if table is not None and steps < table.least:
        raise ValueError(f"ns_coefficients={value!r} needs ns_steps={table.least} or more, got {steps}")


def orthogonalize(matrix: Array, coefficients: Triple | Table, eps: Any, *, steps: int, gram: bool = False) -> Array:
    """Newton-Schulz: a matrix with the same singular vectors and singular values near 1.

    Args:
      matrix: real, of shape (..., rows, columns): a batch of matrices. What is multiplied and stored has its dtype;
        sums are in float32 at least, and rounded once, as in PyTorch.
      coefficients: three numbers for all steps, or a table.
      eps: lower bound of the norm, or what is added to it, as the table says.
      steps: iterations.
      gram: whether steps are taken on the product of the matrix with itself, where that is less work; see
        :func:`_two_steps`.

    Returns:
      The same shape and dtype.
    """
    dtype = matrix.dtype
    wide = at_least_float32(dtype)
    product = functools.partial(jnp.matmul, preferred_element_type=wide)
    of_step = _of_step(coefficients, steps, wide)
    tall = matrix.shape[-2] > matrix.shape[-1]

    def iterate(step: Any, x: Array) -> Array:
        a, b, c = of_step(step)
        r = product(x, x.mT).astype(dtype)
        polynomial = (b * r.astype(wide) + c * product(r, r)).astype(dtype)
        return (a * x.astype(wide) + product(polynomial, x)).astype(dtype)

    x = matrix.mT if tall else matrix
    x = x / _divisor(x.astype(wide), coefficients, jnp.asarray(eps, wide)).astype(dtype)
    done = 0
    if gram and 2 * x.shape[-1] > 3 * x.shape[-2]:  # otherwise it would be more work
        done = steps - steps % 2
        x = jax.lax.fori_loop(0, done // 2, lambda pair, x: _two_steps(x, of_step(2 * pair), of_step(2 * pair + 1)), x)
    if done < steps:
        x = jax.lax.fori_loop(done, steps, iterate, x)  # three products to compile, however many steps
    return x.mT if tall else x


def _two_steps(x: Array, first: Triple, second: Triple) -> Array:
    r"""Two iterations of wide matrices, which multiply them twice, not four times.

    With :math:`R = X X^\top` and :math:`P = a + b R + c R^2`, a step makes :math:`P X` of :math:`X`, and so
    :math:`P R P` of :math:`R`: the second one needs small square products only. In floating point errors grow where
    this goes on, because :math:`R` does not stay the product of a matrix with itself. Zhang, Amsel, Chen, Dao, "Gram
    Newton-Schulz", 2026 (Dao-AILab/gram-newton-schulz, gram_newton_schulz.py), begin again with :math:`X X^\top` after
    the second of five steps. Here that is done after every second step. In bfloat16 five steps of "polar_express" on a
    64×256 matrix of singular values from 1e-4 to 1 are then off by 0.14 of the norm, as the plain iteration is (0.16);
    with one new beginning it is 0.43, without one 6e5, and eight steps with a new beginning after the second, or after
    every third, leave numbers of 1e10 or NaN.
    """
    dtype = x.dtype
    wide = at_least_float32(dtype)

    def product(left: Array, right: Array) -> Array:
        return jnp.matmul(left, right, preferred_element_type=wide)

    def plus(scale: Any, array: Array, more: Array) -> Array:
        return (scale * array.astype(wide) + more).astype(dtype)

    (a, b, c), (a2, b2, c2) = first, second
    r = product(x, x.mT).astype(dtype)
    z = plus(b, r, c * product(r, r))  # without the multiple of the identity, which would cost digits
    rz = plus(a, r, product(r, z))
    r = plus(a, rz, product(z, rz))
    q = plus(1, z, a * jnp.broadcast_to(jnp.eye(x.shape[-2], dtype=wide), z.shape))
    z = plus(b2, r, c2 * product(r, r))
    q = plus(a2, q, product(q, z))
    return product(q, x).astype(dtype)


def _divisor(x: Array, coefficients: Triple | Table, eps: Array) -> Array:
    """By what a matrix is divided before the first step."""
    norm = sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    if not isinstance(coefficients, Table):
        return jnp.maximum(norm, eps)
    norm = coefficients.margin * norm
    return norm + eps if coefficients.adds else jnp.maximum(norm, eps)


def _of_step(coefficients: Triple | Table, steps: int, dtype: Any) -> Callable[[Any], Triple]:
    """The coefficients of each step, of which a loop has only the traced number."""
    if not isinstance(coefficients, Table):
        a, b, c = (jnp.asarray(number, dtype) for number in coefficients)
        return lambda step: (a, b, c)
    columns = jnp.asarray(coefficients.steps(max(1, steps)), dtype).T

    def of_step(step: Any) -> Triple:
        a, b, c = jax.lax.dynamic_index_in_dim(columns, step, axis=1, keepdims=False)
        return a, b, c

    return of_step
