r"""Adam: the mean of the gradients over the root of the mean of their squares.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1} \ \text{(Adam)}, \qquad
    \theta_{t-1} \leftarrow (1 - \gamma \lambda)\, \theta_{t-1} \ \text{(AdamW)} \\
    m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
    \hat v_t &\leftarrow v_t \ \text{, with amsgrad } \max(\hat v_{t-1}, v_t) \\
    \theta_t &\leftarrow \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}\,
        \frac{m_t}{\sqrt{\hat v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

with learning rate :math:`\gamma`, weight decay :math:`\lambda`. AdamW reuses this arithmetic.

Source: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015 (arXiv:1412.6980); AMSGrad: Reddi, Kale,
Kumar, "On the convergence of Adam and beyond", ICLR 2018 (arXiv:1904.09237).

Differs from PyTorch: nothing but half precision, where the arithmetic here is in float32, so that a zero gradient
does not give NaN although epsilon is zero in float16.

Differs from optax:

1. With ``amsgrad``, the maximum is taken of the second moments before bias correction, and then corrected.
   ``optax.amsgrad`` corrects first, or with ``bias_correction_nu=False`` not at all.
2. ``weight_decay``, added to the gradient; ``optax.adam`` has none.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    BetasAlike,
    Capturable,
    Decay,
    Differentiable,
    Epsilon,
    Flag,
    Flags,
    Foreach,
    Fused,
    Hyper,
    LearningRate,
    Moment,
    Options,
    Rule,
    Square,
    bias_correction,
    decay,
    factory,
    sqrt,
)

__all__ = ["Adam", "adam"]


class Slots(NamedTuple):
    """Kept for each parameter; each of its shape and dtype."""

    exp_avg: Moment  # m: running mean of the gradients
    exp_avg_sq: Square  # v: running mean of their squares
    max_exp_avg_sq: Square | None  # largest v so far, before bias correction; None without amsgrad


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    beta1: Any
    one_minus_beta1: Any  # stored separately: 1 - 0.999 in float32 keeps only four digits
    beta2: Any
    one_minus_beta2: Any
    step_size: Any  # lr over the first bias correction
    bias_correction2_sqrt: Any
    eps: Any
    weight_decay: Any
    shrink: Any  # by which decoupled decay multiplies the parameter


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    return Slots(
        exp_avg=jnp.zeros_like(param),
        exp_avg_sq=jnp.zeros_like(param),
        max_exp_avg_sq=jnp.zeros_like(param) if flags.amsgrad else None,
    )


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Bias corrections and step size."""
    beta1, beta2 = hyper.betas
    return Scalars(
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=hyper.lr / bias_correction(beta1, step),
        bias_correction2_sqrt=bias_correction(beta2, step) ** 0.5,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        shrink=1 - hyper.lr * hyper.weight_decay,
    )


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    param, grad = decay(param, grad, scalars, flags)
    exp_avg = scalars.beta1 * slots.exp_avg + scalars.one_minus_beta1 * grad
    exp_avg_sq = scalars.beta2 * slots.exp_avg_sq + scalars.one_minus_beta2 * grad * grad
    max_exp_avg_sq, second = slots.max_exp_avg_sq, exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = second = jnp.maximum(max_exp_avg_sq, exp_avg_sq)
    denominator = sqrt(second) / scalars.bias_correction2_sqrt + scalars.eps
    return param - scalars.step_size * (exp_avg / denominator), Slots(exp_avg, exp_avg_sq, max_exp_avg_sq)


class Adam(Optimizer):
    """Adam, as ``torch.optim.Adam``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      betas: shares of the running means of gradient and squared gradient that are kept; each in [0, 1).
      eps: added to the root of the second moment, after bias correction; at least 0.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      amsgrad: divide by the largest second moment so far.
      maximize: ascend instead of descend.
      foreach, capturable, differentiable, fused: accepted and kept; the compiled step is already what they ask for.
      decoupled_weight_decay: shrink the parameter instead, which is :class:`optimjax.AdamW`.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Adam({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    >>> optimizer.step({"w": jnp.array([4.0, -0.01])})
    >>> print(jnp.round(100 * optimizer.params["w"]))
    [ 90. 210.]

    As a pure function, :func:`optimjax.functional.adam`:

    >>> adam = optim.functional.adam(lr=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> params, state = adam.update(params, jnp.array([4.0, -0.01]), adam.init(params))
    >>> print(jnp.round(100 * params), state.step, state.exp_avg.round(3))
    [ 90. 210.] 1 [ 0.4   -0.001]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: BetasAlike = (0.9, 0.999),
        eps: Epsilon = 1e-8,
        weight_decay: Decay = 0,
        amsgrad: Flag = False,
        *,
        foreach: Foreach = None,
        maximize: Flag = False,
        capturable: Capturable = False,
        differentiable: Differentiable = False,
        fused: Fused = None,
        decoupled_weight_decay: Flag = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            eps=eps,
            betas=betas,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, **options)


adam = factory(Adam)
