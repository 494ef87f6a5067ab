"""An optax transformation behind groups, schedulers, hooks and state dicts.

optax sees all parameters at once, in the structure that the user has given, and keeps one state for all of them. So its
state belongs to no parameter: the optimizer keeps it under a key of its own, flat, by the paths of its arrays.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optimjax._core.algorithm import Algorithm
from optimjax._core.containers import own_memory
from optimjax._core.definition import as_number, names_of_others
from optimjax._core.reading import as_count
from optimjax._core.sparse import is_sparse
from optimjax._core.tracing import holds_tracer
from optimjax._core.tree import check_gradient, copied_array, dotted
from optimjax._engine.handover import Call, Launch, kinds
from optimjax._engine.interned import interned
from optimjax._engine.loss import unpacked
from optimjax._engine.loss_call import LossArguments
from optimjax._engine.plan import distinct
from optimjax._engine.state import ParameterState
from optimjax._facade import functional_form
from optimjax._facade.state_dict import Reader, unknown_entry
from optimjax._params.handed import name_of
from optimjax._params.parameter import Parameter
from optimjax._storage.placement import pin, place
from optimjax.interop._optax_from import STATE, Transformed, check_extra, check_present, initial
from optimjax.interop._optax_package import transformation
from optimjax.interop._optax_step import (
    GIVEN_TO_UPDATE,
    GIVEN_TO_UPDATE_FROM_LOSS,
    Kept,
    Problem,
    by_gradients,
    paths_of,
    read,
    update_from_loss,
)
from optimjax.optimizer import Optimizer
from optimjax.rule import LearningRate

__all__ = ["FromOptax"]

KEY = "optax"  # of the optimizer's state


class FromOptax(Optimizer):
    """An optax transformation as an optimizer: groups, schedulers, hooks and state dicts around it.

    optax is given all parameters that train at once, in the structure that they were handed in: a tree, for a module
    what ``nnx.state`` returns, for groups a list. So masks and labels of the transformation are those of that
    structure, with ``None`` in place of frozen parameters.

    ``step(loss_fn, *args)`` also hands over the extra arguments ``value``, ``grad`` and ``value_fn``, which
    ``optax.lbfgs``, ``optax.polyak_sgd``, ``optax.contrib.momo`` and others want. Further ones go with gradients:
    ``step(grads, obj_fn=f)`` for ``optax.contrib.sophia``.

    The state of optax is one for all parameters. ``optimizer.state["optax"]`` has ``step``, the count of updates, and
    each array by its path in :meth:`functional_state`, to be read and replaced: with ``optax.inject_hyperparams``,
    ``optimizer.state["optax"]["tx.hyperparams.learning_rate"]`` is the rate. The numbers of a transformation are not
    among the options of groups, because it has them once for all.

    As in optax, every parameter must have a gradient. Parameters cannot be added, frozen or unfrozen once there is a
    state, because the state has their structure. A new rate compiles nothing, nor does a replaced array.

    ``copy.deepcopy`` copies such an optimizer. ``pickle`` can only if it can write the transformation, which consists
    of closures; save the state dict.

    Args:
      params: what to optimize; see :class:`optimjax.Optimizer`.
      tx: any transformation, or ``optax.MultiSteps``.
      lr: what the updates are multiplied by, at least 0: it comes on top of the transformation's own rate.

    Raises:
      TypeError: ``tx`` is not a transformation.
      ValueError: ``lr`` is negative.
      ImportError: optax is not installed.

    >>> import jax.numpy as jnp, optax, optimjax as optim
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    >>> optimizer = optim.FromOptax({"w": jnp.array([3.0, 4.0])}, tx)
    >>> scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    >>> for _ in range(2):
    ...     loss = optimizer.step(lambda params: 0.5 * jnp.sum(params["w"] ** 2))
    ...     scheduler.step()
    ...     print(loss, optimizer.params["w"])
    12.5 [2.7 3.6]
    10.125 [2.67 3.56]
    """

    options_refused = "a transformation brings its own, optax.clip_by_global_norm and optax.apply_if_finite"

    def __init__(self, params: Any, tx: Any, lr: LearningRate = 1.0):
        self._tx = transformation(tx)
        super().__init__(params, dict(lr=lr))

    def _begin(self) -> None:
        super()._begin()
        self._known: Any = None  # the structure of the parameters, and what it was made of
        self._extra: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_known", "_extra")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, before the first step.

        Raises:
          ValueError: there is a state, which has the structure of the parameters that there were.
        """
        if self.state.get(KEY):
            raise ValueError(
                "parameters cannot be added: the state of optax has the structure of those that there were at the "
                "first step; make a new optimizer"
            )
        super().add_param_group(param_group)

    # --- steps ---

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        grads_or_loss: Any = None,
        *args: Any,
        closure: Any = None,
        has_aux: bool = False,
        micro_batches: int = 1,
        **kwargs: Any,
    ) -> Any:
        """Update the parameters; see :meth:`optimjax.Optimizer.step`.

        Args:
          grads_or_loss: nothing, gradients, or a loss function.
          args: arguments of the loss function.
          closure: PyTorch's closure.
          has_aux: whether the loss function returns ``(loss, aux)``.
          micro_batches: into how many parts the arrays among its arguments are divided, for value and gradient;
            ``value_fn`` gets them whole.
          kwargs: further arguments of the loss function; for ``step(grads)`` and ``step()`` those of the
            transformation, such as ``value=loss``. Arrays and numbers may change from step to step; all else is
            compiled in.

        Raises:
          TypeError: arguments that the transformation does not take.
          ValueError: some parameters have no gradient, and others have.
        """
        if not callable(grads_or_loss) or self._are_gradients(grads_or_loss):
            check_extra(self._tx, kwargs)
            self._extra, kwargs = kwargs, {}
        try:
            how = {"closure": closure, "has_aux": has_aux, "micro_batches": micro_batches}
            return super().step(grads_or_loss, *args, **how, **kwargs)
        finally:
            self._extra = {}

    def _update(self, gradients: Callable[[], Iterable[tuple[Parameter, Any]]]) -> None:
        if all(grad is None for _, grad in gradients()):
            return
        leaves, structure = jax.tree.flatten(self._extra)
        static = tuple((index, leaf) for index, leaf in enumerate(leaves) if not _is_traced(leaf))
        traced = [own_memory(leaf) for leaf in leaves if _is_traced(leaf)]

        def plan() -> Launch:
            trained, _ = self._structure()
            given = {parameter: own_memory(grad) for parameter, grad in gradients() if grad is not None}
            grads = self._checked_gradients(trained, given)
            problem, kept, params, rates = self._problem(trained, (structure, static))
            params = distinct(params, (grads, traced)) if self.donate else params
            key = problem, *kinds(kept.slots), *kinds(params), *kinds(grads), *kinds(traced)
            arguments = problem, kept.slots, params, grads, rates, traced
            donated = GIVEN_TO_UPDATE[self.donate]
            commit = functools.partial(self._commit, trained, kept)
            return Launch(by_gradients, donated, [Call(key, arguments)], commit)

        self._stepper.handover.launch(plan)

    def _update_from_loss(self, loss_fn: Callable[..., Any], given: LossArguments) -> Any:
        loss_function = self._stepper.losses(loss_fn)
        program = loss_function.program(update_from_loss, static=2)

        def plan() -> Launch:
            call = self._stepper.call_of(self.param_groups, self._handed, loss_function, given)
            self._checked_gradients(self._structure()[0], dict.fromkeys(call.parameters))
            problem, kept, params, rates = self._problem(call.parameters, (jax.tree.structure({}), ()))
            params = distinct(params, call.traced) if self.donate else params
            key = problem, call.structure, *kinds(kept.slots), *kinds(params), *kinds(call.traced)
            arguments = problem, call.structure, kept.slots, params, call.traced, rates

            def commit(results: list[Any]) -> list[tuple[Any, str, Any]]:
                ((leaves, new, _, _, changed),) = results
                call.write_back(changed)
                return self._commit(call.parameters, kept, [(leaves, new)])

            return Launch(program, GIVEN_TO_UPDATE_FROM_LOSS[self.donate], [Call(key, arguments)], commit)

        ((_, _, loss, aux, _),) = self._stepper.handover.launch(plan)
        return (loss, unpacked(aux)) if given.has_aux else loss

    def _structure(self) -> tuple[list[Parameter], Any]:
        """The parameters that train, in the order of the leaves that optax sees, and the structure that it sees.

        Raises:
          ValueError: all are frozen; one was put into a group by hand, and belongs to nothing that was handed in.
        """
        handed = self._view()
        parameters = [parameter for parameter in self._parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("all of the optimizer's parameters have requires_grad=False: nothing would be trained")
        made_of = [*handed.sources, *parameters]
        if self._known is None or list(map(id, made_of)) != list(map(id, self._known[0])):
            indices = {parameter: index for index, parameter in enumerate(parameters)}
            views = [source.arranged(indices) for source in handed.sources]
            order, structure = jax.tree.flatten(views if handed.grouped or len(views) > 1 else views[0])
            if strange := indices.keys() - {parameters[index] for index in order}:
                raise ValueError(
                    f"{name_of(strange.pop(), self.param_groups)!r} was put into param_groups by hand, but is not part "
                    "of what the optimizer was made from; add parameters with add_param_group, or make a new optimizer"
                )
            self._known = made_of, [parameters[index] for index in order], structure
        return self._known[1:]

    def _checked_gradients(self, trained: Sequence[Parameter], given: Mapping[Parameter, Any]) -> list[Any]:
        """The gradients of these parameters; ``None`` for one that is not computed yet."""
        name = functools.partial(name_of, groups=self.param_groups)
        check_present([name(parameter) for parameter in trained if parameter not in given])
        grads = [given[parameter] for parameter in trained]
        for parameter, grad in zip(trained, grads, strict=True):
            if grad is not None:
                check_gradient(functools.partial(name, parameter), parameter.value, grad)
            if is_sparse(grad):
                raise RuntimeError(f"optax does not support sparse gradients ({name(parameter)!r})")
        return grads

    def _problem(self, parameters: Sequence[Parameter], extra: Any) -> tuple[Problem, Kept, list[Array], Any]:
        """What is compiled in, the state, the values of these parameters, and the rates of all groups."""
        trained, structure = self._structure()
        position = {parameter: index for index, parameter in enumerate(parameters)}
        group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        kept, values = self._present(), [parameter.value for parameter in parameters]
        several = jax.device_count() > 1
        pins = tuple(tuple(pin(x) if several else None for x in arrays) for arrays in (kept.slots, values))
        problem = interned(
            Problem,
            self._tx,
            structure,
            tuple(position[parameter] for parameter in trained),
            tuple(group_of[parameter] for parameter in parameters),
            kept.structure,
            pins,
            extra,
        )
        resolved = (self._stepper.planner.resolved(self.param_groups, index) for index in range(len(self.param_groups)))
        rates = [as_number(hyper.lr) for hyper, _ in resolved]
        return problem, kept, values, rates if holds_tracer(rates) else np.array(rates)

    def _commit(self, parameters: Sequence[Parameter], before: Kept, results: list[Any]) -> list[tuple[Any, str, Any]]:
        """Write results; see :class:`optimjax._engine.handover.Launch`."""
        ((leaves, values),) = results
        for parameter, value in zip(parameters, values, strict=True):
            parameter._write(value)
        kept = dataclasses.replace(before, slots=list(leaves), step=before.step + 1)
        entry = self.state[KEY] = ParameterState.of(self.state.get(KEY, {}))
        return entry.moved(kept, self._stepper.handover)

    # --- the state ---

    def _tree(self) -> Any:
        """The present values, as optax sees them."""
        trained, structure = self._structure()
        return structure.unflatten([parameter.value for parameter in trained])

    def _present(self, looking: bool = False) -> Kept:
        """The state, which a step may update in place; when somebody is ``looking``, it is in their hands afterwards.

        Raises:
          ValueError: it was edited into something else, or parameters were frozen or unfrozen.
        """
        trained, _ = self._structure()
        entry = ParameterState.of(self.state.get(KEY, {}))
        kept = entry.place if isinstance(entry.place, Kept) and not looking else None
        if kept is not None and list(map(id, kept.trained)) == list(map(id, trained)):
            return kept
        if not entry:
            paths, leaves, structure = paths_of(initial(self._tx, self._tree()))
            return Kept(trained, structure, tuple(paths), leaves, 0)
        kept = self._read(dict(entry), "state['optax']")
        return kept if looking else dataclasses.replace(kept, slots=list(map(copied_array, kept.slots)))

    def _read(self, entries: Any, what: str) -> Kept:
        """The state that entries say, loaded or edited.

        Raises:
          ValueError: they are not those of this transformation and these parameters.
        """
        trained, _ = self._structure()
        paths, types, structure = paths_of(jax.eval_shape(self._tx.init, self._tree()))
        if not isinstance(entries, Mapping):
            raise ValueError(f"{what} must be a dict, got {type(entries).__name__}")
        wanted = ["step", *paths]
        missing = [name for name in wanted if name not in entries]
        unexpected = [name for name in entries if name not in set(wanted)]
        if missing or unexpected:
            raise ValueError(
                f"{what} is not that of this transformation and these parameters: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}. It has the structure of the parameters that trained when it was made"
            )
        first = trained[0].value
        leaves = [read(entries[n], type_, first, f"{what}: {n!r}") for n, type_ in zip(paths, types, strict=True)]
        return Kept(trained, structure, tuple(paths), leaves, as_count(entries["step"], f"{what}: 'step'"))

    def _reader(self, group: Mapping[str, Any], where: str) -> Reader:
        super()._reader(group, where)  # checks the group

        def entries_of(parameter: Parameter, saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
            if strange := [name for name in saved if name in names_of_others(self.definition)]:
                raise ValueError(
                    f"loaded state of parameter {str(parameter)!r} has {strange[0]!r}, which FromOptax does not keep: "
                    f"it has one state for all parameters, under {KEY!r}"
                )
            return unknown_entry(parameter, dict(saved))

        return entries_of

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`optimjax.Optimizer.state_dict`. Groups name their algorithm, so no other optimizer loads it."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group["algorithm"] = self.definition.name
        return packed

    def _set(self, groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
        loaded = state.get(KEY)
        if loaded is not None and not isinstance(loaded, ParameterState):
            state = {**state, KEY: ParameterState(self._read(loaded, f"loaded state {KEY!r}").entries())}
        super()._set(groups, state)

    # --- the functional form ---

    @classmethod
    def _algorithm(cls, values: Mapping[str, Any]) -> Algorithm:
        return Transformed(cls.definition, values)

    @property
    def algorithm(self) -> Algorithm:
        """What :func:`optimjax.interop.optax.from_optax` makes of the transformation, with the rates of the groups."""

        def make(values: Mapping[str, Any]) -> Algorithm:
            return self._algorithm({"tx": self._tx, **values})

        return functional_form.algorithm_of(make, self.definition, self.param_groups, self._view())

    def functional_state(self) -> tuple[Any, Any]:
        """Parameters and state for :attr:`algorithm`; see :meth:`optimjax.Optimizer.functional_state`."""
        with self._looking():
            kept = self._present(looking=True)
            step = jnp.int32(kept.step)
            state = STATE(place(step, kept.trained[0].value), kept.structure.unflatten(kept.slots))
            return self._tree(), state

    def load_functional_state(self, params: Any, state: Any) -> None:
        """Take over what :attr:`algorithm` has made of :meth:`functional_state`.

        Raises:
          ValueError: their structure, shapes or dtypes are others. Nothing has changed then.
        """
        with self._looking():
            trained, structure = self._structure()
            tree = self._tree()
            expected = jax.eval_shape(self._algorithm({"tx": self._tx, "lr": 1.0}).init, tree)
            paths, leaves, _ = paths_of(getattr(state, "tx", None))
            # A transformation may keep another dtype than it begins with.
            named = jax.tree_util.tree_flatten_with_path({"state": state})[0]
            dtypes = {dotted(path): {jnp.result_type(leaf)} for path, leaf in named}
            functional_form.check_like((params, state), (tree, expected), dtypes)
            values = dict(zip(trained, map(jnp.asarray, structure.flatten_up_to(params)), strict=True))
            arrays = dict(zip(paths, map(jnp.asarray, leaves), strict=True))
            new = {**self.state, KEY: ParameterState({"step": int(state.step), **arrays})}
            before = {parameter: parameter.value for parameter in values}, dict(self.state)
            try:
                self._write(values, new)
            except BaseException:  # an interrupt
                self._write(*before)
                raise
        if int(state.step):
            self._note_step()


def _is_traced(leaf: Any) -> bool:
    number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
    return number or isinstance(leaf, (Array, np.ndarray, np.generic))
