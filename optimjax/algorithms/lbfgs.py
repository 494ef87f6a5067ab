r"""L-BFGS: quasi-Newton steps along a direction made from the last differences of parameters and gradients.

One call of ``step`` is up to ``max_iter`` iterations. With all parameters side by side in one vector
:math:`\theta`, gradient :math:`g_k` and history of pairs :math:`(s_i, y_i)`, iteration :math:`k` is

.. math::
    s &\leftarrow t_{k-1} d_{k-1}, \qquad y \leftarrow g_k - g_{k-1} \\
    \text{if } y^\top s > 10^{-10} &: \text{ store } (s, y),\ \rho = 1 / y^\top s,\
        \text{drop the oldest pair};\ \eta \leftarrow y^\top s / y^\top y \\
    d_k &\leftarrow -H_k g_k \ \text{, by the two-loop recursion:} \\
    q &\leftarrow -g_k; \quad \text{newest to oldest: } \alpha_i \leftarrow \rho_i s_i^\top q,\
        q \leftarrow q - \alpha_i y_i \\
    r &\leftarrow \eta q; \quad \text{oldest to newest: } \beta \leftarrow \rho_i y_i^\top r,\
        r \leftarrow r + (\alpha_i - \beta) s_i; \qquad d_k \leftarrow r \\
    t_k &\leftarrow \gamma \ \text{, at the very first iteration } \gamma \min(1, 1 / \lVert g \rVert_1) \\
    \theta_{k+1} &\leftarrow \theta_k + t_k d_k

with learning rate :math:`\gamma`. With a line search, described in :mod:`~optimjax.algorithms.parts.line_search`,
:math:`t_k` is what it finds from there. A call ends when the directional derivative is above ``-tolerance_change``
(before the parameters move), after ``max_iter`` iterations or ``max_eval`` evaluations, when no element of the gradient
is larger than ``tolerance_grad``, or when neither the step nor the loss has changed by more than ``tolerance_change``.

All iterations with their line searches are one compiled program, which contains the loss twice: at the beginning and
in the loop. The history takes ``2 * history_size`` vectors from the start, because a program has arrays of one shape;
it is updated in place. Parameters that are distributed over a mesh stay so; only inside a ``jax.jit`` of one's own,
over automatic axes, the compiler decides, unless ``out_shardings`` does. Over explicit axes the vectors are whole on
each device.

Source: Liu, Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical Programming 45
(1989).

Differs from PyTorch:

1. A loss or slope that is not finite ends the line search with the best point that it has, at worst where it began.
   PyTorch goes on with NaN: its parameters are lost, or it raises ``IndexError``.
2. Making ``history_size`` smaller in a running optimizer drops the oldest pairs; in PyTorch the history then grows
   without end. ``history_size=0`` is refused at once, not at the second iteration.
3. What PyTorch refuses at the first step, an unknown ``line_search_fn`` or a second group, is refused when it is given.
4. In half precision the vectors are float32.

Differs from optax:

1. One call is up to ``max_iter`` iterations that evaluate the loss themselves; ``optax.lbfgs`` does one, and is handed
   value and gradient.
2. Without ``line_search_fn`` the step has the length ``lr``; optax always searches, unless told not to.
3. Pairs that would make the direction no descent are left out; optax stores every pair.
4. The history has 100 pairs, in optax 10.
"""

from __future__ import annotations  # signatures then show `LearningRate`, not what it stands for

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from optimjax._core.algorithm import Algorithm, Params, arguments_of, check_order, check_overrides, factory
from optimjax._core.definition import names_of_others
from optimjax._core.reading import as_count, slot_array
from optimjax._core.states import registered
from optimjax._core.tree import check_gradient, flatten_params, match, names
from optimjax._engine.handover import Call, Launch, kinds
from optimjax._engine.interned import interned
from optimjax._engine.loss import Packed, evaluate, packed, unpacked
from optimjax._engine.loss_call import CallStructure, LossArguments
from optimjax._engine.loss_function import takes_no_arguments
from optimjax._engine.plan import distinct
from optimjax._engine.state import ParameterState
from optimjax._facade.state_dict import Reader, unknown_entry
from optimjax._params.parameter import Parameter
from optimjax._storage.placement import pin, pinned
from optimjax.algorithms.parts.line_search import Point, strong_wolfe
from optimjax.algorithms.parts.vector import Layout, dot, largest
from optimjax.optimizer import Optimizer
from optimjax.rule import LearningRate, Number, Numeric, Structural, one_of

