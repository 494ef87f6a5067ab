r"""Muon: momentum, orthogonalised, for the weight matrices of hidden layers.

.. math::
    b_t &\leftarrow \mu\, b_{t-1} + (1 - \mu)\, g_t \\
    u_t &\leftarrow \mu\, b_t + (1 - \mu)\, g_t \ \text{(Nesterov)}, \quad b_t \ \text{(otherwise)} \\
    X_0 &\leftarrow u_t / \max(\lVert u_t \rVert_F, \epsilon) \\
    X_{k+1} &\leftarrow a X_k + (b\, G + c\, G^2)\, X_k \quad \text{with } G = X_k X_k^\top, \ k = 0, 1, \dots, K - 1 \\
    \theta_t &\leftarrow (1 - \gamma \lambda)\, \theta_{t-1} - \gamma\, r\, X_K

with learning rate :math:`\gamma`, weight decay :math:`\lambda`, momentum :math:`\mu`, Newton-Schulz coefficients
:math:`(a, b, c)`, which may be others in each step, and steps :math:`K`. For a matrix of :math:`A` rows and :math:`B`
columns, :math:`r` is :math:`\sqrt{\max(1, A / B)}`, or :math:`0.2 \sqrt{\max(A, B)}` to match the root mean square of
AdamW's updates, or :math:`\sqrt{A / B}`. A matrix with more rows than columns is transposed meanwhile, so that
:math:`G` is the smaller of the two products. The iteration brings singular values near 1: to between 0.7 and 1.2, but
for very small ones.

Source: Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon; the second :math:`r`: Liu and others, "Muon is scalable for LLM training",
2025 (arXiv:2502.16982); the third: Bernstein, "Deriving Muon", 2025, https://jeremybernste.in/writing/deriving-muon;
``"polar_express"``: Amsel and others, "The Polar Express", 2025 (arXiv:2505.16932); ``gram``: Zhang, Amsel, Chen, Dao,
"Gram Newton-Schulz", 2026, https://dao-ailab.github.io/blog/2026/gram-newton-schulz.

Differs from PyTorch:

1. ``ns_dtype``, ``matrix_axes``, ``blocks`` and ``gram`` are additions, as are names and sequences of triples for
   ``ns_coefficients``. At their defaults they change nothing.
2. Complex parameters, ``ns_steps`` above 99 and a number of ``ns_coefficients`` other than three are refused when the
   optimizer is made, not in its first step. A negative ``eps`` or ``ns_steps`` is refused, too.
3. A matrix without columns is left alone; in PyTorch it divides by zero.
4. In half precision the momentum is computed in float32.
5. Without ``nesterov`` PyTorch, up to 2.14, normalises the momentum buffer of a bfloat16 parameter in place
   (pytorch#194664, mended in 2.15). Here the buffer is the momentum alone.
6. ``adjust_lr_fn="spectral_unclamped"`` is PyTorch's from 2.15 on; 2.13 and 2.14 refuse it.

Differs from optax:

1. The rate is scaled by ``shape[0] / shape[1]``, for weights of shape (out, in); ``optax.contrib.muon`` scales by the
   inverse, for (in, out). Here ``matrix_axes`` chooses.
2. Biases and other vectors are refused; optax gives them to AdamW.
3. Weight decay defaults to 0.1, not 0; epsilon is a lower bound of the norm, not added to it; the momentum has no bias
   correction.
4. The iteration runs in bfloat16, in optax in the precision of the gradient.
5. A table of coefficients may have any number of triples; in optax it has at most ``ns_steps``, and the preset that
   is ``"quintic"`` here is named ``"dion"`` there.
"""

from __future__ import annotations  # signatures then show `Rate`, not what it stands for

import math
from typing import Annotated, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from optimjax.algorithms.parts.matrices import Axes, Blocks, Layout, together
from optimjax.algorithms.parts.newton_schulz import (
    Coefficients,
    Precision,
    Steps,
    check_steps,
    orthogonalize,
    table_of,
)
from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Epsilon,
    Flag,
    Flags,
    Hyper,
    LearningRate,
    Moment,
    NonNegative,
    Numeric,
    Options,
    Rule,
    factory,
    one_of,
)

__all__ = ["Muon", "muon"]


def _at_least_zero(what: str) -> Numeric:
    """PyTorch's message has a form of its own in this algorithm."""
    return Numeric(minimum=0, message=f"{what} should be >= 0 but is: {{value}}")


Rate = Annotated[LearningRate, _at_least_zero("Learning rate")]
Shrinkage = Annotated[NonNegative, _at_least_zero("weight decay")]
Momentum = Annotated[NonNegative, _at_least_zero("momentum")]
Adjustment = Annotated[
    str | None,
    one_of(
        None,
        "original",
        "match_rms_adamw",
        "spectral_unclamped",
        message="Adjust learning rate function {value} is not supported",
    ),
]


