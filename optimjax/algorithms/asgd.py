r"""ASGD: stochastic gradient descent that also keeps the mean of its parameters.

.. math::
    g_t &\leftarrow g_t + \lambda'\, \theta_{t-1} \\
    \theta_t &\leftarrow \theta_{t-1} - \eta_{t-1}\, (g_t + \lambda\, \theta_{t-1}) \\
    \bar\theta_t &\leftarrow \bar\theta_{t-1} + \mu_{t-1}\, (\theta_t - \bar\theta_{t-1}) \\
    \eta_t &\leftarrow \frac{\gamma}{(1 + \lambda \gamma t)^\alpha}, \qquad
    \mu_t \leftarrow \frac{1}{\max(1,\ t - t_0)}

with learning rate :math:`\gamma = \eta_0`, decay term :math:`\lambda`, weight decay :math:`\lambda'` and
:math:`\mu_0 = 1`. So :math:`\bar\theta_t` is :math:`\theta_t` itself up to :math:`t = t_0 + 2`, and from then on the
mean of all parameters since.

Source: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992; the
learning rate falls as in Xu, "Towards optimal one pass large scale learning with averaged stochastic gradient descent",
2011 (arXiv:1107.2490).

Differs from PyTorch:

1. ``eta`` and ``mu`` are float64 for a float64 parameter, else float32. PyTorch keeps them in its default dtype,
   whatever the parameter is.
2. Negative ``lambd`` and ``alpha`` are refused, as in PyTorch since 2.15.

Differs from optax: it has no ASGD.
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
    Fixed,
    Flag,
    Flags,
    Foreach,
    Hyper,
    LearningRate,
    NonNegative,
    Number,
    Options,
    Rule,
    Weights,
    at_least_float32,
    coupled_decay,
    factory,
)

__all__ = ["ASGD", "asgd"]


class Slots(NamedTuple):
    """Kept for each parameter."""

    eta: Fixed  # learning rate of the next step; scalar, float32 at least
    mu: Fixed  # share of the next parameters in the mean; scalar, float32 at least
    ax: Weights  # mean of the parameters; of their shape and dtype


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    lambd: Any
    weight_decay: Any
    eta: Any  # of the step after this one
    past_t0: Any  # number of steps after t0; negative before


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """The first step size is the learning rate."""
    dtype = at_least_float32(param.real.dtype)
    return Slots(
        eta=jnp.array(hyper.lr, dtype),
        mu=jnp.ones((), dtype),
        ax=jnp.zeros_like(param),
    )


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """The next learning rate."""
    return Scalars(
        lambd=hyper.lambd,
        weight_decay=hyper.weight_decay,
        eta=hyper.lr / (1.0 + hyper.lambd * hyper.lr * step) ** hyper.alpha,
        past_t0=step - hyper.t0,
    )


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    grad = coupled_decay(param, grad, scalars, flags)
    param = (1 - scalars.lambd * slots.eta) * param - slots.eta * grad
    # Before averaging, the mean is the parameter to the last bit, whatever it was before.
    ax = jnp.where(slots.mu == 1, param, slots.ax + slots.mu * (param - slots.ax))
    return param, Slots(eta=scalars.eta, mu=1 / jnp.maximum(1, scalars.past_t0), ax=ax)


class ASGD(Optimizer):
    """Averaged stochastic gradient descent, as ``torch.optim.ASGD``.

    The mean is in the state, ``optimizer.state[parameter]["ax"]``; the parameters do not depend on it.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0. A step uses the one that the step before has put into the state; the first step's
        is put there when the state is made: at a parameter's first gradient, or by ``init`` of the functional core.
      lambd: times the parameter, added to the gradient; it also sets how fast the learning rate falls; at least 0.
      alpha: power with which the learning rate falls, at least 0.
      t0: number of steps before averaging begins.
      weight_decay: times the parameter, added to the gradient (L2 penalty); at least 0.
      foreach, differentiable, capturable: accepted and kept; the compiled step is already what they ask for.
      maximize: ascend instead of descend.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.ASGD({"w": jnp.array([1.0, 2.0])}, lr=0.1, t0=0)
    >>> for _ in range(3):
    ...     optimizer.step({"w": jnp.array([1.0, -1.0])})
    >>> (parameter,) = optimizer.param_groups[0]["params"]
    >>> print(parameter.value.round(2), optimizer.state[parameter]["ax"].round(2))
    [0.7 2.3] [0.75 2.25]

    As a pure function, :func:`optimjax.functional.asgd`:

    >>> asgd = optim.functional.asgd(lr=0.1, lambd=0.5, alpha=1)
    >>> params = jnp.array([1.0, 2.0])
    >>> params, state = asgd.update(params, jnp.ones(2), asgd.init(params))
    >>> print(params, state.step, f"{state.eta:.4f}", state.ax)
    [0.84999996 1.8       ] 1 0.0952 [0.84999996 1.8       ]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        lambd: NonNegative = 1e-4,
        alpha: NonNegative = 0.75,
        t0: Number = 1e6,
        weight_decay: Decay = 0,
        foreach: Foreach = None,
        maximize: Flag = False,
        differentiable: Differentiable = False,
        capturable: Capturable = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        super().__init__(params, defaults, **options)


asgd = factory(ASGD)
