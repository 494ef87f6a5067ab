r"""Adafactor: a matrix's second moments are kept as one number for each row and each column.

.. math::
    \rho_t &\leftarrow \min\left(\gamma, \tfrac{1}{\sqrt t}\right), \qquad
    \alpha_t \leftarrow \max(\epsilon_2, \mathrm{RMS}(\theta_{t-1}))\, \rho_t \\
    w_t &\leftarrow t^\tau \\
    R_t &\leftarrow (1 - w_t) R_{t-1} + w_t\, \mathrm{mean}_{-1}(g_t^2), \qquad
    C_t \leftarrow (1 - w_t) C_{t-1} + w_t\, \mathrm{mean}_{-2}(g_t^2) \\
    V_t &\leftarrow \frac{R_t\, C_t}{\max(\mathrm{mean}_{-2}(R_t), \epsilon_1)} \ \text{(two axes or more)} \\
    V_t &\leftarrow (1 - w_t) V_{t-1} + w_t\, g_t^2 \ \text{(otherwise)} \\
    u_t &\leftarrow \frac{g_t}{\max(\sqrt{V_t}, \epsilon_1)} \\
    \theta_t &\leftarrow (1 - \gamma \lambda)\, \theta_{t-1} - \frac{\alpha_t}{\max(1, \mathrm{RMS}(u_t) / d)}\, u_t

with largest relative step :math:`\gamma`, decay exponent :math:`\tau \leq 0`, clipping threshold :math:`d` and weight
decay :math:`\lambda`; a mean runs over the last axis or the last but one, RMS over the whole array.

Source: Shazeer, Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018 (arXiv:1804.04235).
PyTorch's variant: a learning rate bounds the relative step, and :math:`\epsilon_1` bounds divisors, where the paper
adds it to the squares.

Differs from PyTorch:

1. Complex parameters are refused when the optimizer or the state is made, not at the first step.
2. An empty parameter stays as it is; PyTorch divides by zero.
3. ``eps=(None, ...)`` stands for the machine epsilon of each parameter's own dtype; PyTorch takes that of the first
   parameter for all of a group.

Differs from optax:

1. Every array of two axes or more is factored, along its last two; ``optax.adafactor`` takes the two largest axes, and
   only if both have 128 elements.
2. The first epsilon bounds divisors; in optax it is 1e-30 and is added to the squares.
3. The learning rate bounds the relative step, which is multiplied by the scale of the parameter; optax multiplies the
   update by it, and has neither ``1 / sqrt(t)`` nor a default.
4. Weight decay is multiplied by the learning rate.
"""

from __future__ import annotations  # signatures then show `Rate`, not what it stands for

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Decay,
    Fixed,
    Flag,
    Flags,
    Foreach,
    Hyper,
    LearningRate,
    Number,
    Numeric,
    Options,
    Rule,
    Square,
    factory,
    maximum,
    sqrt,
)

__all__ = ["Adafactor", "adafactor"]


def _message(what: str, bound: str = ">= 0") -> str:
    """PyTorch's message, which has a form of its own in this algorithm."""
    return f"{what} should be {bound} but is: {{value}}"


Rate = Annotated[LearningRate, Numeric(minimum=0, message=_message("Learning rate"))]
Exponent = Annotated[Number, Numeric(maximum=0, message=_message("beta2_decay", "<= 0"))]
Epsilons = Annotated[
    tuple[Number | None, Number] | Mapping[Any, Any],
    Numeric(
        items=(
            Numeric(minimum=0, optional=True, message=_message("epsilon1")),
            Numeric(minimum=0, message=_message("epsilon2")),
        )
    ),
]
Threshold = Annotated[Number, Numeric(minimum=1, message=_message("Clipping threshold d", ">= 1"))]
Shrinkage = Annotated[Decay, Numeric(minimum=0, skip=True, message=_message("weight_decay"))]


class Slots(NamedTuple):
    """Kept for each parameter, in its dtype: of two axes or more the first two, otherwise the last."""

    row_var: Fixed | None  # R: shape of the parameter, with the last axis reduced to 1
    col_var: Fixed | None  # C: shape of the parameter, with the second-to-last axis reduced to 1
    variance: Square | None  # V: shape of the parameter


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lr: Any
    inverse_sqrt_step: Any
    weight: Any  # w: of the present squares in the running means
    one_minus_weight: Any
    eps1: Any  # not a number where it is the machine epsilon, which depends on the parameter
    eps2: Any
    d: Any
    shrink: Any  # by which weight decay multiplies the parameter


