r"""Adagrad: the gradient over the root of the sum of all its squares.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1} \\
    s_t &\leftarrow s_{t-1} + g_t^2 \\
    \theta_t &\leftarrow \theta_{t-1} - \frac{\gamma}{1 + (t - 1)\, \eta}\, \frac{g_t}{\sqrt{s_t} + \epsilon}

with learning rate :math:`\gamma`, its decay :math:`\eta` and weight decay :math:`\lambda`.

Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic optimization",
JMLR 12, 2011.

Differs from PyTorch:

1. Sparse gradients raise; PyTorch takes them where there is no weight decay.

Differs from optax:

1. The sum starts at 0; in ``optax.adagrad`` at 0.1.
2. Epsilon is added to the root, 1e-10 unless given; optax adds it under the root, 1e-7.
3. ``lr_decay`` and ``weight_decay``, which optax does not have.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Decay,
    Differentiable,
    Epsilon,
    Flag,
    Flags,
    Foreach,
    Fused,
    Hyper,
    LearningRate,
    NonNegative,
    Options,
    Rule,
    Square,
    coupled_decay,
    factory,
    sqrt,
)

__all__ = ["Adagrad", "adagrad"]


class Slots(NamedTuple):
    """Kept for each parameter, of its shape and dtype."""

    sum: Square  # s: sum of the squared gradients


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lr: Any  # decayed
    eps: Any
    weight_decay: Any


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """The initial value, in both parts of a complex parameter."""
    start = jnp.full_like(param.real, hyper.initial_accumulator_value)
    return Slots(sum=jax.lax.complex(start, start) if jnp.iscomplexobj(param) else start)


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """The learning rate of this step."""
    return Scalars(hyper.lr / (1 + (step - 1) * hyper.lr_decay), hyper.eps, hyper.weight_decay)


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    grad = coupled_decay(param, grad, scalars, flags)
    total = slots.sum + grad * grad
    # In this order XLA does not store the decayed gradient between its two uses.
    return param - (scalars.lr * grad) / (sqrt(total) + scalars.eps), Slots(total)


class Adagrad(Optimizer):
    """Adagrad, as ``torch.optim.Adagrad``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      lr_decay: after t updates the learning rate is divided by ``1 + t * lr_decay``; at least 0.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      initial_accumulator_value: what the sum of squares starts from; at least 0.
      eps: added to the root, outside of it; at least 0.
      maximize: ascend instead of descend.
      foreach, differentiable, fused: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Adagrad({"w": jnp.array([1.0, 2.0])}, lr=0.5)
    >>> for _ in range(2):
    ...     optimizer.step({"w": jnp.array([4.0, -0.01])})
    >>> print(jnp.round(1000 * optimizer.params["w"]))
    [ 146. 2854.]
    """

    rule = Rule(Slots, init, scalars, update, eager=True)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        lr_decay: NonNegative = 0,
        weight_decay: Decay = 0,
        initial_accumulator_value: NonNegative = 0,
        eps: Epsilon = 1e-10,
        foreach: Foreach = None,
        *,
        maximize: Flag = False,
        differentiable: Differentiable = False,
        fused: Fused = None,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, **options)


adagrad = factory(Adagrad)