__all__ = ["LBFGS", "lbfgs"]

CURVATURE = 1e-10  # a pair is stored where y · s is larger

# PyTorch's entries of the state of the first parameter, in its order.
COUNTS = ("func_evals", "n_iter")
HISTORY = ("old_dirs", "old_stps", "ro")
VECTORS = ("d", "old_dirs", "old_stps", "prev_flat_grad")
ENTRIES = (*COUNTS, "d", "t", *HISTORY, "H_diag", "prev_flat_grad", "prev_loss")
SCRATCH = "al"  # what PyTorch keeps there, too, and overwrites


@registered
class LBFGSState(NamedTuple):
    """What one call hands to the next. ``n`` is the number of elements of all parameters, ``m`` the history size."""

    step: Array  # [] int32, calls done; schedules are evaluated at it
    func_evals: Array  # [] int32, evaluations of the loss
    n_iter: Array  # [] int32, iterations
    d: Array  # [n], the last direction
    t: Array  # [], the step length along it
    old_dirs: Array  # [m, n], differences of gradients y; pair number i is in row i % m
    old_stps: Array  # [m, n], differences of parameters s
    ro: Array  # [m], 1 / (y · s)
    stored: Array  # [] int32, pairs stored since the first iteration; the last m of them are there
    H_diag: Array  # [], scale of the first guess of the inverse Hessian
    prev_flat_grad: Array  # [n], the gradient that the last direction was made from
    prev_loss: Array  # [], the loss there


class Scalars(NamedTuple):
    """The numeric hyperparameters."""

    lr: Any
    max_iter: Any
    max_eval: Any
    tolerance_grad: Any
    tolerance_change: Any


# --- The algorithm ----------------------------------------------------------------------------------------------------


def init(layout: Layout, history_size: int) -> LBFGSState:
    """Before the first call. Each array is one of its own, so that a step may update all of them in place."""

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, layout.dtype)

    def count() -> Array:
        return jnp.zeros((), jnp.int32)

    n, m = layout.size, history_size
    return LBFGSState(
        step=count(),
        func_evals=count(),
        n_iter=count(),
        d=zeros(n),
        t=zeros(),
        old_dirs=zeros(m, n),
        old_stps=zeros(m, n),
        ro=zeros(m),
        stored=count(),
        H_diag=jnp.ones((), layout.dtype),
        prev_flat_grad=zeros(n),
        prev_loss=zeros(),
    )


class Iteration(NamedTuple):
    """What one iteration hands to the next."""

    state: LBFGSState
    x: Array  # [n], the parameters
    loss: Array  # [], there
    grad: Array  # [n], there
    aux: Any
    n_iter: Array  # [] int32, of this call
    evaluations: Array  # [] int32, of this call
    done: Array  # [] bool