class Slots(NamedTuple):
    """Kept for each parameter."""

    momentum_buffer: Moment  # b: running mean of the gradients, shape and dtype of the parameter


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lr: Any
    momentum: Any
    one_minus_momentum: Any
    a: Any  # these three are zeros where a table is compiled in
    b: Any
    c: Any
    eps: Any
    shrink: Any  # by which weight decay multiplies the parameter


def check(hyper: Hyper, flags: Flags) -> None:
    """A preset that says how many steps it is for has as many."""
    check_steps(flags.ns_coefficients, flags.ns_steps)


def check_param(param: Array, flags: Flags) -> None:
    """Real matrices, or whatever ``matrix_axes`` makes matrices of."""
    if jnp.iscomplexobj(param):
        raise RuntimeError("Muon does not support complex parameters")
    if flags.matrix_axes is None and param.ndim != 2:
        raise ValueError(
            f"Muon only supports 2D parameters whereas we found a parameter with size: {param.shape}; "
            "optim.muon_groups(model) leaves those of fewer axes to another algorithm, matrix_axes takes more"
        )
    Layout(param.shape, flags.matrix_axes, flags.blocks)


def learning_rate_ratio(rows: int, columns: int, adjustment: str | None) -> float:
    """The factor of the learning rate for a matrix."""
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjustment == "spectral_unclamped":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1, rows / columns))


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
    check_steps(flags.ns_coefficients, flags.ns_steps)  # again, because groups may be edited
    layout = Layout(params[0].shape, flags.matrix_axes, flags.blocks)
    dtype = flags.ns_dtype or params[0].dtype  # the one place that decides the precision of the orthogonalisation
    new_slots, targets = [], []
    for grad, slot, scalar in zip(grads, slots, scalars, strict=True):
        buffer = target = scalar.momentum * slot.momentum_buffer + scalar.one_minus_momentum * grad
        if flags.nesterov:
            target = scalar.momentum * buffer + scalar.one_minus_momentum * grad
        new_slots.append(Slots(buffer))
        targets.append(target.astype(dtype))
    table = table_of(flags.ns_coefficients)

    @jax.jit  # which is traced once, however many matrices there are
    def direction_of(target: Array, scalar: Scalars) -> Array:
        coefficients = (scalar.a, scalar.b, scalar.c) if table is None else table
        return layout.array(
            [
                orthogonalize(matrices, coefficients, scalar.eps, steps=flags.ns_steps, gram=flags.gram)
                for matrices in layout.matrices(target)
            ]
        )

    ratio = layout.numbers(lambda rows, columns: learning_rate_ratio(rows, columns, flags.adjust_lr_fn))
    if not isinstance(ratio, float):  # blocks of different sizes
        ratio = jnp.asarray(ratio, params[0].dtype)
    new_params = [
        scalar.shrink * param - scalar.lr * ratio * direction.astype(param.dtype)
        for param, direction, scalar in zip(params, together(direction_of, targets, scalars), scalars, strict=True)
    ]
    return new_params, new_slots


