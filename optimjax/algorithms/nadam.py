r"""NAdam: Adam with Nesterov momentum.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1}, \qquad
    \theta_{t-1} \leftarrow (1 - \gamma \lambda)\, \theta_{t-1} \ \text{(decoupled)} \\
    \mu_t &\leftarrow \beta_1 \left(1 - \tfrac{1}{2}\, 0.96^{t \psi}\right), \qquad \pi_t \leftarrow \pi_{t-1} \mu_t \\
    m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
    \hat m_t &\leftarrow \frac{1 - \mu_t}{1 - \pi_t}\, g_t + \frac{\mu_{t+1}}{1 - \pi_t \mu_{t+1}}\, m_t \\
    \theta_t &\leftarrow \theta_{t-1} - \gamma\, \frac{\hat m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

with learning rate :math:`\gamma`, weight decay :math:`\lambda`, momentum decay :math:`\psi`, and :math:`\pi_0 = 1`.

Source: Dozat, "Incorporating Nesterov momentum into Adam", ICLR 2016 workshop.

Differs from PyTorch:

1. ``mu_product`` is float64 for a float64 parameter, else float32. PyTorch keeps it in its default dtype, whatever the
   parameter is.
2. Half precision, where the arithmetic here is in float32, so that a zero gradient does not give NaN although epsilon
   is zero in float16.

Differs from optax:

1. The momentum grows from step to step; ``optax.nadam`` keeps it at :math:`\beta_1`.
2. ``weight_decay`` may be added to the gradient; optax has decoupled decay only, in ``optax.nadamw``.
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
    Fixed,
    Flag,
    Flags,
    Foreach,
    Hyper,
    LearningRate,
    Moment,
    NonNegative,
    Options,
    Rule,
    Square,
    at_least_float32,
    bias_correction,
    decay,
    factory,
    sqrt,
)

__all__ = ["NAdam", "nadam"]


class Slots(NamedTuple):
    """Kept for each parameter; the running means are of its shape and dtype."""

    mu_product: Fixed  # pi: product of all momenta so far; scalar, float32 at least
    exp_avg: Moment  # m: running mean of the gradients
    exp_avg_sq: Square  # v: running mean of their squares


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lr: Any
    beta1: Any
    one_minus_beta1: Any  # stored separately: 1 - 0.999 in float32 keeps only four digits
    beta2: Any
    one_minus_beta2: Any
    bias_correction2_sqrt: Any
    mu: Any  # momentum of this step
    one_minus_mu: Any
    next_mu: Any  # momentum of the step after
    eps: Any
    weight_decay: Any
    shrink: Any  # by which decoupled decay multiplies the parameter


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """Means start at zero, the product at one."""
    return Slots(
        mu_product=jnp.ones((), at_least_float32(param.real.dtype)),
        exp_avg=jnp.zeros_like(param),
        exp_avg_sq=jnp.zeros_like(param),
    )


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """The momenta, from half of beta1 up to beta1, and the bias correction."""
    beta1, beta2 = hyper.betas
    missing, next_missing = (0.5 * 0.96 ** (count * hyper.momentum_decay) for count in (step, step + 1))
    return Scalars(
        lr=hyper.lr,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        bias_correction2_sqrt=bias_correction(beta2, step) ** 0.5,
        mu=beta1 * (1 - missing),
        one_minus_mu=1 - beta1 + beta1 * missing,
        next_mu=beta1 * (1 - next_missing),
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        shrink=1 - hyper.lr * hyper.weight_decay,
    )


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    param, grad = decay(param, grad, scalars, flags)
    product = slots.mu_product * scalars.mu
    exp_avg = scalars.beta1 * slots.exp_avg + scalars.one_minus_beta1 * grad
    exp_avg_sq = scalars.beta2 * slots.exp_avg_sq + scalars.one_minus_beta2 * grad * grad
    denominator = sqrt(exp_avg_sq) / scalars.bias_correction2_sqrt + scalars.eps
    grad_size = scalars.lr * scalars.one_minus_mu / (1 - product)
    mean_size = scalars.lr * scalars.next_mu / (1 - product * scalars.next_mu)
    return param - (grad_size * grad + mean_size * exp_avg) / denominator, Slots(product, exp_avg, exp_avg_sq)


class NAdam(Optimizer):
    """NAdam, as ``torch.optim.NAdam``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      betas: shares of the running means of gradient and squared gradient that are kept; each in [0, 1).
      eps: added to the root of the second moment, after bias correction; at least 0.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      momentum_decay: how fast the momentum grows from half of the first beta to all of it; at least 0.
      decoupled_weight_decay: shrink the parameter instead, as AdamW does.
      maximize: ascend instead of descend.
      foreach, capturable, differentiable: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.NAdam({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    >>> for _ in range(2):
    ...     optimizer.step({"w": jnp.array([4.0, -0.01])})
    ...     print(jnp.round(1000 * optimizer.params["w"]))
    [ 894. 2106.]
    [ 816. 2184.]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: Epsilon = 1e-8,
        weight_decay: Decay = 0,
        momentum_decay: NonNegative = 4e-3,
        decoupled_weight_decay: Flag = False,
        *,
        foreach: Foreach = None,
        maximize: Flag = False,
        capturable: Capturable = False,
        differentiable: Differentiable = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            eps=eps,
            betas=betas,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, **options)


nadam = factory(NAdam)
