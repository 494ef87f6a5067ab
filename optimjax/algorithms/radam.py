r"""RAdam: Adam that steps without its second moment until enough gradients are in it.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1}, \qquad
    \theta_{t-1} \leftarrow (1 - \gamma \lambda)\, \theta_{t-1} \ \text{(decoupled)} \\
    m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
    \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad \rho_t = \rho_\infty - \frac{2 t\, \beta_2^t}{1 - \beta_2^t} \\
    r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}} \\
    \theta_t &\leftarrow \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}\, m_t \cdot \begin{cases}
        r_t \sqrt{1 - \beta_2^t}\, /\, (\sqrt{v_t} + \epsilon) & \text{if } \rho_t > 5 \\
        1 & \text{otherwise}
    \end{cases}

with learning rate :math:`\gamma`, weight decay :math:`\lambda`. :math:`\rho_t` is about the number of gradients in the
second moment: at first :math:`t`, in the end :math:`\rho_\infty`.

Source: Liu et al., "On the variance of the adaptive learning rate and beyond", ICLR 2020 (arXiv:1908.03265); there the
threshold is 4.

Differs from PyTorch: nothing but half precision, where the arithmetic here is in float32, so that a zero gradient
does not give NaN although epsilon is zero in float16.

Differs from optax:

1. Epsilon is added to the root before bias correction; ``optax.radam`` adds it after.
2. ``weight_decay``, which optax does not have.
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
    decay,
    factory,
    maximum,
    sqrt,
)

__all__ = ["RAdam", "radam"]


class Slots(NamedTuple):
    """Kept for each parameter; each of its shape and dtype."""

    exp_avg: Moment  # m: running mean of the gradients
    exp_avg_sq: Square  # v: running mean of their squares


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    step_size: Any  # lr over the first bias correction
    rectified: Any  # whether the second moment is used
    rectification: Any  # r times the root of the second bias correction
    eps: Any
    weight_decay: Any
    shrink: Any  # by which decoupled decay multiplies the parameter


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    return Slots(exp_avg=jnp.zeros_like(param), exp_avg_sq=jnp.zeros_like(param))


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Bias corrections and rectification."""
    beta1, beta2 = hyper.betas
    rho, limit = length(step, beta2), 2 / (1 - beta2) - 1
    rectified = rho > 5
    # Up to 5, where the rectification is not used, that of 5 stands for it, which is finite.
    rho, limit = maximum(rho, 5.0), maximum(limit, 5.0)
    rectification = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return Scalars(
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=hyper.lr / bias_correction(beta1, step),
        rectified=rectified,
        rectification=rectification * bias_correction(beta2, step) ** 0.5,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        shrink=1 - hyper.lr * hyper.weight_decay,
    )


def length(step: Any, beta2: Any) -> Any:
    r""":math:`\rho_t`, exact to rounding for Python numbers and for traced ones.

    In float32 the formula of the paper cancels: with beta2 = 0.9999 it is 2e4 less nearly as much around the threshold
    of 5. With :math:`z = -\tfrac{t}{2} \log \beta_2` and :math:`L(z) = \coth z - 1/z` it is also
    :math:`t\,(1 - L(z)) + L(z/t)`, which does not.
    """
    correction = bias_correction(beta2, step)
    plain = 2 / (1 - beta2) - 1 - 2 * step * (1 - correction) / correction
    if isinstance(plain, float):
        return plain
    z = jnp.minimum(-jnp.log1p(-correction) / 2, 1)
    return jnp.where(z < 1, step * (1 - langevin(z)) + langevin(z / step), plain)


def langevin(z: Any) -> Any:
    """``coth(z) - 1/z`` for z up to 1, as a continued fraction."""
    tail = 0.0
    for odd in (15, 13, 11, 9, 7, 5):
        tail = z * z / (odd + tail)
    return z / (3 + tail)


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    param, grad = decay(param, grad, scalars, flags)
    exp_avg = scalars.beta1 * slots.exp_avg + scalars.one_minus_beta1 * grad
    exp_avg_sq = scalars.beta2 * slots.exp_avg_sq + scalars.one_minus_beta2 * grad * grad
    adaptive = scalars.rectification / (sqrt(exp_avg_sq) + scalars.eps)
    factor = jnp.where(scalars.rectified > 0, adaptive, 1)
    return param - scalars.step_size * (exp_avg * factor), Slots(exp_avg, exp_avg_sq)


class RAdam(Optimizer):
    """RAdam, as ``torch.optim.RAdam``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      betas: shares of the running means of gradient and squared gradient that are kept; each in [0, 1).
      eps: added to the root of the second moment, before bias correction; at least 0.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      decoupled_weight_decay: shrink the parameter instead, as AdamW does.
      maximize: ascend instead of descend.
      foreach, capturable, differentiable: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    With the default betas five steps are plain momentum, proportional to the gradient; then adaptive ones set in, at
    first small:

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.RAdam({"w": jnp.array([0.0, 0.0])}, lr=0.1)
    >>> for _ in range(5):
    ...     optimizer.step({"w": jnp.array([-4.0, 0.01])})
    >>> print(optimizer.params["w"].round(4))
    [ 2.    -0.005]
    >>> optimizer.step({"w": jnp.array([-4.0, 0.01])})
    >>> print(optimizer.params["w"].round(4))
    [ 2.0026 -0.0076]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Epsilon = 1e-8,
        weight_decay: Decay = 0,
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
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, **options)


radam = factory(RAdam)
