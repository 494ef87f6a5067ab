r"""Rprop: each element takes steps of its own size, which grows while its gradient keeps its sign.

.. math::
    \eta_t &\leftarrow \min(\eta_{t-1}\, \eta_+,\ \Gamma_{\max}) \ \text{where } g_t\, g_{t-1} > 0, \qquad
    \max(\eta_{t-1}\, \eta_-,\ \Gamma_{\min}) \ \text{where } g_t\, g_{t-1} < 0 \\
    g_t &\leftarrow 0 \ \text{where } g_t\, g_{t-1} < 0 \\
    \theta_t &\leftarrow \theta_{t-1} - \eta_t\, \mathrm{sign}(g_t)

with :math:`g_0 = 0`, learning rate :math:`\eta_0`, factors :math:`\eta_-, \eta_+` and smallest and largest step size
:math:`\Gamma_{\min}, \Gamma_{\max}`, between which :math:`\eta_1` is put, too.

Source: Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", ICNN
1993.

Differs from PyTorch:

1. Whether a gradient has kept its sign is seen however small it is; PyTorch multiplies it by the one before, and in
   single precision does not see it where the product is below 1e-45.

Differs from optax:

1. A step is taken with the present gradient; ``optax.rprop`` takes the one that it computed at the step before, and
   drops it where the sign has turned since.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Annotated, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Capturable,
    Differentiable,
    Flag,
    Flags,
    Foreach,
    Hyper,
    LearningRate,
    Moment,
    Numeric,
    Options,
    Pair,
    Rule,
    Weights,
    after,
    factory,
)

__all__ = ["Rprop", "rprop"]

_MESSAGE = "Invalid eta values: {values[0]}, {values[1]}"
Etas = Annotated[Pair, Numeric(items=(Numeric(above=0, below=1, message=_MESSAGE), Numeric(above=1, message=_MESSAGE)))]


class Slots(NamedTuple):
    """Kept for each parameter; each of its shape and dtype."""

    prev: Moment  # the last gradient; 0 where its sign had turned
    step_size: Weights  # eta: how far each element moves


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    eta_minus: Any
    eta_plus: Any
    smallest: Any
    largest: Any


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """Steps of the learning rate, in both parts of a complex parameter; it is used nowhere else."""
    size = jnp.full_like(param.real, hyper.lr)
    return Slots(
        prev=jnp.zeros_like(param),
        step_size=jax.lax.complex(size, size) if jnp.iscomplexobj(param) else size,
    )


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """The two pairs."""
    return Scalars(*hyper.etas, *hyper.step_sizes)


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step."""
    turn = sign(grad) * sign(slots.prev)  # not the sign of the product, which may underflow
    factor = jnp.where(turn > 0, scalars.eta_plus, jnp.where(turn < 0, scalars.eta_minus, 1))
    # What depends on one array alone, as a clipped one does, XLA computes again wherever it is used: old step size and
    # old gradient would be needed for longer, and so be copied.
    step_size = after(slots.step_size, jnp.clip(slots.step_size * factor, scalars.smallest, scalars.largest))
    grad = after(step_size, jnp.where(turn < 0, 0, grad))
    return param - step_size * sign(grad), Slots(grad, step_size)


def sign(x: Array) -> Array:
    """-1, 0 or 1; 0 for what is not a number, so that such a gradient leaves its element alone."""
    return jnp.where(jnp.isnan(x), 0, jnp.sign(x))


class Rprop(Optimizer):
    """Resilient backpropagation, as ``torch.optim.Rprop``. It needs gradients of all data, not of batches.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: size of the first step, at least 0. It is read once, when the state is made: at a parameter's first gradient,
        or by ``init`` of the functional core.
      etas: what a step size is multiplied by where the gradient's sign has turned, in (0, 1), and where it has not,
        above 1.
      step_sizes: the smallest and the largest step.
      maximize: ascend instead of descend.
      capturable, foreach, differentiable: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.Rprop({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    >>> for gradient in ([3.0, 3.0], [1.0, -1.0]):
    ...     optimizer.step({"w": jnp.array(gradient)})
    >>> print(optimizer.params["w"].round(2))
    [0.78 1.9 ]

    As a pure function, :func:`optimjax.functional.rprop`:

    >>> rprop = optim.functional.rprop(lr=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> params, state = rprop.update(params, jnp.array([3.0, 0.0]), rprop.init(params))
    >>> print(params, state.step, state.step_size)
    [0.9 2. ] 1 [0.1 0.1]
    """

    rule = Rule(Slots, init, scalars, update)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        etas: Etas = (0.5, 1.2),
        step_sizes: Pair = (1e-6, 50),
        *,
        capturable: Capturable = False,
        foreach: Foreach = None,
        maximize: Flag = False,
        differentiable: Differentiable = False,
        **options: Unpack[Options],
    ):
        defaults = dict(
            lr=lr,
            etas=etas,
            step_sizes=step_sizes,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        super().__init__(params, defaults, **options)


rprop = factory(Rprop)