def minimize(
    evaluate: Callable[[Array, Any], tuple[Array, Array, Any]],
    round_off: Callable[[Array], Array],
    line_search_fn: str | None,
    state: LBFGSState,
    x: Array,
    loss: Array,
    grad: Array,
    aux: Any,
    scalars: Scalars,
) -> tuple[LBFGSState, Array, Any]:
    """One call of ``step``.

    Args:
      evaluate: ``evaluate(x, aux) -> (loss, gradient, aux)``, the gradient a vector.
      round_off: gives a vector of parameters the precision that the parameters have.
      line_search_fn: ``"strong_wolfe"`` or ``None``.
      state: what the last call has left.
      x: the parameters.
      loss: at ``x``.
      grad: at ``x``.
      aux: what evaluations hand on to each other, any pytree; that of the evaluation at ``x``.
      scalars: the hyperparameters.

    Returns:
      The new state and parameters, and ``aux`` of the last evaluation.
    """
    scalars = Scalars(*[jnp.asarray(scalar, x.dtype) for scalar in scalars])
    max_iter, max_eval = whole(scalars.max_iter), whole(scalars.max_eval)

    def no_gradient(grad: Array) -> Array:
        return largest(grad) <= scalars.tolerance_grad

    def iterate(last: Iteration) -> Iteration:
        state = with_direction(last.state, last.grad, last.loss)
        n_iter, d = last.n_iter + 1, state.d
        t = jnp.where(state.n_iter == 1, jnp.minimum(1, 1 / jnp.sum(jnp.abs(last.grad))), 1) * scalars.lr
        start = Point(jnp.zeros_like(t), last.loss, dot(last.grad, d), last.grad)
        flat = start.slope > -scalars.tolerance_change

        def moved(t: Array) -> Array:
            return round_off(last.x + t * d)

        def trial(t: Array, aux: Any) -> tuple[Point, Any]:
            loss, grad, aux = evaluate(moved(t), aux)
            return Point(t, loss.astype(t.dtype), dot(grad, d), grad), aux

        if line_search_fn is None:
            # After the last iteration not: with another batch in the next call it would be of no use.
            again = ~flat & (n_iter.astype(x.dtype) != scalars.max_iter)
            stay = lambda t, aux: (start._replace(t=t), aux)  # noqa: E731
            point, aux = jax.lax.cond(again, trial, stay, t, last.aux)
            evaluations, lost = again.astype(jnp.int32), False
        else:
            left = max_eval - last.evaluations
            point, evaluations, aux = strong_wolfe(
                trial, start, t, largest(d), last.aux, left, scalars.tolerance_change, skip=flat
            )
            point = point._replace(t=jnp.where(flat, t, point.t))
            lost = ~jnp.isfinite(point.slope)  # only where the start was not finite either
        total = last.evaluations + evaluations
        return Iteration(
            state=state._replace(t=point.t, func_evals=state.func_evals + evaluations),
            # Where nothing moves, a direction that is not finite must not matter.
            x=jnp.where(flat | (point.t == 0), last.x, moved(point.t)),
            loss=point.loss,
            grad=point.grad,
            aux=aux,
            n_iter=n_iter,
            evaluations=total,
            done=flat
            | lost
            | (total >= max_eval)
            | no_gradient(point.grad)
            | (largest(d * point.t) <= scalars.tolerance_change)
            | (jnp.abs(point.loss - last.loss) < scalars.tolerance_change),
        )

    start = Iteration(
        state=state._replace(step=state.step + 1, func_evals=state.func_evals + 1),
        x=x,
        loss=jnp.asarray(loss, x.dtype),
        grad=grad,
        aux=aux,
        n_iter=jnp.int32(0),
        evaluations=jnp.int32(1),
        done=no_gradient(grad),
    )
    end = jax.lax.while_loop(lambda it: ~it.done & (it.n_iter < max_iter), iterate, start)
    return end.state, end.x, end.aux


def whole(number: Array) -> Array:
    """A bound of counts as an integer: no count is between the two."""
    return jnp.ceil(jnp.clip(number, 0, 2**30)).astype(jnp.int32)


