r"""AdamW: Adam whose weight decay shrinks the parameter instead of entering the moments.

.. math::
    \theta_{t-1} &\leftarrow (1 - \gamma \lambda)\, \theta_{t-1} \\
    \theta_t &\leftarrow \text{the step of Adam without weight decay}

with learning rate :math:`\gamma`, weight decay :math:`\lambda`. All equations, and the arithmetic, are with
:class:`optimjax.Adam`.

Source: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019 (arXiv:1711.05101). As in PyTorch,
and unlike the paper, the decay is scaled by the learning rate.

Differs from PyTorch: as Adam.

Differs from optax:

1. The default of ``weight_decay`` is 1e-2; in ``optax.adamw`` it is 1e-4.
2. ``amsgrad``, which ``optax.adamw`` does not have.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

from typing import Any, Unpack

from optimjax.algorithms.adam import Adam
from optimjax.rule import (
    BetasAlike,
    Capturable,
    Decay,
    Differentiable,
    Epsilon,
    Flag,
    Foreach,
    Fused,
    LearningRate,
    Options,
    factory,
)

__all__ = ["AdamW", "adamw"]


class AdamW(Adam):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: learning rate, at least 0.
      betas: shares of the running means of gradient and squared gradient that are kept; each in [0, 1).
      eps: added to the root of the second moment, after bias correction; at least 0.
      weight_decay: each step shrinks the parameter by the factor ``1 - lr * weight_decay``; at least 0.
      amsgrad: divide by the largest second moment so far.
      maximize: ascend instead of descend; the decay shrinks all the same.
      foreach, capturable, differentiable, fused: accepted and kept; the compiled step is already what they ask for.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> optimizer = optim.AdamW({"w": jnp.array([1.0, 2.0])}, lr=0.1, weight_decay=2.5)
    >>> optimizer.step({"w": jnp.array([4.0, -0.01])})
    >>> print(jnp.round(optimizer.params["w"] * 100))
    [ 65. 160.]
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: BetasAlike = (0.9, 0.999),
        eps: Epsilon = 1e-8,
        weight_decay: Decay = 1e-2,
        amsgrad: Flag = False,
        *,
        maximize: Flag = False,
        foreach: Foreach = None,
        capturable: Capturable = False,
        differentiable: Differentiable = False,
        fused: Fused = None,
        **options: Unpack[Options],
    ):
        self._check_options(options)  # among which its own decay must not be
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )


adamw = factory(AdamW)
