"""optax, both ways: an algorithm as an optax transformation, and a transformation as an algorithm or an optimizer.

The page "Coming from optax" shows them at work. optax itself is imported when one of these is called.
"""

from typing import Any

from optimjax._core.algorithm import Algorithm
from optimjax.interop._optax_facade import FromOptax
from optimjax.interop._optax_from import Transformed
from optimjax.interop._optax_package import optax, transformation
from optimjax.interop._optax_to import Transformation

__all__ = ["FromOptax", "from_optax", "to_optax"]


def to_optax(algorithm: Algorithm) -> Any:
    """An algorithm as an optax transformation, for ``nnx.Optimizer``, Linen's ``TrainState``, ``optax.chain``, ...

    The state has the fields ``hyperparams`` and ``inner_state``. ``state.hyperparams["lr"]`` can be read and replaced
    between updates, without compiling again, as with ``optax.inject_hyperparams``; so can every number, but for a plain
    zero that leaves out a part of the algorithm with its arrays (``momentum=0``). A schedule stays one, evaluated at
    the count of updates; in its place the state shows the value of the last update, and what is written there has no
    effect. What is compiled in (``nesterov=True``) stays as it is. The state of a partition has the numbers of each
    label.

    ``update(grads, state, params)`` needs the parameters. It returns the difference of new and old ones, in the wider
    dtype of parameter and gradient. Extra arguments that are numbers of the algorithm are taken for this call
    (``lr=0.1``), and ``F.lbfgs`` takes ``value_fn``, as ``optax.lbfgs`` does; others are ignored.

    Args:
      algorithm: any of :mod:`optimjax.functional`, or ``optimizer.algorithm``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Of what :func:`from_optax` has made, the transformation that it was
      made from.

    Raises:
      TypeError: it is not an algorithm. In ``update``: LBFGS without ``value_fn``.
      ValueError: in ``update``: no parameters, or hyperparameters of other names.
      ImportError: optax is not installed.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optimjax import functional as F
    >>> from optimjax.interop.optax import to_optax
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), to_optax(F.sgd(lr=0.5)))
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> state = tx.init(params)
    >>> update = jax.jit(tx.update)
    >>> updates, state = update(params, state, params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [2.7 3.6]
    >>> state[1].hyperparams["lr"] = 0.0
    >>> updates, state = update(params, state, params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [3. 4.]
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"to_optax takes an algorithm of optim.functional, or optimizer.algorithm, got {algorithm!r}")
    made = optax().GradientTransformationExtraArgs
    if isinstance(algorithm, Transformed) and algorithm == from_optax(algorithm.tx):
        return made(*optax().with_extra_args_support(algorithm.tx))
    both = Transformation(algorithm)
    return made(both.init, both.update)


def from_optax(tx: Any, lr: Any = 1.0) -> Algorithm:
    """An optax transformation as an algorithm of the functional core.

    Its state has ``step``, the number of updates, and ``tx``, the state of optax.
    ``update(params, grads, state, **extra)`` hands extra arguments to the transformation, and returns the new
    parameters themselves.

    Args:
      tx: any transformation, or ``optax.MultiSteps``.
      lr: what its updates are multiplied by; a number, an array, a schedule or a prefix tree of these. It comes on top
        of the transformation's own rate.

    Returns:
      The algorithm. Of what :func:`to_optax` has made, that which it was made from, if ``lr`` is 1.

    Raises:
      TypeError: ``tx`` is not a transformation. In ``update``: an extra argument for a transformation without any.
      ValueError: ``lr`` is negative. In ``update``: a gradient is ``None``, which optax does not know.
      ImportError: optax is not installed.

    >>> import jax.numpy as jnp, optax
    >>> from optimjax.interop.optax import from_optax
    >>> lion = from_optax(optax.lion(0.1, weight_decay=0.0))
    >>> params = {"w": jnp.array([1.0, -1.0])}
    >>> params, state = lion.update(params, params, lion.init(params))
    >>> print(params["w"], state.step, state.tx[0].mu["w"])
    [ 0.9 -0.9] 1 [ 0.01 -0.01]
    """
    tx = transformation(tx)
    ours = getattr(tx.init, "__self__", None)
    if isinstance(ours, Transformation) and isinstance(lr, (int, float)) and lr == 1:
        return ours.algorithm
    return Transformed(FromOptax.definition, {"tx": tx, "lr": lr})
