r"""SparseAdam: Adam of the entries that a sparse gradient names; all others, and their moments, stay as they are.

.. math::
    m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
    v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
    \theta_t &\leftarrow \theta_{t-1} - \frac{\gamma \sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\,
        \frac{m_t}{\sqrt{v_t} + \epsilon}

with learning rate :math:`\gamma`. Everything is of the named entries, except that :math:`t` counts the updates of the
whole parameter. An entry that is named with a zero gradient takes part: its moments decay, and it moves.

Source: PyTorch; Adam is of Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015 (arXiv:1412.6980).

Differs from PyTorch:

1. Indices beyond the end are ignored, as JAX pads sparse arrays with them, and negative ones count from the end;
   PyTorch refuses both where the gradient is made.
2. Half precision computes in float32, so that a zero gradient does not give NaN although epsilon is zero in float16.
3. Complex parameters are refused in :meth:`~optimjax.Optimizer.add_param_group`, too.

Differs from optax: optax has no sparse optimizer.
"""

from __future__ import annotations  # signatures then show `PositiveRate`, not what it stands for

from typing import Annotated, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from optimjax._core.sparse import is_sparse
from optimjax.optimizer import Optimizer
from optimjax.rule import (
    Betas,
    Epsilon,
    Flag,
    Flags,
    Hyper,
    LearningRate,
    Moment,
    Numeric,
    Options,
    Rule,
    Square,
    bias_correction,
    factory,
    sqrt,
)

__all__ = ["SparseAdam", "sparse_adam"]

PositiveRate = Annotated[LearningRate, Numeric(above=0, message="Invalid learning rate: {value}")]
PositiveEpsilon = Annotated[Epsilon, Numeric(above=0, message="Invalid epsilon value: {value}")]


class Slots(NamedTuple):
    """Kept for each parameter; each dense, of its shape and dtype."""

    exp_avg: Moment  # m: running mean of the gradients
    exp_avg_sq: Square  # v: running mean of their squares


class Scalars(NamedTuple):
    """What the step and the hyperparameters alone decide."""

    beta1: Any
    one_minus_beta1: Any  # stored separately: 1 - 0.999 in float32 keeps only four digits
    beta2: Any
    one_minus_beta2: Any
    step_size: Any  # lr times the root of the second bias correction, over the first
    eps: Any


def check_param(param: Array, flags: Flags) -> None:
    """PyTorch's condition."""
    if jnp.iscomplexobj(param):
        raise ValueError("SparseAdam does not support complex parameters")


def init(param: Array, hyper: Hyper, flags: Flags) -> Slots:
    """All zeros."""
    return Slots(exp_avg=jnp.zeros_like(param), exp_avg_sq=jnp.zeros_like(param))


def scalars(step: Any, hyper: Hyper) -> Scalars:
    """Bias corrections are in the step size."""
    beta1, beta2 = hyper.betas
    return Scalars(
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=hyper.lr * bias_correction(beta2, step) ** 0.5 / bias_correction(beta1, step),
        eps=hyper.eps,
    )


def update(param: Array, grad: Array, slots: Slots, scalars: Scalars, flags: Flags) -> tuple[Array, Slots]:
    """One step of the entries that the gradient names."""
    exp_avg = scalars.beta1 * slots.exp_avg + scalars.one_minus_beta1 * grad
    exp_avg_sq = scalars.beta2 * slots.exp_avg_sq + scalars.one_minus_beta2 * grad * grad
    return param - scalars.step_size * (exp_avg / (sqrt(exp_avg_sq) + scalars.eps)), Slots(exp_avg, exp_avg_sq)


class SparseAdam(Optimizer):
    """Adam for sparse gradients, as ``torch.optim.SparseAdam``: its cost grows with the rows touched, not the table.

    A gradient is a ``jax.experimental.sparse.BCOO`` with the parameter's shape and ``n_batch=0``. Its sparse axes name
    entries, for an embedding table its rows; ``n_sparse`` may be any number of the leading axes. Values of duplicates
    are summed, indices beyond the end are padding. A gradient with another number of indices (``nse``) compiles again.

    Differentiating by a whole table gives a dense gradient. Differentiate by the rows that were looked up instead:
    their gradients and the ids together are the sparse one, as below.

    Arrays are updated in place where their memory may be taken: in the functional core where ``jit`` donates
    parameters and state; in the class the state always, the parameters with ``optimizer.donate = True``. Where
    parameters are not donated, each step copies the table. On CPU, XLA converts a bfloat16 table as a whole for writing
    into it; float16 and float32 are written in place.

    Args:
      params: what to optimize, real; see :class:`optimjax.Optimizer`.
      lr: learning rate, larger than 0.
      betas: shares of the running means of gradient and squared gradient that are kept; each in [0, 1).
      eps: added to the root of the second moment, before bias correction; larger than 0.
      maximize: ascend instead of descend.
      options: ``max_grad_norm`` and ``skip_nonfinite``, see :class:`optimjax.Optimizer`.

    Raises:
      ValueError: a hyperparameter is out of range, a parameter is complex or sparse.
      RuntimeError: at the step, a gradient is dense.

    >>> import jax, jax.numpy as jnp, optimjax as optim
    >>> from jax.experimental.sparse import BCOO
    >>> def loss(rows):
    ...     return jnp.sum(rows**2)
    >>> def gradient(table, ids):
    ...     rows = table.at[ids].get(mode="fill", fill_value=0)  # zeros for padding
    ...     return BCOO((jax.grad(loss)(rows), ids[:, None]), shape=table.shape)
    >>> optimizer = optim.SparseAdam(jnp.ones((5, 2)), lr=0.5)
    >>> optimizer.donate = True
    >>> optimizer.step(gradient(optimizer.params, jnp.array([3, 1, 3])))
    >>> print(optimizer.params[:, 0].round(2))
    [1.  0.5 1.  0.5 1. ]

    As a pure function, :func:`optimjax.functional.sparse_adam`, all in one program. A batch of fewer ids is padded with
    the number of rows:

    >>> adam = optim.functional.sparse_adam(lr=0.5)
    >>> def step(table, state, ids):
    ...     return adam.update(table, gradient(table, ids), state)
    >>> step = jax.jit(step, donate_argnums=(0, 1))
    >>> table = jnp.ones((5, 2))
    >>> state = adam.init(table)
    >>> for ids in ([3, 1, 3], [4, 5, 5]):
    ...     table, state = step(table, state, jnp.array(ids))
    >>> print(table[:, 0].round(2), state.step)
    [1.   0.5  1.   0.5  0.63] 2
    """

    rule = Rule(Slots, init, scalars, update, check_param=check_param, sparse=True)

    def __init__(
        self,
        params: Any,
        lr: PositiveRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: PositiveEpsilon = 1e-8,
        maximize: Flag = False,
        **options: Unpack[Options],
    ):
        super().__init__(params, dict(lr=lr, eps=eps, betas=betas, maximize=maximize), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, none of which may be sparse; see :meth:`optimjax.Optimizer.add_param_group`."""
        leaves = jax.tree.leaves(param_group, is_leaf=is_sparse)
        sparse = [index for index, leaf in enumerate(leaves) if is_sparse(leaf)]
        if sparse:
            raise ValueError(f"Sparse params at indices {sparse}: SparseAdam requires dense parameter tensors")
        super().add_param_group(param_group)


sparse_adam = factory(SparseAdam)