def with_direction(state: LBFGSState, grad: Array, loss: Array) -> LBFGSState:
    """The state with one more pair, where it is good enough, and the direction from here."""
    first, size = state.n_iter == 0, len(state.ro)
    y, s = grad - state.prev_flat_grad, state.d * state.t
    ys = dot(y, s)
    store = ~first & (ys > CURVATURE)
    row = state.stored % size
    stored = jnp.where(first, 0, state.stored + store.astype(jnp.int32))

    # Written as it was where nothing is stored: choosing between whole histories would copy them.
    def with_row(rows: Array, new: Array) -> Array:
        return rows.at[row].set(jnp.where(store, new, rows[row]))

    old_dirs, old_stps, ro = with_row(state.old_dirs, y), with_row(state.old_stps, s), with_row(state.ro, 1 / ys)
    scale = jnp.where(first, 1, jnp.where(store, ys / dot(y, y), state.H_diag))
    count = jnp.minimum(stored, size)

    def from_newest(back: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        q, al = carry
        i = (stored - 1 - back) % size
        a = dot(old_stps[i], q) * ro[i]
        return q - a * old_dirs[i], al.at[i].set(a)

    def from_oldest(age: Array, r: Array) -> Array:
        i = (stored - count + age) % size
        return r + (al[i] - dot(old_dirs[i], r) * ro[i]) * old_stps[i]

    q, al = jax.lax.fori_loop(0, count, from_newest, (-grad, jnp.zeros_like(ro)))
    d = jax.lax.fori_loop(0, count, from_oldest, q * scale)
    return state._replace(
        n_iter=state.n_iter + 1,
        d=d,
        old_dirs=old_dirs,
        old_stps=old_stps,
        ro=ro,
        stored=stored,
        H_diag=scale,
        prev_flat_grad=grad,
        prev_loss=loss,
    )


def gradient(layout: Layout, grads: Sequence[Array]) -> Array:
    """Gradients as one vector. PyTorch's gradient of a complex parameter is the conjugate of JAX's."""
    return layout.flatten(list(map(jnp.conj, grads)))


# --- The functional face ----------------------------------------------------------------------------------------------


class Minimizer(Algorithm):
    """LBFGS as pure functions; its ``update`` takes the loss function, too."""

    def __post_init__(self) -> None:
        self.hyperparameters.check(self.values)

    def init(self, params: Any) -> LBFGSState:
        """The state before the first update."""
        return init(Layout.of(flatten_params(params)[0]), self.values["history_size"])

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, grads: Any, state: LBFGSState, *, loss_fn: Callable[[Params], Array], **overrides: Any
    ) -> tuple[Params, LBFGSState]:
        """Up to ``max_iter`` iterations."""
        leaves, treedef = flatten_params(params)
        check_overrides(self.hyperparameters, overrides)
        values = {**self.values, **overrides}
        self.hyperparameters.check(values)
        layout, history_size = Layout.of(leaves), values["history_size"]
        check_order(grads, LBFGSState)
        if not isinstance(state, LBFGSState) or np.shape(state.old_dirs) != (history_size, layout.size):
            raise TypeError(
                "state must be the LBFGSState that init returns for these parameters and "
                f"history_size={history_size}, got {jax.tree.map(np.shape, state)}"
            )

        def evaluate(leaves: list[Array]) -> tuple[Array, Array]:
            loss, grads = jax.value_and_grad(lambda leaves: loss_fn(treedef.unflatten(leaves)))(leaves)
            return loss, gradient(layout, grads)

        if grads is None:
            loss, grad = evaluate(leaves)
        else:
            given = match(treedef, grads, lambda: names(params))
            for index, (leaf, one) in enumerate(zip(leaves, given, strict=True)):
                if one is not None:
                    check_gradient(lambda index=index: names(params)[index] or "params", leaf, one)
            given = [jnp.zeros_like(p) if g is None else jnp.asarray(g) for p, g in zip(leaves, given, strict=True)]
            loss, grad = loss_fn(params), gradient(layout, given)
        kinds: Any = self.hyperparameters.kinds
        scalars = Scalars(*[kinds[name].resolve(values[name], state.step) for name in Scalars._fields])
        state, x, _ = minimize(
            lambda x, _: (*evaluate(layout.unflatten(x)), None),
            layout.rounded, values["line_search_fn"], state, layout.flatten(leaves), loss, grad, None, scalars,
        )  # fmt: skip
        return treedef.unflatten(map(_placed_like, leaves, layout.unflatten(x))), state


# --- The facade -------------------------------------------------------------------------------------------------------


