r"""Muon: momentum, orthogonalised, for the weight matrices of hidden layers.

.. math::
    b_t &\leftarrow \mu\, b_{t-1} + (1 - \mu)\, g_t \\
    u_t &\leftarrow \mu\, b_t + (1 - \mu)\, g_t \ \text{(Nesterov)}, \quad b_t \ \text{(otherwise)} \\
    X_0 &\leftarrow u_t / \max(\lVert u_t \rVert_F, \epsilon) \\
    X_{k+1} &\leftarrow a X_k + (b\, G + c\, G^2)\, X_k \quad \text{with } G = X_k X_k^\top, \ k = 0, 1, \dots, K - 1 \\
    \theta_t &\leftarrow (1 - \gamma \lambda)\, \theta_{t-1} - \gamma\, r\, X_K

with learning rate :math:`\gamma`, weight decay :math:`\lambda`, momentum :math:`\mu`, Newton-Schulz coefficients
:math:`(a, b, c)` and steps :math:`K`. For a matrix of :math:`A` rows and :math:`B` columns, :math:`r` is
:math:`\sqrt{\max(1, A / B)}`, or :math:`0.2 \sqrt{\max(A, B)}` to match the root mean square of AdamW's updates. A
matrix with more rows than columns is transposed meanwhile, so that :math:`G` is the smaller of the two products. The
iteration brings singular values near 1: to between 0.7 and 1.2, but for very small ones.

Source: Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon; the second :math:`r`: Liu and others, "Muon is scalable for LLM training",
2025 (arXiv:2502.16982).

Differs from PyTorch:

1. ``ns_dtype`` and ``matrix_axes`` are additions. At their defaults they change nothing.
2. Complex parameters, ``ns_steps`` above 99 and a number of ``ns_coefficients`` other than three are refused when the
   optimizer is made, not in its first step. A negative ``eps`` or ``ns_steps`` is refused, too.
3. A matrix without columns is left alone; in PyTorch it divides by zero.
4. In half precision the momentum is computed in float32.
5. Without ``nesterov`` PyTorch, up to 2.14, normalises the momentum buffer of a bfloat16 parameter in place
   (pytorch#194664, mended in 2.15). Here the buffer is the momentum alone.
6. ``adjust_lr_fn="spectral_unclamped"``, new in 2.15, is not here yet.

Differs from optax:

1. The rate is scaled by ``shape[0] / shape[1]``, for weights of shape (out, in); ``optax.contrib.muon`` scales by the
   inverse, for (in, out). Here ``matrix_axes`` chooses.
2. Biases and other vectors are refused; optax gives them to AdamW.
3. Weight decay defaults to 0.1, not 0; epsilon is a lower bound of the norm, not added to it; the momentum has no bias
   correction.
4. The iteration runs in bfloat16, in optax in the precision of the gradient.
"""

from __future__ import annotations  # signatures then show `Rate`, not what it stands for

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optimjax._storage.placement import automatic
from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Epsilon,
    Flag,
    Flags,
    Hyper,
    LearningRate,
    Moment,
    NonNegative,
    Number,
    Numeric,
    Rule,
    Structural,
    at_least_float32,
    factory,
    one_of,
    sqrt,
)

__all__ = ["Muon", "muon"]

ELEMENTS = 2**20  # of the matrices that are orthogonalised together; benchmarks/muon.py measures it


def _at_least_zero(what: str) -> Numeric:
    """PyTorch's message has a form of its own in this algorithm."""
    return Numeric(minimum=0, message=f"{what} should be >= 0 but is: {{value}}")


@dataclass(frozen=True)
class _Three(Numeric):
    """Three numbers; PyTorch's error for another number of them."""

    items: tuple[Numeric, ...] = (Numeric(),) * 3

    def check(self, name: str, value: Any) -> None:
        """See :class:`optimjax.rule.Numeric`."""
        if not self.may_be_value(value):
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values, got {value!r}")
        super().check(name, value)


