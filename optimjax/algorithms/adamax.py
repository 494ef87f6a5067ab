r"""Adamax: Adam with the largest gradient of late in place of the root of the second moment.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1} \\
    m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    u_t &\leftarrow \max(\beta_2 u_{t-1},\ |g_t| + \epsilon) \\
    \theta_t &\leftarrow \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}\, \frac{m_t}{u_t}

with learning rate :math:`\gamma`, weight decay :math:`\lambda`.

Source: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015 (arXiv:1412.6980), section 7.1; there
without epsilon.

Differs from PyTorch: nothing but half precision, where the arithmetic here is in float32, so that a zero gradient
does not give NaN although epsilon is zero in float16.

Differs from optax:

1. ``weight_decay`` is added to the gradient; ``optax.adamax`` has none, and that of ``optax.adamaxw`` is decoupled.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Betas,
    Capturable,
    Decay,
    Differentiable,
    Epsilon,
    Flag,
    Flags,
    Foreach,
    Hyper,
    LearningRate,
    Moment,
    Options,
    Rule,
    Square,
    bias_correction,
    coupled_decay,
    factory,
)

__all__ = ["Adamax", "adamax"]


class Slots(NamedTuple):
    """Kept for each parameter; each of its shape and dtype."""

    exp_avg: Moment  # m: running mean of the gradients
    exp_inf: Square  # u: largest absolute gradient so far, older ones discounted


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    step_size: Any  # lr over the bias correction
    eps: Any
    weight_decay: Any


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    return Slots(exp_avg=jnp.zeros_like(param), exp_inf=jnp.zeros_like(param))


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Only the mean needs a bias correction: the maximum starts with the first gradient, not with a share of it."""
    beta1, beta2 = hyper.betas
    return Scalars(
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        step_size=hyper.lr / bias_correction(beta1, step),
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
    )


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    grad = coupled_decay(param, grad, scalars, flags)
    exp_avg = scalars.beta1 * slots.exp_avg + scalars.one_minus_beta1 * grad
    exp_inf = jnp.maximum(scalars.beta2 * slots.exp_inf, jnp.abs(grad) + scalars.eps)
    return param - scalars.step_size * (exp_avg / exp_inf), Slots(exp_avg, exp_inf)


class Adamax(Optimizer):
    """Adamax, as ``torch.optim.Adamax``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      betas: share of the running mean that is kept, and discount of the largest gradient; each in [0, 1).
      eps: added to the absolute gradient; at least 0.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      maximize: ascend instead of descend.
      foreach, differentiable, capturable: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    Each parameter moves by at most about ``lr``, whatever the scale of its gradients:

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Adamax({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    >>> optimizer.step({"w": jnp.array([4.0, -0.01])})
    >>> print(jnp.round(100 * optimizer.params["w"]))
    [ 90. 210.]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: Epsilon = 1e-8,
        weight_decay: Decay = 0,
        foreach: Foreach = None,
        *,
        maximize: Flag = False,
        differentiable: Differentiable = False,
        capturable: Capturable = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            eps=eps,
            betas=betas,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        super().__init__(params, defaults, **options)


adamax = factory(Adamax)