class Problem:
    """What is compiled into the program of a step. Equal ones are one object."""

    def __init__(
        self,
        structure: CallStructure,
        layout: Layout,
        history_size: int,
        line_search_fn: str | None,
        pins: tuple[Any, ...],
    ):
        self.structure, self.layout, self.line_search_fn, self.pins = structure, layout, line_search_fn, pins


def run(
    loss_fn: Callable[..., Any], problem: Problem, state: list[Array], params: Any, traced: Any, scalars: Scalars
) -> tuple[list[Array], list[Array], Array, Packed, list[Array]]:
    """One call in one program: ``(state, params, loss and aux at the beginning, what has changed in modules)``."""
    layout = problem.layout
    # What the loss changes in a module, batch statistics or random state, goes from each evaluation to the next.
    changing = problem.structure.changing
    # Compiled by itself, so that the loss is traced once for both of the places that it stands in.
    differentiated = jax.jit(functools.partial(evaluate, loss_fn, problem.structure))

    def at(params: list[Array], changed: list[Array]) -> tuple[Array, Any, Array, list[Array]]:
        arrays = list(traced)
        for index, array in zip(changing, changed, strict=True):
            arrays[index] = array
        loss, aux, changed, _, grads = differentiated(params, arrays)
        return loss, aux, gradient(layout, grads), changed

    def evaluate_at(x: Array, changed: list[Array]) -> tuple[Array, Array, list[Array]]:
        loss, _, grad, changed = at(layout.unflatten(x), changed)
        return loss, grad, changed

    loss, aux, grad, changed = at(params, [traced[index] for index in changing])
    x = layout.flatten(params)
    new, x, changed = minimize(
        evaluate_at,
        layout.rounded, problem.line_search_fn, LBFGSState(*state), x, loss, grad, changed, scalars,
    )  # fmt: skip
    return pinned(list(new), list(problem.pins)), layout.unflatten(x), loss, packed(aux), changed


STATE, PARAMS = 1, 2  # positions of its arguments, without the loss function, that may be updated in place


@dataclass(frozen=True, eq=False)
class Kept:
    """The state between two steps, for as long as nobody has looked at it."""

    state: LBFGSState

    def names(self) -> tuple[str, ...]:
        """The names of the entries."""
        return ENTRIES

    def entries(self) -> dict[str, Any]:
        """As PyTorch's state has it: counts as numbers, the history as lists, the oldest first."""
        state = self.state
        entries: dict[str, Any] = {"func_evals": int(state.func_evals), "n_iter": int(state.n_iter)}
        if entries["n_iter"]:
            stored, size = int(state.stored), len(state.ro)
            rows = [jnp.int32(pair % size) for pair in range(max(stored - size, 0), stored)]  # traced: compiled once
            entries |= {
                "d": state.d,
                "t": float(state.t),
                "old_dirs": [state.old_dirs[row] for row in rows],
                "old_stps": [state.old_stps[row] for row in rows],
                "ro": [state.ro[row] for row in rows],
                "H_diag": state.H_diag,
                "prev_flat_grad": state.prev_flat_grad,
                "prev_loss": float(state.prev_loss),
            }
        return entries

    def left(self) -> list[Any]:
        """Nothing has to be set once the entries are the state."""
        return []


def from_entries(entries: Mapping[str, Any], layout: Layout, history_size: int) -> LBFGSState:
    """The state, in arrays of its own, from PyTorch's entries; of a longer history the newest pairs."""
    counts = {name: jnp.int32(int(entries.get(name, 0))) for name in COUNTS}
    state = init(layout, history_size)._replace(**counts)
    if "d" not in entries:
        return state
    arrays = {
        name: jnp.array(entries[name], layout.dtype, copy=True) for name in ENTRIES if name not in (*COUNTS, *HISTORY)
    }
    history = {name: entries[name][-history_size:] for name in HISTORY}
    stored = len(history["ro"])
    for name, rows in history.items():
        missing = [getattr(state, name)[0]] * (history_size - stored)
        arrays[name] = jnp.stack([*(jnp.asarray(row, layout.dtype) for row in rows), *missing])
    return state._replace(**arrays, stored=jnp.int32(stored))