Rate = Annotated[LearningRate, _at_least_zero("Learning rate")]
Shrinkage = Annotated[NonNegative, _at_least_zero("weight decay")]
Momentum = Annotated[NonNegative, _at_least_zero("momentum")]
Coefficients = Annotated[tuple[Number, Number, Number] | Mapping[Any, Any], _Three()]


def _steps(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value >= 100:
        raise ValueError(f"Number of steps must be less than 100 for computational efficiency, got {value}")
    if value < 0:
        raise ValueError(f"Number of steps must be at least 0, got {value}")


def _axes(name: str, value: Any) -> None:
    pair = (
        isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, (tuple, list)) for part in value)
    )
    if value is not None and not (pair and all(isinstance(axis, int) for part in value for axis in part)):
        raise ValueError(f"{name} must be None or a pair of tuples of axes, (rows, columns), got {value!r}")


Steps = Annotated[int, Structural(_steps)]
Adjustment = Annotated[
    str | None,
    one_of(None, "original", "match_rms_adamw", message="Adjust learning rate function {value} is not supported"),
]
Precision = Annotated[str | None, one_of(None, "bfloat16", "float32", "float64")]  # float16 loses small gradients
Axes = Annotated[tuple[tuple[int, ...], tuple[int, ...]] | None, Structural(_axes)]


class Slots(NamedTuple):
    """Kept for each parameter."""

    momentum_buffer: Moment  # b: running mean of the gradients, shape and dtype of the parameter


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lr: Any
    momentum: Any
    one_minus_momentum: Any
    a: Any
    b: Any
    c: Any
    eps: Any
    shrink: Any  # by which weight decay multiplies the parameter


def check_param(param: Array, flags: Flags) -> None:
    """Real matrices, or whatever ``matrix_axes`` makes matrices of."""
    if jnp.iscomplexobj(param):
        raise RuntimeError("Muon does not support complex parameters")
    if flags.matrix_axes is None and param.ndim != 2:
        raise ValueError(
            f"Muon only supports 2D parameters whereas we found a parameter with size: {param.shape}; "
            "for more axes set matrix_axes, for fewer use another optimizer"
        )
    Layout(param.shape, flags.matrix_axes)