class Muon(Optimizer):
    r"""Muon, as ``torch.optim.Muon``: for the weight matrices of hidden layers.

    Biases, norms, embeddings and the last layer are for another algorithm: :func:`optimjax.muon_groups` sorts the
    parameters of a model into groups of one optimizer, such as :class:`optimjax.AdamW`. Matrices of one shape are
    orthogonalised together, in batched products.

    Args:
      params: what to optimize, of two axes unless ``matrix_axes`` says more; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      weight_decay: times ``lr`` and the parameter, subtracted from the parameter, at least 0.
      momentum: share of the buffer that is kept, at least 0.
      nesterov: Nesterov momentum.
      ns_coefficients: coefficients of the Newton-Schulz iteration: three numbers for all steps; a sequence of such
        triples, one a step, of which the last one is repeated if there are more steps and which is cut if there are
        fewer; or the name of one of the sequences below. Names and sequences are compiled in, and are one for all
        parameters of a group; a list of triples of plain numbers is always a sequence, never a tree of values.
      eps: lower bound of the norm that a matrix is divided by, at least 0. ``"quintic"`` and ``"polar_express"`` add it
        to the norm.
      ns_steps: Newton-Schulz iterations, from 0 to 99. Compiled in, as are all below.
      adjust_lr_fn: factor of the learning rate for a matrix of ``A`` rows and ``B`` columns: ``"original"`` or
        ``None``, ``sqrt(max(1, A / B))``; ``"match_rms_adamw"``, ``0.2 * sqrt(max(A, B))``, with which learning rate
        and weight decay of AdamW can be kept; ``"spectral_unclamped"``, ``sqrt(A / B)``. ``A`` and ``B`` are
        ``shape[0]`` and ``shape[1]``, or what ``matrix_axes`` and ``blocks`` say.
      ns_dtype: precision of the orthogonalisation: ``"bfloat16"``, as in PyTorch; ``"float32"``; ``"float64"``; or
        ``None``, the precision of the rest of the update, which is float32, or float64 for float64 parameters. Only
        the direction is rounded to it, never momentum, weight decay or the parameter. On a GPU or TPU,
        ``jax.default_matmul_precision`` says how exact products in float32 are.
      matrix_axes: ``None``, two axes only, ``shape == (rows, columns)``; or ``(rows, columns)``, two tuples of axes,
        negative ones from the end. Axes of one tuple are merged in its order; axes in neither are a batch, each element
        of which is a matrix of its own.
      blocks: how the rows of a fused kernel fall into matrices of their own, each with a factor of the learning rate of
        its own: ``None``, one matrix; a number of equal blocks, which divides the rows; or a tuple with the rows of
        each block, from the first row to the last. Rows are those that ``matrix_axes`` makes.
      gram: whether two steps at a time are taken on the product of the matrix with itself, wherever that is less work:
        where one side is more than 1.5 times as long as the other. The results are the same but for rounding. With
        sides of 1 to 2 a step multiplies 0.92 times as much, with 1 to 4 0.78 times; on two cores of a CPU it took 0.84
        to 0.94 and 0.75 to 0.91 times as long. In bfloat16 rounding moved well-conditioned matrices up to 3 times as
        far as without (5 % of the norm, with ``"polar_express"``), and others no farther.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    =====================  ==============  ==================================================
    ``ns_coefficients``    ``ns_steps``    polynomials
    =====================  ==============  ==================================================
    ``"standard"``         any             the default: singular values from 0.7 to 1.2
    ``"quintic"``          5               You Jiacheng's, which come nearer to 1
    ``"polar_express"``    5 or more       the best one in each step, converging to 1
    ``"deepseek_v4"``      10 or more      eight standard steps, and two that converge to 1
    =====================  ==============  ==================================================

    Some sources multiply the norm before they divide by it, ``"polar_express"`` by 1.01. The name stands for that, too;
    in a sequence of your own, divide the first triple by ``s``, ``s**3`` and ``s**5`` instead.

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

    ======================================  ==========================  ============================
    fused kernel                            rows                        ``blocks``
    ======================================  ==========================  ============================
    query, key and value of one size        3 * size                    ``3``
    query, and fewer keys and values        query + key + value         ``(query, key, value)``
    each head by its own                    heads * head                ``heads``
    gate and up of a gated layer            2 * hidden                  ``2``
    ======================================  ==========================  ============================

    Raises:
      ValueError: a hyperparameter is out of range, a parameter has not two axes, or not those of ``matrix_axes``; the
        ``blocks`` are not all of its rows; ``"deepseek_v4"`` has fewer than ten steps.
      RuntimeError: a parameter is complex.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> params = {"kernel": jnp.zeros((2, 4))}  # of two inputs and four outputs
    >>> optimizer = optim.Muon(params, lr=0.1, matrix_axes=((-1,), (-2,)))
    >>> optimizer.step({"kernel": jnp.array([[3.0, 0, 0, 0], [0, -0.1, 0, 0]])})
    >>> print(jnp.round(100 * optimizer.params["kernel"]))  # near lr * sqrt(4 / 2), which is 0.14
    [[-10.   0.   0.   0.]
     [  0.  16.   0.   0.]]

    Query, key and value in one weight, of two heads and one head, and coefficients that converge:

    >>> weight = jnp.arange(24.0).reshape(8, 3) % 5  # two rows each for the heads
    >>> options = {"ns_coefficients": "polar_express", "ns_steps": 8, "ns_dtype": None}
    >>> muon = optim.functional.muon(lr=1.0, weight_decay=0, blocks=(4, 2, 2), **options)
    >>> params = muon.update(jnp.zeros((8, 3)), weight, muon.init(weight))[0]
    >>> print(jnp.round(params[6:] @ params[6:].T, 3))  # the rows of the value are orthonormal
    [[1. 0.]
     [0. 1.]]

    As a pure function, :func:`optimjax.functional.muon`:

    >>> muon = optim.functional.muon(lr=0.1)
    >>> params = jnp.zeros((2, 2))
    >>> params, state = muon.update(params, jnp.array([[2.0, 0], [0, 1]]), muon.init(params))
    >>> print(jnp.round(100 * params), state.step)
    [[ -7.   0.]
     [  0. -11.]] 1
    """

    rule = Rule(Slots, init, scalars, update, check=check, check_param=check_param, counts_steps=False, takes="alike")

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
        blocks: Blocks = None,
        gram: Flag = False,
        **options: Unpack[Options],
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
            blocks=blocks,
            gram=gram,
        )
        super().__init__(params, defaults, **options)


muon = factory(Muon)