def check_param(param: Array, flags: Flags) -> None:
    """PyTorch's condition."""
    if jnp.iscomplexobj(param):
        raise RuntimeError("Adafactor does not support complex parameters")


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    if param.ndim < 2:
        return Slots(row_var=None, col_var=None, variance=jnp.zeros_like(param))
    *batch, rows, columns = param.shape
    return Slots(
        row_var=jnp.zeros_like(param, shape=(*batch, rows, 1)),
        col_var=jnp.zeros_like(param, shape=(*batch, 1, columns)),
        variance=None,
    )


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Weights of the running means, and bounds."""
    eps1, eps2 = hyper.eps
    weight = (1.0 * step) ** hyper.beta2_decay
    return Scalars(
        lr=hyper.lr,
        inverse_sqrt_step=step**-0.5,
        weight=weight,
        one_minus_weight=1 - weight,
        eps1=math.nan if eps1 is None else eps1,
        eps2=eps2,
        d=hyper.d,
        shrink=1 - hyper.lr * hyper.weight_decay,
    )


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    eps1 = jnp.where(jnp.isnan(scalars.eps1), float(jnp.finfo(flags.param_dtype).eps), scalars.eps1)
    alpha = maximum(scalars.eps2, _rms(param)) * jnp.minimum(scalars.lr, scalars.inverse_sqrt_step)
    if flags.weight_decay:
        param = scalars.shrink * param
    squares = grad * grad
    row_var, col_var, variance = slots
    if variance is None:
        row_var = scalars.one_minus_weight * row_var + scalars.weight * _mean(squares, -1)
        col_var = scalars.one_minus_weight * col_var + scalars.weight * _mean(squares, -2)
        # The quotient first: the product of two small variances would vanish.
        estimate = row_var / jnp.maximum(_mean(row_var, -2), eps1) * col_var
    else:
        estimate = variance = scalars.one_minus_weight * variance + scalars.weight * squares
    direction = grad / jnp.maximum(sqrt(estimate), eps1)
    clipped = alpha / maximum(1.0, _rms(direction) / scalars.d)
    return param - clipped * direction, Slots(row_var, col_var, variance)


def _mean(x: Array, axis: int) -> Array:
    """The mean along an axis, which stays; zero where there is nothing to take it of."""
    return jnp.sum(x, axis, keepdims=True) / max(x.shape[axis], 1)


def _rms(x: Array) -> Array:
    """The root of the mean square of all elements; zero where there are none."""
    return sqrt(jnp.sum(x * x) / max(x.size, 1))


class Adafactor(Optimizer):
    """Adafactor, as ``torch.optim.Adafactor``: almost no memory in addition to the parameters.

    Args:
      params: what to optimize, real; see :class:`optimjax.Optimizer`.
      lr: largest step relative to the parameter's root mean square, and what multiplies weight decay; at least 0.
      beta2_decay: at step t the present squares enter their running means with weight ``t**beta2_decay``; at most 0.
      eps: lower bounds: of what is divided by, ``None`` for the machine epsilon of the parameter's dtype; and of the
        parameter's root mean square. Each at least 0.
      d: largest root mean square of an update, before it is scaled; at least 1.
      weight_decay: times ``lr`` and the parameter, subtracted from the parameter, at least 0.
      foreach: accepted and kept; the compiled step is already what it asks for.
      maximize: ascend instead of descend.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.
      RuntimeError: a parameter is complex.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Adafactor({"w": jnp.array([3.0, -4.0])}, lr=0.1)
    >>> optimizer.step({"w": jnp.array([5.0, 0.01])})
    >>> print(jnp.round(100 * optimizer.params["w"]))
    [ 265. -435.]

    As a pure function, :func:`optimjax.functional.adafactor`:

    >>> adafactor = optim.functional.adafactor(lr=0.1)
    >>> params = jnp.full((2, 3), 2.0)
    >>> params, state = adafactor.update(params, jnp.ones((2, 3)), adafactor.init(params))
    >>> print(params.round(2), state.step, state.row_var.shape, state.col_var.shape)
    [[1.8 1.8 1.8]
     [1.8 1.8 1.8]] 1 (2, 1) (1, 3)
    """

    rule = Rule(Slots, init, scalars, update, check_param=check_param, takes="array")

    def __init__(
        self,
        params: Any,
        lr: Rate = 1e-2,
        beta2_decay: Exponent = -0.8,
        eps: Epsilons = (None, 1e-3),
        d: Threshold = 1.0,
        weight_decay: Shrinkage = 0.0,
        *,
        foreach: Foreach = None,
        maximize: Flag = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
        )
        super().__init__(params, defaults, **options)


adafactor = factory(Adafactor)