class Layout:
    """Where the matrices are in an array.

    Attributes:
      rows, columns: of each matrix.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[tuple[int, ...], tuple[int, ...]] | None):
        ndim = len(shape)
        rows, columns = axes or ((0,), (1,))
        named = [axis % ndim for axis in rows + columns if -ndim <= axis < ndim]
        if len(set(named)) < len(rows + columns):
            raise ValueError(f"matrix_axes must name different axes of the parameter, got {axes} for shape {shape}")
        batch = [axis for axis in range(ndim) if axis not in named]
        self._order = batch + named
        self._moved = [shape[axis] for axis in self._order]
        self.rows, self.columns = (math.prod(shape[axis] for axis in part) for part in (rows, columns))
        self._matrices = [*self._moved[: len(batch)], self.rows, self.columns]

    def matrices(self, array: Array) -> Array:
        """The array as a batch of matrices: shape (..., rows, columns)."""
        return array.transpose(self._order).reshape(self._matrices)

    def array(self, matrices: Array) -> Array:
        """The array that these are the matrices of."""
        return matrices.reshape(self._moved).transpose([self._order.index(axis) for axis in range(len(self._order))])


def orthogonalize(matrix: Array, scalars: Scalars, steps: int) -> Array:
    """Newton-Schulz: a matrix with the same singular vectors and singular values near 1.

    Args:
      matrix: real, of shape (..., rows, columns): a batch of matrices. What is multiplied and stored has its dtype;
        sums are in float32 at least, and rounded once, as in PyTorch.
      scalars: coefficients and epsilon.
      steps: iterations.

    Returns:
      The same shape and dtype.
    """
    dtype = matrix.dtype
    wide = at_least_float32(dtype)
    product = functools.partial(jnp.matmul, preferred_element_type=wide)
    a, b, c, eps = (jnp.asarray(scalar, wide) for scalar in (scalars.a, scalars.b, scalars.c, scalars.eps))
    tall = matrix.shape[-2] > matrix.shape[-1]

    def iterate(_: Any, x: Array) -> Array:
        gram = product(x, x.mT).astype(dtype)
        polynomial = (b * gram.astype(wide) + c * product(gram, gram)).astype(dtype)
        return (a * x.astype(wide) + product(polynomial, x)).astype(dtype)

    x = matrix.mT if tall else matrix
    norm = sqrt(jnp.sum(jnp.square(x.astype(wide)), axis=(-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, eps).astype(dtype)
    x = jax.lax.fori_loop(0, steps, iterate, x)  # three products to compile, however many steps
    return x.mT if tall else x


def together(arrays: list[Array], scalars: list[Scalars], layout: Layout, steps: int) -> Iterator[Array]:
    """The matrices in each array orthogonalised, by products of as many as stay in the cache."""

    def one(array: Array, scalar: Scalars) -> Array:
        return layout.array(orthogonalize(layout.matrices(array), scalar, steps))

    count = max(1, ELEMENTS // arrays[0].size)
    for start in range(0, len(arrays), count):
        part = slice(start, start + count)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(arrays[part], scalars[part], strict=True))
        yield from automatic(jax.vmap(one), stacked[0])(*stacked)


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """Zeros."""
    return Slots(momentum_buffer=jnp.zeros_like(param))


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """The hyperparameters, and what is left of the parameter after weight decay."""
    return Scalars(
        hyper.lr,
        hyper.momentum,
        1 - hyper.momentum,
        *hyper.ns_coefficients,
        eps=hyper.eps,
        shrink=1 - hyper.lr * hyper.weight_decay,
    )


def update(
    params: list[Array], grads: list[Array], slots: list[Slots], scalars: list[Scalars], flags: Flags
) -> tuple[list[Array], list[Slots]]:
    """One step of each parameter; all have one shape, and share the products."""
    if not params[0].size:
        return params, slots
    layout = Layout(params[0].shape, flags.matrix_axes)
    dtype = flags.ns_dtype or params[0].dtype  # the one place that decides the precision of the orthogonalisation
    new_slots, targets = [], []
    for grad, slot, scalar in zip(grads, slots, scalars, strict=True):
        buffer = target = scalar.momentum * slot.momentum_buffer + scalar.one_minus_momentum * grad
        if flags.nesterov:
            target = scalar.momentum * buffer + scalar.one_minus_momentum * grad
        new_slots.append(Slots(buffer))
        targets.append(target.astype(dtype))
    if flags.adjust_lr_fn == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(layout.rows, layout.columns))
    else:
        ratio = math.sqrt(max(1, layout.rows / layout.columns))
    directions = together(targets, scalars, layout, flags.ns_steps)
    new_params = [
        scalar.shrink * param - scalar.lr * ratio * direction.astype(param.dtype)
        for param, direction, scalar in zip(params, directions, scalars, strict=True)
    ]
    return new_params, new_slots


class Muon(Optimizer):
    r"""Muon, as ``torch.optim.Muon``: for the weight matrices of hidden layers.

    Give it the matrices and another optimizer, such as :class:`optimjax.AdamW`, the rest: biases, norms, embeddings and
    the last layer. Matrices of one shape are orthogonalised together, in batched products.

    Args:
      params: what to optimize, of two axes unless ``matrix_axes`` says more; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      weight_decay: times ``lr`` and the parameter, subtracted from the parameter, at least 0.
      momentum: share of the buffer that is kept, at least 0.
      nesterov: Nesterov momentum.
      ns_coefficients: three coefficients of the Newton-Schulz iteration.
      eps: lower bound of the norm that a matrix is divided by, at least 0.
      ns_steps: Newton-Schulz iterations, from 0 to 99. Compiled in, as are all below.
      adjust_lr_fn: factor of the learning rate for a matrix of ``A`` rows and ``B`` columns: ``"original"`` or
        ``None``, ``sqrt(max(1, A / B))``; ``"match_rms_adamw"``, ``0.2 * sqrt(max(A, B))``, with which learning rate
        and weight decay of AdamW can be kept. ``A`` and ``B`` are ``shape[0]`` and ``shape[1]``, or what
        ``matrix_axes`` says.
      ns_dtype: precision of the orthogonalisation: ``"bfloat16"``, as in PyTorch; ``"float32"``; ``"float64"``; or
        ``None``, the precision of the rest of the update, which is float32, or float64 for float64 parameters. Only
        the direction is rounded to it, never momentum, weight decay or the parameter. On a GPU or TPU,
        ``jax.default_matmul_precision`` says how exact products in float32 are.
      matrix_axes: ``None``, two axes only, ``shape == (rows, columns)``; or ``(rows, columns)``, two tuples of axes,
        negative ones from the end. Axes of one tuple are merged in its order; axes in neither are a batch, each element
        of which is a matrix of its own.

    PyTorch's weights have the shape (out, in), so that ``A / B`` is out / in. Kernels of Flax have (in, out): rows are
    then the last axis. The orthogonalisation is the same either way, the factor is not.

    ======================================  ==========================  ============================
    kernel                                  shape                       ``matrix_axes``
    ======================================  ==========================  ============================
    ``Linear``, ``Dense``                   (in, out)                   ``((-1,), (-2,))``
    the same, layers stacked for a scan     (layers, in, out)           ``((-1,), (-2,))``
    attention: query, key, value            (in, heads, head)           ``((1, 2), (0,))``
    the same, each head by its own          (in, heads, head)           ``((2,), (0,))``
    attention: out                          (heads, head, out)          ``((2,), (0, 1))``
    ``Conv``                                (height, width, in, out)    ``((3,), (0, 1, 2))``
    ======================================  ==========================  ============================

    Raises:
      ValueError: a hyperparameter is out of range, a parameter has not two axes, or not those of ``matrix_axes``.
      RuntimeError: a parameter is complex.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> params = {"kernel": jnp.zeros((2, 4))}  # of two inputs and four outputs
    >>> optimizer = optim.Muon(params, lr=0.1, matrix_axes=((-1,), (-2,)))
    >>> optimizer.step({"kernel": jnp.array([[3.0, 0, 0, 0], [0, -0.1, 0, 0]])})
    >>> print(jnp.round(100 * optimizer.params["kernel"]))  # near lr * sqrt(4 / 2), which is 0.14
    [[-10.   0.   0.   0.]
     [  0.  16.   0.   0.]]

    As a pure function, :func:`optimjax.functional.muon`:

    >>> muon = optim.functional.muon(lr=0.1)
    >>> params = jnp.zeros((2, 2))
    >>> params, state = muon.update(params, jnp.array([[2.0, 0], [0, 1]]), muon.init(params))
    >>> print(jnp.round(100 * params), state.step)
    [[ -7.   0.]
     [  0. -11.]] 1
    """

    rule = Rule(Slots, init, scalars, update, check_param=check_param, counts_steps=False, takes="alike")

    def __init__(
        self,
        params: Any,
        lr: Rate = 1e-3,
        weight_decay: Shrinkage = 0.1,
        momentum: Momentum = 0.95,
        nesterov: Flag = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: Epsilon = 1e-7,
        ns_steps: Steps = 5,
        adjust_lr_fn: Adjustment = None,
        *,
        ns_dtype: Precision = "bfloat16",
        matrix_axes: Axes = None,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            ns_dtype=ns_dtype,
            matrix_axes=matrix_axes,
        )
        super().__init__(params, defaults)


muon = factory(Muon)
