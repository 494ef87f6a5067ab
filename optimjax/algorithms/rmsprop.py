r"""RMSprop: the gradient over the root of a running mean of its square.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1} \\
    v_t &\leftarrow \alpha v_{t-1} + (1 - \alpha)\, g_t^2 \\
    \bar g_t &\leftarrow \alpha \bar g_{t-1} + (1 - \alpha)\, g_t, \quad
        \tilde v_t = v_t - \bar g_t^2 \ \text{(centered)}, \quad \tilde v_t = v_t \ \text{(otherwise)} \\
    b_t &\leftarrow \mu\, b_{t-1} + g_t / (\sqrt{\tilde v_t} + \epsilon) \\
    \theta_t &\leftarrow \theta_{t-1} - \gamma\, b_t

with learning rate :math:`\gamma`, momentum :math:`\mu` and weight decay :math:`\lambda`.

Source: Tieleman, Hinton, "Lecture 6.5: RMSprop", Coursera 2012; centered: Graves, "Generating sequences with recurrent
neural networks", 2013 (arXiv:1308.0850).

Differs from PyTorch:

1. Centered, the variance is never taken below zero: rounding can make it negative, and PyTorch then gives NaN.

Differs from optax:

1. Epsilon is added to the root; ``optax.rmsprop`` adds it under the root, unless told ``eps_in_sqrt=False``.
2. The default of ``alpha`` is 0.99; in optax, where it is ``decay``, 0.9.
3. The learning rate multiplies the buffer; in optax it multiplies what enters the buffer, so that a new rate counts in
   full only when the old steps have faded.
4. ``weight_decay``, which optax does not have.
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
    Moment,
    NonNegative,
    Options,
    Rule,
    Square,
    Switch,
    coupled_decay,
    factory,
    sqrt,
)

__all__ = ["RMSprop", "rmsprop"]


class Slots(NamedTuple):
    """Kept for each parameter; each of its shape and dtype."""

    square_avg: Square  # v: running mean of the squared gradients
    momentum_buffer: Moment | None  # b: decaying sum of the steps; None without momentum
    grad_avg: Moment | None  # running mean of the gradients; None unless centered


class Scalars(NamedTuple):
    """What the hyperparameters alone decide."""

    lr: Any
    alpha: Any
    one_minus_alpha: Any
    eps: Any
    weight_decay: Any
    momentum: Any


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    return Slots(
        square_avg=jnp.zeros_like(param),
        momentum_buffer=jnp.zeros_like(param) if flags.momentum else None,
        grad_avg=jnp.zeros_like(param) if flags.centered else None,
    )


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Nothing depends on the step."""
    return Scalars(hyper.lr, hyper.alpha, 1 - hyper.alpha, hyper.eps, hyper.weight_decay, hyper.momentum)


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    grad = coupled_decay(param, grad, scalars, flags)
    square_avg = scalars.alpha * slots.square_avg + scalars.one_minus_alpha * grad * grad
    grad_avg, variance = slots.grad_avg, square_avg
    if grad_avg is not None:
        grad_avg = scalars.alpha * grad_avg + scalars.one_minus_alpha * grad
        variance = jnp.maximum(square_avg - grad_avg * grad_avg, 0)
    denominator = sqrt(variance) + scalars.eps
    buffer = slots.momentum_buffer
    if buffer is None:  # in this order XLA does not store the decayed gradient between its uses
        return param - (scalars.lr * grad) / denominator, Slots(square_avg, buffer, grad_avg)
    # A gradient that is decayed and then divided XLA would store; one that is negated, too, it computes again.
    buffer = scalars.momentum * buffer - -grad / denominator
    return param - scalars.lr * buffer, Slots(square_avg, buffer, grad_avg)


class RMSprop(Optimizer):
    """RMSprop, as ``torch.optim.RMSprop``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      alpha: share of the running means that is kept; at least 0.
      eps: added to the root, outside of it; at least 0.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      momentum: share of the buffer that is kept, at least 0; 0 keeps no buffer.
      centered: divide by the root of the variance instead of the second moment.
      maximize: ascend instead of descend.
      capturable, foreach, differentiable: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.RMSprop({"w": jnp.array([1.0, 2.0])}, lr=0.01)
    >>> optimizer.step({"w": jnp.array([4.0, -0.01])})
    >>> print(optimizer.params["w"])
    [0.9      2.099999]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        alpha: NonNegative = 0.99,
        eps: Epsilon = 1e-8,
        weight_decay: Decay = 0,
        momentum: Switch = 0,
        centered: Flag = False,
        capturable: Capturable = False,
        foreach: Foreach = None,
        maximize: Flag = False,
        differentiable: Differentiable = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            eps=eps,
            momentum=momentum,
            weight_decay=weight_decay,
            alpha=alpha,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, **options)


rmsprop = factory(RMSprop)
