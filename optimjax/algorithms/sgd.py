r"""SGD: stochastic gradient descent, with momentum.

.. math::
    g_t &\leftarrow g_t + \lambda\, \theta_{t-1} \\
    b_t &\leftarrow \mu\, b_{t-1} + (1 - \tau)\, g_t \qquad (b_1 = g_1) \\
    g_t &\leftarrow g_t + \mu\, b_t \ \text{(Nesterov)}, \quad b_t \ \text{(otherwise)} \\
    \theta_t &\leftarrow \theta_{t-1} - \gamma\, g_t

with learning rate :math:`\gamma`, momentum :math:`\mu`, dampening :math:`\tau` and weight decay :math:`\lambda`.

Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", ICML
2013; the form is PyTorch's, in which the learning rate multiplies the whole buffer.

Differs from PyTorch:

1. Sparse gradients raise; PyTorch takes them.

Differs from optax:

1. ``dampening`` and ``weight_decay``; ``optax.sgd`` has neither.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Decay,
    Differentiable,
    Flag,
    Flags,
    Foreach,
    Fused,
    Hyper,
    LearningRate,
    Moment,
    Options,
    Rule,
    Skippable,
    Switch,
    coupled_decay,
    factory,
    where,
)

__all__ = ["SGD", "sgd"]


class Slots(NamedTuple):
    """Kept for each parameter, of its shape and dtype."""

    momentum_buffer: Moment | None  # b: decaying sum of the gradients; None without momentum


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lr: Any
    momentum: Any
    gain: Any  # of the gradient entering the buffer: 1 at the first update, then 1 - dampening
    weight_decay: Any


def check(hyper: Hyper, flags: Flags) -> None:
    """PyTorch's condition for Nesterov momentum."""
    if flags.nesterov and (not flags.momentum or flags.dampening):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={hyper.momentum}, dampening={hyper.dampening}"
        )


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """A buffer of zeros, which the first update fills with the gradient."""
    return Slots(momentum_buffer=jnp.zeros_like(param) if flags.momentum else None)


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """The first gradient enters the buffer whole."""
    return Scalars(hyper.lr, hyper.momentum, where(step > 1, 1 - hyper.dampening, 1.0), hyper.weight_decay)


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    grad = coupled_decay(param, grad, scalars, flags)
    buffer = slots.momentum_buffer
    if buffer is not None:
        buffer = scalars.momentum * buffer + (scalars.gain * grad if flags.dampening else grad)
        if not flags.nesterov:
            return param - scalars.lr * buffer, Slots(buffer)
        # In two terms, for then XLA does not store the decayed gradient between its two uses.
        return param - (scalars.lr * grad + scalars.lr * (scalars.momentum * buffer)), Slots(buffer)
    return param - scalars.lr * grad, Slots(buffer)


class SGD(Optimizer):
    """Stochastic gradient descent (optionally with momentum), as ``torch.optim.SGD``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      momentum: share of the buffer that is kept, at least 0; 0 keeps no buffer.
      dampening: share of the gradient that does not enter the buffer.
      weight_decay: times the parameter, added to the gradient (L2 penalty), at least 0.
      nesterov: Nesterov momentum; requires a momentum and zero dampening.
      maximize: ascend instead of descend.
      foreach, differentiable, fused: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range, or Nesterov momentum is asked for without momentum or with
        dampening.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.SGD({"w": jnp.array([1.0, 2.0])}, lr=0.1, momentum=0.9)
    >>> for _ in range(2):
    ...     optimizer.step({"w": jnp.array([1.0, -1.0])})
    >>> print(optimizer.params["w"])
    [0.71 2.29]

    As a pure function, :func:`optimjax.functional.sgd`:

    >>> sgd = optim.functional.sgd(lr=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> params, state = sgd.update(params, jnp.ones(2), sgd.init(params))
    >>> print(params, state.step)
    [0.9 1.9] 1
    """

    rule = Rule(Slots, init, scalars, update, check, counts_steps=False)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        momentum: Switch = 0,
        dampening: Skippable = 0,
        weight_decay: Decay = 0,
        nesterov: Flag = False,
        *,
        maximize: Flag = False,
        foreach: Foreach = None,
        differentiable: Differentiable = False,
        fused: Fused = None,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, **options)


sgd = factory(SGD)
