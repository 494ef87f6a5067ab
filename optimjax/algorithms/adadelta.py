r"""Adadelta: the gradient in units of its own running root mean square, times that of the past updates.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1} \\
    v_t &\leftarrow \rho v_{t-1} + (1 - \rho)\, g_t^2 \\
    \Delta_t &\leftarrow \sqrt{\frac{u_{t-1} + \epsilon}{v_t + \epsilon}}\, g_t \\
    u_t &\leftarrow \rho u_{t-1} + (1 - \rho)\, \Delta_t^2 \\
    \theta_t &\leftarrow \theta_{t-1} - \gamma\, \Delta_t

with learning rate :math:`\gamma`, weight decay :math:`\lambda`.

Source: Zeiler, "ADADELTA: an adaptive learning rate method", 2012 (arXiv:1212.5701); there :math:`\gamma = 1`.

Differs from PyTorch: nothing.

Differs from optax: nothing.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Capturable,
    Decay,
    Differentiable,
    Epsilon,
    Flag,
    Flags,
    Foreach,
    Hyper,
    LearningRate,
    Options,
    Rule,
    Share,
    Square,
    after,
    coupled_decay,
    factory,
    sqrt,
)

__all__ = ["Adadelta", "adadelta"]


class Slots(NamedTuple):
    """Kept for each parameter; each of its shape and dtype."""

    square_avg: Square  # v: running mean of the squared gradients
    acc_delta: Square  # u: running mean of the squared updates


class Scalars(NamedTuple):
    """What the hyperparameters alone decide."""

    lr: Any
    rho: Any
    one_minus_rho: Any
    eps: Any
    weight_decay: Any


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    return Slots(square_avg=jnp.zeros_like(param), acc_delta=jnp.zeros_like(param))


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Nothing depends on the step."""
    return Scalars(hyper.lr, hyper.rho, 1 - hyper.rho, hyper.eps, hyper.weight_decay)


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    grad = coupled_decay(param, grad, scalars, flags)
    square_avg = scalars.rho * slots.square_avg + scalars.one_minus_rho * grad * grad
    # So that XLA stores neither quotient nor direction, as it does with whatever two results take from a root or a
    # division: each has a quotient of its own, and a negation costs nothing to do twice.
    above, below, direction = slots.acc_delta + scalars.eps, square_avg + scalars.eps, -grad
    param = param + scalars.lr * (sqrt(above / below) * direction)
    acc_delta = scalars.rho * slots.acc_delta + scalars.one_minus_rho * (above * direction / below * direction)
    return param, Slots(square_avg, after(param, acc_delta))


class Adadelta(Optimizer):
    """Adadelta, as ``torch.optim.Adadelta``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      rho: share of the running means that is kept; in [0, 1].
      eps: added to both running means, inside the roots; at least 0. It decides how large the first updates are.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      maximize: ascend instead of descend.
      foreach, capturable, differentiable: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    The first updates are small, whatever the scale of the gradients:

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Adadelta({"w": jnp.array([1.0, 2.0])})
    >>> for _ in range(3):
    ...     optimizer.step({"w": jnp.array([4.0, -400.0])})
    ...     print(jnp.round(1000 * optimizer.params["w"]))
    [ 997. 2003.]
    [ 994. 2006.]
    [ 990. 2010.]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1.0,
        rho: Share = 0.9,
        eps: Epsilon = 1e-6,
        weight_decay: Decay = 0,
        foreach: Foreach = None,
        *,
        capturable: Capturable = False,
        maximize: Flag = False,
        differentiable: Differentiable = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
            foreach=foreach,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, **options)


adadelta = factory(Adadelta)
