"""Backward passes and steps of one optimizer: a loss or gradients come in, parameters and state are written."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import jax

from optimjax._core.containers import own_memory
from optimjax._core.definition import Definition
from optimjax._core.guard import Guard
from optimjax._engine.bucket import update_bucket
from optimjax._engine.handover import Call, Handover, Launch, kind, kinds
from optimjax._engine.loss import unpacked, update_from_loss, value_and_grad
from optimjax._engine.loss_call import CallCache, LossArguments, LossCall
from optimjax._engine.loss_function import LossFunction, LossFunctions
from optimjax._engine.plan import Planner, distinct
from optimjax._engine.selections import measure
from optimjax._engine.watch import Watch
from optimjax._params.handed import Handed, name_of
from optimjax._params.parameter import Parameter

__all__ = ["Stepper"]

Groups = Sequence[Mapping[str, Any]]


class Stepper:
    """What an optimizer runs its steps with. It remembers what is compiled and planned, which no copy takes along.

    Groups, state and what was handed in stay the optimizer's, and come as arguments.

    Attributes:
      handover: the turns of those who step and those who look.
      planner: makes buckets of gradients.
      losses: the loss functions that were given.
    """

    def __init__(self, definition: Definition, traced: bool):
        self.handover = Handover(traced)
        self.planner = Planner(definition, self.handover)
        self.losses = LossFunctions()
        self._calls = CallCache()

    def backward(self, groups: Groups, handed: Handed, loss_fn: Any, given: LossArguments) -> Any:
        """Add the gradients of a loss to those of the parameters; return ``loss``, or ``(loss, aux)``."""
        loss_function = self.losses(loss_fn)
        program = loss_function.program(value_and_grad, static=1)

        def plan() -> Launch:
            call = self.call_of(groups, handed, loss_function, given)
            accumulated = [parameter.grad for parameter in call.parameters]

            def commit(results: list[Any]) -> list[Any]:
                ((_, _, changed, written, grads),) = results
                call.write_back(changed, written)
                for parameter, grad in zip(call.parameters, grads, strict=True):
                    parameter._grad = grad  # without checks, because it has been made for the parameter
                return []

            arguments = call.structure, call.differentiated, call.traced, accumulated
            return Launch(program, (), [Call((call.structure,), arguments)], commit)

        ((loss, aux, *_),) = self.handover.launch(plan)
        return (loss, aux) if given.has_aux else loss

    def by_gradients(
        self,
        groups: Groups,
        state: MutableMapping[Parameter, Any],
        gradients: Callable[[], Iterable[tuple[Parameter, Any]]],
        guard: Guard,
        watch: Watch,
        donate: bool,
    ) -> None:
        """Update the parameters that have a gradient; the gradients are asked for each time the step is planned."""

        def plan() -> Launch:
            grads = {parameter: own_memory(grad) for parameter, grad in gradients() if grad is not None}
            tally, skips = watch.tally.settled(), bool(guard.skip_nonfinite)
            plan, rows = self.planner.planned(groups, state, grads, tally, skips)
            limits = guard.limits(list(grads.values()), measure)
            if not grads:
                watch.norm = limits.norm
            calls, take = plan.calls(grads, rows, donate, limits), plan.commit(state, watch, tally)

            def commit(results: list[Any]) -> list[tuple[Any, str, Any]]:
                return take(results, limits.norm, limits.counts)

            return Launch(update_bucket, (1, 2) if donate else (1,), calls, commit)

        self.handover.launch(plan)

    def by_loss(
        self,
        groups: Groups,
        state: MutableMapping[Parameter, Any],
        handed: Handed,
        loss_fn: Any,
        given: LossArguments,
        guard: Guard,
        watch: Watch,
        donate: bool,
    ) -> Any:
        """Value, gradient and update in one program; return ``loss``, or ``(loss, aux)``."""
        loss_function = self.losses(loss_fn)
        program = loss_function.program(update_from_loss, static=3)

        def plan() -> Launch:
            call = self.call_of(groups, handed, loss_function, given)
            grads = dict(zip(call.parameters, call.differentiated, strict=True))  # which have their shapes
            tally, skips = watch.tally.settled(), bool(guard.skip_nonfinite)
            plan, rows = self.planner.planned(groups, state, grads, tally, skips, together=True)
            slots = [bucket.store.slots for bucket in plan.buckets]
            params = distinct(call.differentiated, call.traced) if donate else call.differentiated
            take, limit = plan.commit(state, watch, tally), guard.limit

            def commit(results: list[Any]) -> list[tuple[Any, str, Any]]:
                ((new_slots, new_params, _, _, changed, norm, counts),) = results
                call.write_back(changed)
                return take(list(zip(new_slots, new_params, strict=True)), norm, counts)

            on_device = any(isinstance(row, jax.Array) for row in rows)
            key = call.structure, plan.structure, skips, kind(limit), on_device, *kinds(call.traced)
            arguments = call.structure, plan.structure, skips, slots, params, call.traced, rows, limit
            return Launch(program, (3, 4) if donate else (3,), [Call(key, arguments)], commit)

        ((_, _, loss, aux, *_),) = self.handover.launch(plan)
        return (loss, unpacked(aux)) if given.has_aux else loss

    def call_of(self, groups: Groups, handed: Handed, loss_function: LossFunction, given: LossArguments) -> LossCall:
        """The call of a loss function, taken apart into what is differentiated, traced and static."""
        model = ()
        if not handed.bound:
            handed.follow(groups)
            model = (handed.with_parameters(),)
        loss_function.check(len(model) + len(given.args), tuple(given.kwargs), bool(model))
        parameters = [parameter for group in groups for parameter in group["params"]]
        call = self._calls(given, parameters, model)
        if len(call.parameters) != len(parameters):
            _check_found(call.parameters, groups, handed if model else None)
        return call

    def variables(self, groups: Groups, handed: Handed, loss_fn: Any, given: LossArguments) -> list[Any]:
        """The variables of modules that a loss may change."""
        return self.call_of(groups, handed, self.losses(loss_fn), given).variables


def _check_found(found: Sequence[Parameter], groups: Groups, given: Handed | None) -> None:
    """Raise where parameters would not be trained because they are not among the arguments of the loss.

    Args:
      found: those that are.
      groups: of the optimizer.
      given: what the loss function is given by the optimizer.
    """
    wanted = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    if not wanted:
        raise ValueError("all of the optimizer's parameters have requires_grad=False: nothing would be trained")
    if given is not None:
        strange = [parameter for parameter in wanted if parameter not in set(given.parameters)]
        if strange:
            raise ValueError(
                f"{', '.join(name_of(parameter, groups) for parameter in strange[:3])}: put into param_groups by hand, "
                "but not part of what the optimizer was made from, which the loss function is given; add parameters "
                "with add_param_group, or make a new optimizer"
            )
    if not found:
        raise ValueError(
            "none of the optimizer's parameters that require a gradient is among the arguments: "
            "pass the module that they belong to, as in step(loss_fn, model, x, y)"
        )