def spread(state: LBFGSState, param: Array) -> LBFGSState:
    """The state over the mesh that parameters are on, where its axes are automatic; vectors in parts if they divide."""
    sharding = pin(param)
    if sharding is None:
        return state
    mesh = sharding.mesh

    def placed(array: Array) -> Array:
        parts = array.ndim and array.shape[-1] % mesh.size == 0
        spec = PartitionSpec(*[None] * (array.ndim - 1), mesh.axis_names) if parts else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return LBFGSState(*map(placed, state))


def _placed_like(old: Array, new: Array) -> Array:
    """The new value where the old one was: the compiler, which has seen one vector, may have spread it otherwise."""
    before, after = (getattr(array, "sharding", None) for array in (old, new))  # tracers have none
    if before is None or after is None or after.is_equivalent_to(before, new.ndim):
        return new
    # From one device it has followed what the loss uses.
    return new if isinstance(before, jax.sharding.SingleDeviceSharding) else jax.device_put(new, before)


def _positive_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid {name}: {value!r}")


LineSearch = Annotated[
    str | None,
    one_of(None, "strong_wolfe", message="only 'strong_wolfe' is supported, got {value!r}", error=RuntimeError),
]


class LBFGS(Optimizer):
    """L-BFGS, as ``torch.optim.LBFGS``.

    All parameters form one group, and ``step`` takes a loss function only: it evaluates the loss many times.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      lr: step length, with a line search its first trial; at least 0.
      max_iter: most iterations of one step.
      max_eval: most evaluations of the loss in one step, after which no iteration begins; ``max_iter * 5 // 4`` unless
        given.
      tolerance_grad: a step ends where no element of the gradient is larger.
      tolerance_change: a step ends where the loss, or every parameter, has changed by no more.
      history_size: how many pairs of differences are kept, each as large as all parameters twice; at least 1.
      line_search_fn: ``"strong_wolfe"``, or ``None`` for steps of length ``lr``.

    Raises:
      ValueError: a hyperparameter is out of range; a second group.
      RuntimeError: an unknown ``line_search_fn``.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> def rosenbrock(params):
    ...     x, y = params
    ...     return (1 - x) ** 2 + 100 * (y - x**2) ** 2
    >>> optimizer = optim.LBFGS([jnp.array(-1.5), jnp.array(2.0)], line_search_fn="strong_wolfe")
    >>> for _ in range(3):
    ...     loss = optimizer.step(rosenbrock)
    >>> x, y = optimizer.params
    >>> print(f"{loss:.4f} {x:.2f} {y:.2f}")
    0.0000 1.00 1.00

    As a pure function, :func:`optimjax.functional.lbfgs`:

    >>> lbfgs = optim.functional.lbfgs(line_search_fn="strong_wolfe", max_iter=100)
    >>> start = jnp.array([-1.5, 2.0])
    >>> params, state = lbfgs.update(start, None, lbfgs.init(start), loss_fn=rosenbrock)
    >>> print(params.round(2), state.n_iter < 50)
    [1. 1.] True
    """

    joint_state = True
    options_refused = "its line search needs the gradient of the loss itself; clip within the loss"
    slot_names = (*ENTRIES, SCRATCH)

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1,
        max_iter: Number = 20,
        max_eval: Annotated[Any, Numeric()] = None,
        tolerance_grad: Number = 1e-7,
        tolerance_change: Number = 1e-9,
        history_size: Annotated[int, Structural(_positive_integer)] = 100,
        line_search_fn: LineSearch = None,
    ):
        if max_eval is None:
            Numeric().check("max_iter", max_iter)
            most: Any = max_iter
            max_eval = (lambda count: most(count) * 5 // 4) if callable(max_iter) else most * 5 // 4
        defaults = dict(
            lr=lr,
            max_iter=max_iter,
            max_eval=max_eval,
            tolerance_grad=tolerance_grad,
            tolerance_change=tolerance_change,
            history_size=history_size,
            line_search_fn=line_search_fn,
        )
        super().__init__(params, defaults)

    @classmethod
    def _algorithm(cls, values: Mapping[str, Any]) -> Algorithm:
        return Minimizer(cls.definition, values)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group of parameters; the constructor does so.

        Raises:
          ValueError: there is one already.
        """
        if self.param_groups:
            raise ValueError("LBFGS doesn't support per-parameter options (parameter groups)")
        super().add_param_group(param_group)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        loss_fn: Any = None,
        *args: Any,
        closure: Any = None,
        has_aux: bool = False,
        micro_batches: int = 1,
        **kwargs: Any,
    ) -> Any:
        """Up to ``max_iter`` iterations, in one compiled program.

        Args:
          loss_fn: returns a real scalar; called as by :meth:`optimjax.Optimizer.backward`, except that what it writes
            into an ``nnx.Param`` is not kept: the line search sets the parameters.
          args: its further arguments.
          closure: another name for ``loss_fn``.
          has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
          micro_batches: into how many parts each evaluation divides the arrays among the arguments.
          kwargs: further arguments of ``loss_fn``, by name.

        Returns:
          The loss at the beginning, as in PyTorch; with ``has_aux`` ``(loss, aux)``, both of the beginning.

        Raises:
          TypeError: no loss function, or PyTorch's closure, which takes no arguments. The loss is evaluated at points
            of the optimizer's choice, so that gradients alone will not do.
        """
        loss_fn = loss_fn if closure is None else closure
        if not callable(loss_fn) or self._are_gradients(loss_fn):
            raise TypeError(
                "LBFGS evaluates the loss itself: it takes step(loss_fn, *args), neither step() nor step(grads); got "
                f"{type(loss_fn).__name__}: {loss_fn!r}"
            )
        given = LossArguments(args, kwargs, has_aux, micro_batches)
        losses = self._stepper.losses
        if not args and not kwargs and losses.find(loss_fn) is None and takes_no_arguments(loss_fn):
            name = getattr(loss_fn, "__name__", "closure")
            raise TypeError(
                f"LBFGS evaluates the loss many times inside one compiled program, so {name}() must not call backward "
                f"itself: write a function of the model that returns the loss, def {name}(model, x, y), and call "
                f"optimizer.step({name}, x, y)"
            )
        self._check_trace()
        loss_function = losses(loss_fn)
        program = loss_function.program(run, static=1)
        first = self._parameters()[0]

        def plan() -> Launch:
            (group,) = self.param_groups
            self.definition.hyperparameters.check_structural(group)
            hyper, _ = self._stepper.planner.resolved(self.param_groups, 0)
            call = self._stepper.call_of(self.param_groups, self._handed, loss_function, given)
            layout = self._layout_of(call.parameters)
            size = group["history_size"]
            state = self._present(layout, size)
            pins = tuple(map(pin, state))
            problem = interned(Problem, call.structure, layout, size, group["line_search_fn"], pins)
            params = distinct(call.differentiated, call.traced) if self.donate else call.differentiated

            def commit(results: list[Any]) -> list[tuple[Any, str, Any]]:
                ((state, params, _, _, changed),) = results
                call.write_back(changed)
                for parameter, param in zip(call.parameters, params, strict=True):
                    parameter._write(_placed_like(parameter.value, param))
                entry = self.state[first] = ParameterState.of(self.state.get(first, {}))
                return entry.moved(Kept(LBFGSState(*state)), self._stepper.handover)

            scalars = Scalars(*[getattr(hyper, name) for name in Scalars._fields])
            arguments = problem, list(state), params, call.traced, scalars
            donated = (STATE, PARAMS) if self.donate else (STATE,)
            return Launch(program, donated, [Call((problem, *kinds(call.traced)), arguments)], commit)

        ((_, _, loss, aux, _),) = self._stepper.handover.launch(plan)
        return (loss, unpacked(aux)) if has_aux else loss

    def _layout_of(self, moving: Sequence[Parameter]) -> Layout:
        parameters = self._parameters()
        position = {parameter: index for index, parameter in enumerate(parameters)}
        return Layout.of([parameter.value for parameter in parameters], [position[parameter] for parameter in moving])

    def _present(self, layout: Layout, history_size: int) -> LBFGSState:
        """The state that a step may update in place: that of the last one, or a new one of what somebody has seen."""
        first = self._parameters()[0]
        entry = ParameterState.of(self.state.get(first, {}))
        kept = entry.place.state if isinstance(entry.place, Kept) else None
        if kept is not None and (kept.ro.shape, kept.d.shape) == ((history_size,), (layout.size,)):
            return kept
        state = from_entries(self._checked(first, dict(entry), "state") if entry else {}, layout, history_size)
        return spread(state, first.value)

    def _reader(self, group: Mapping[str, Any], where: str) -> Reader:
        super()._reader(group, where)  # checks the group

        def entries_of(parameter: Parameter, saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
            return self._checked(parameter, unknown_entry(parameter, dict(saved)))

        return entries_of

    def _checked(self, parameter: Parameter, entries: dict[str, Any], what: str = "loaded state") -> dict[str, Any]:
        """The entries of a parameter, loaded or edited by hand, as they must be; or ``ValueError``."""
        where = f"{what} of parameter {str(parameter)!r}"
        if parameter is not self._parameters()[0]:
            raise ValueError(f"{where}: LBFGS keeps the state of all parameters with the first one")
        own = {name: value for name, value in entries.items() if name not in self.slot_names}
        strange = [name for name in own if name in names_of_others(self.definition)]
        if strange:
            raise ValueError(f"{where} has {strange[0]!r}, which {type(self).__name__} does not keep")
        entries = {name: entries[name] for name in ENTRIES if entries.get(name) is not None}
        if not entries:
            return own
        wanted = ENTRIES if entries.keys() - COUNTS else COUNTS  # before the first iteration there are only counts
        absent = [name for name in wanted if name not in entries]
        if absent:
            raise ValueError(f"{where} lacks {absent}")
        layout = self._layout_of(())
        checked: dict[str, Any] = {name: as_count(entries[name], f"{where}: {name!r}") for name in COUNTS}
        lengths = set()
        for name in wanted[len(COUNTS) :]:
            values = entries[name] if name in HISTORY else [entries[name]]
            if not isinstance(values, (list, tuple)):
                raise ValueError(f"{where}: {name!r} must be a list of arrays, got {type(values).__name__}")
            arrays = [slot_array(value, layout.dtype, f"{where}: {name!r}") for value in values]
            expected = (layout.size,) if name in VECTORS else ()
            for array in arrays:
                if array.shape != expected:
                    raise ValueError(f"{where}: {name!r} has shape {array.shape}, expected {expected}")
            numbers = [v if isinstance(v, (int, float)) else array for v, array in zip(values, arrays, strict=True)]
            lengths |= {len(numbers)} if name in HISTORY else set()
            checked[name] = numbers if name in HISTORY else numbers[0]
        if len(lengths) > 1:
            raise ValueError(f"{where}: {', '.join(HISTORY)} must be of one length, got {sorted(lengths)}")
        return checked | own


lbfgs = factory(LBFGS)
lbfgs.__doc__ = """A pure :class:`optimjax.functional.Algorithm` with the arithmetic and the keywords of :class:`LBFGS`.

``update(params, grads, state, *, loss_fn)`` is one call of PyTorch's ``step``: up to ``max_iter`` iterations, which
evaluate ``loss_fn(params)``, a real scalar. ``grads`` are the gradients at ``params`` where they are known (``None`` in
place of one counts as zero), else ``None``.

Each number may also be an array, a tracer or a schedule ``count -> value`` of the calls done. The state holds one
vector for all parameters. Compile it, or the loops are compiled at each call:
``jax.jit(lambda params, state: algorithm.update(params, None, state, loss_fn=loss_fn))``.
"""
lbfgs.__doc__ += arguments_of(LBFGS)
