"""The facade: groups, step, state. It unwraps, calls the compiled update, writes back; no arithmetic.

`step` runs one compiled program for each bucket of parameters. What is compiled depends on shapes, dtypes and structure
alone: step counts and group values are turned into scalars on the host, in double precision, and enter as one small
array.
"""

import copy
import difflib
import functools
import itertools
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from optimjax import notebook
from optimjax import state_dict as _state_dict
from optimjax.crossing import algorithm_of, functional_state, load_functional_state
from optimjax.grouping import ParameterGroups
from optimjax.handover import Call, Handover, Launch, is_top_level, kinds, trace_state
from optimjax.hooks import Hooks, RemovableHandle, global_hooks
from optimjax.lift import Algorithm, check_layout, check_param, lift
from optimjax.loss import (
    Capture,
    LossCall,
    LossFunction,
    LossFunctions,
    own_memory,
    takes_no_arguments,
    update_from_loss,
    value_and_grad,
)
from optimjax.parameter import Parameter
from optimjax.rule import Hyperparameters, Numeric, Rule, initial_slots, slot_types
from optimjax.source import BoxSource, ModuleSource, Source, is_single, not_parameters, source_of
from optimjax.sparse import zeros_like
from optimjax.state_dict import IncompatibleKeys, as_count, read_slot
from optimjax.step import (
    Bucket,
    Member,
    ParameterState,
    Place,
    Plan,
    bounded_layout,
    concrete,
    distinct,
    entries,
    layout,
    update_bucket,
)
from optimjax.tree import check_gradient, copied_array, from_tensor

__all__ = [
    "Optimizer",
    "ParameterState",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
]


PATTERNS = 8  # of present gradients, for which an optimizer compiles the fastest programs


class Optimizer:
    """Base class of all optimizers, as ``torch.optim.Optimizer``.

    A subclass sets ``rule`` and passes its hyperparameters to this constructor; nothing else is needed::

        class SignSGD(optim.Optimizer):
            rule = Rule(Slots, init, scalars, update)

            def __init__(self, params, lr: LearningRate = 1e-3):
                super().__init__(params, dict(lr=lr))

        sign_sgd = optim.functional.factory(SignSGD)

    Or it overrides ``step`` in plain Python, as custom PyTorch optimizers do.

    Args:
      params: a pytree of arrays; a ``flax.nnx`` module, or modules in lists, tuples and dicts, which are updated in
        place; an iterable of :class:`optimjax.Parameter` (or ``nnx.Param``, for which the module's boxes stand) or of
        ``(name, Parameter)``; or a list of dicts, each with ``params`` (any of these) and the group's own options.
      defaults: the hyperparameters of groups that do not give their own.

    Raises:
      ValueError: nothing to optimize, a hyperparameter out of range, a parameter in two groups.
      TypeError: ``params`` is a single Parameter or a set; a value of the wrong type; an unknown option.

    Attributes:
      donate: set it to ``True`` (``optimizer.donate = True``) and a step updates the parameters in place, too, not only
        the state: it needs no second copy of them. Arrays taken from ``params`` or from a module before a step are
        then gone after it.
    """

    rule: ClassVar[Rule | None] = None
    joint_state: ClassVar[bool] = False  # whether the first parameter has the state of all, side by side in their order
    donate: bool = False
    hyperparameters: ClassVar[Hyperparameters]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.hyperparameters = Hyperparameters(cls, Optimizer)
        if "step" in vars(cls):
            cls.step = _hooked(vars(cls)["step"])

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An optimizer without groups: of a copy, and of a subclass that wraps another one, the only constructor."""
        self = super().__new__(cls)
        self._begin()
        return self

    def _begin(self) -> None:
        self._hooks = Hooks()
        self._sources: list[Source] = []
        self._grouped = False
        # For lr_scheduler: whether one is attached and step() has been called since; whether a state was loaded; and
        # for each group, by name, what was there before schedulers were built, and after.
        self._scheduled = self._step_called = False
        self._loaded = False
        self._built: list[dict[str, tuple[Any, Any]]] = []
        self._in_step = False
        self._plan: Plan | None = None
        self._patterns: list[tuple[Any, list[list[int]]]] = []
        self._known_groups: dict[int, tuple[list[Any], Any]] = {}
        self._cut = Capture()
        self._losses = LossFunctions()
        self._trace = trace_state()
        self._handover = Handover(traced=not is_top_level(self._trace))

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self.defaults = defaults = {name: _without_tensors(value) for name, value in defaults.items()}
        if params is _DEFAULTS_ONLY:
            return
        self.state: defaultdict[Any, ParameterState] = defaultdict(ParameterState)
        self.param_groups: list[dict[str, Any]] = []
        self._check(defaults, "")

        if is_single(params):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Parameters or dicts, "
                f"but got a single {params!r}: put it in a list"
            )
        if isinstance(params, Iterator):  # of parameters, or of groups
            params = list(params)
        groups = params if _is_list_of_groups(params) else None
        if groups is None:
            self._check_not_options(params)
        whole = isinstance(params, ParameterGroups)
        self._grouped = groups is not None and not whole
        if whole:
            self._sources.append(params.source)
        if not (isinstance(params, (list, tuple)) and not params):
            for group in groups or [{"params": params}]:
                self.add_param_group(group)
        if not any(group["params"] for group in self.param_groups):
            found = f"no floating array in this {type(params).__name__}"
            if isinstance(params, list) and not params:
                found = "nothing was in it; a generator can be used once only"
            raise ValueError(f"optimizer got an empty parameter list: {found}")

    @classmethod
    def _defaults_of(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the constructor would make of these hyperparameters."""
        optimizer = cls.__new__(cls)
        optimizer.__init__(_DEFAULTS_ONLY, *args, **kwargs)
        return optimizer.defaults

    @classmethod
    def _usual(cls) -> dict[str, Any]:
        """What the constructor makes of no hyperparameters; nothing where it needs some."""
        try:
            return cls._defaults_of()
        except TypeError:
            return {}

    @classmethod
    def _algorithm(cls, values: Mapping[str, Any]) -> Algorithm:
        """The functional face, with the hyperparameters ``values``."""
        return lift(cls._rule(), cls.hyperparameters, values, cls.__name__, cls._usual)

    # --- groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own options.

        Args:
          param_group: ``params``, anything that an optimizer takes, and any of the hyperparameters.

        Raises:
          TypeError: not a dict, or an option that this optimizer does not know.
          ValueError: a parameter is in two groups, an option is out of range, some groups have names and some not.
        """
        self._check_trace()
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group).__name__}: {param_group!r}")
        if "params" not in param_group:
            raise ValueError(f"param_group has no 'params', only {list(param_group)}")
        where = f" of param_groups[{len(self.param_groups)}]"
        given = param_group["params"]
        source = source_of([given] if is_single(given) else given)
        if not source.parameters and (given is None or jax.tree_util.all_leaves([given])):
            raise TypeError(not_parameters(f"params{where}", given))
        options = {name: _without_tensors(value) for name, value in param_group.items()}
        group: dict[str, Any] = {**self.defaults, **options, "params": list(source.parameters)}
        names = group.pop("param_names", None)
        if isinstance(source, BoxSource) and source.names is None and names and len(names) == len(source.parameters):
            source = BoxSource(zip(names, source.parameters, strict=True))  # a group of another optimizer
        if source.parameters:
            names = source.names
        else:  # it neither has names nor lacks them, and is as the groups before it
            names = [] if any("param_names" in other for other in self.param_groups) else None
        if names is not None:
            group["param_names"] = list(names)
        self._check_keys(param_group, where)
        self._check(group, where)
        hyper, flags = self._resolve(group, where)
        if self.rule is not None:
            for box in group["params"]:
                check_param(self.rule, box.value, flags, box.__str__)
        self._check_apart(group, where)

        before = self._sources, self._grouped
        sources, grouped = list(self._sources), self._grouped
        shown = {box for other in sources for box in other.parameters}
        if not shown.issuperset(group["params"]):  # parameters of a whole, unfrozen, are already in view
            grouped |= bool(sources) and not (source.bound and isinstance(sources[0], ModuleSource))
            sources.append(source)
        try:
            if self.rule is not None and self.rule.eager:
                for box in group["params"]:
                    slots = initial_slots(self.rule, box.value, hyper, flags)
                    self.state[box].update(entries(self.rule, slots, 0))
            self._sources, self._grouped = sources, grouped
            self.param_groups.append(group)
        except BaseException:  # an interrupt
            self._sources, self._grouped = before
            self.param_groups[:] = [other for other in self.param_groups if other is not group]
            raise

    def _check_keys(self, group: Mapping[str, Any], where: str) -> None:
        """Raise for a misspelt option; a key that resembles none is the user's own."""
        known = self.hyperparameters.kinds.keys() | self.defaults.keys()
        for name in group:
            meant = None if name in known else _meant(name, known)
            if meant is not None and name not in _all_options():
                raise TypeError(
                    f"unknown option {name!r}{where}: did you mean {meant!r}? {type(self).__name__} knows "
                    f"{sorted(known)}; entries of your own need a name that does not resemble these"
                )

    def _check_apart(self, group: Mapping[str, Any], where: str) -> None:
        """Raise where a new group and those before it do not go together."""
        seen = {box for other in self.param_groups for box in other["params"]}
        double = [str(box) for box, count in Counter(group["params"]).items() if count > 1]
        if double:
            raise ValueError(f"a parameter appears more than once{where}: {', '.join(double)}")
        twice = [str(box) for box in group["params"] if box in seen]
        if twice:
            raise ValueError(f"some parameters appear in more than one parameter group: {', '.join(twice)}")
        for other in self.param_groups:
            if other["params"] and ("param_names" in other) != ("param_names" in group):
                with_or_without = "with names" if "param_names" in group else "without names"
                raise ValueError(
                    "all optimizer param groups should be with/without names. "
                    f"cannot add param group {with_or_without} to the optimizer"
                )

    def _check_not_options(self, params: Any) -> None:
        """Raise for misspelt groups, which would be taken for a tree, and their options ignored."""
        for item in params if isinstance(params, (list, tuple)) else ():
            self._check_not_options(item)
        if not isinstance(params, dict):
            return
        options = [name for name, value in params.items() if name in self.hyperparameters.kinds and _is_option(value)]
        near = [str(name) for name in params if difflib.get_close_matches(str(name), ["params"])]
        if options and (near or {"lr", "weight_decay", "betas"} & {*options}):
            option = options[0]
            raise ValueError(
                f"{option!r} is an option, here {params[option]!r}, in a dict that is taken for a tree of parameters "
                f"because it is not a group: groups are a list of dicts, each with 'params', as in "
                f"[{{'params': ..., {option!r}: {params[option]!r}}}]; this one has the keys {list(params)}"
            )

    def _check(self, values: Mapping[str, Any], where: str) -> None:
        for name, value in values.items():
            kind = self.hyperparameters.kinds.get(name)
            if not isinstance(kind, Numeric):
                continue
            if any(map(callable, jax.tree.leaves([value]))):
                raise TypeError(
                    f"{name}{where} must be a number, got {value!r}: "
                    "schedules belong to optim.functional, or use optim.lr_scheduler"
                )
            if not kind.items and not kind.is_value(value):
                raise TypeError(f"{name}{where} must be a number or an array of one element, got {value!r}")
        self.hyperparameters.check(values, self.rule)

    @property
    def params(self) -> Any:
        """The parameters as they were handed in, with their present values.

        For a module it is the module; for boxes the list of their values, or a dict by name; for a list of groups, a
        list with one entry a group.
        """
        with self._handover.lock:
            self._handover.look()
            return self._view(lambda source: source.view())

    def _arranged(self, values: Mapping[Parameter, Any]) -> Any:
        return self._view(lambda source: source.arranged(values))

    def _view(self, look: Callable[[Source], Any]) -> Any:
        views = [look(source) for source in self._followed()]
        return views if self._grouped else views[0]

    def _followed(self) -> list[Source]:
        """The sources. Where they are the user's own parameters, they are what the groups have now."""
        if len(self._sources) == len(self.param_groups):
            for index, (source, group) in enumerate(zip(self._sources, self.param_groups, strict=True)):
                if isinstance(source, BoxSource) and source.parameters != group["params"]:
                    self._sources[index] = source.following(group, f" of param_groups[{index}]")
        return self._sources

    # --- gradients ---

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set those that exist to zero."""
        self._check_trace()
        with self._handover.lock:
            self._handover.look()
            for box in self._parameters():
                box.grad = None if set_to_none or box.grad is None else zeros_like(box.grad)

    def backward(self, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False) -> Any:
        """Differentiate ``loss_fn(optimizer.params, *args)`` and add the gradients into ``Parameter.grad``.

        An optimizer made from boxes of a ``flax.nnx`` module takes the module among ``args`` instead:
        ``backward(loss_fn, model, x, y)`` calls ``loss_fn(model, x, y)``. Batch statistics and random state of
        modules are updated, and what the function writes into an ``nnx.Param`` is kept. Compiled once for each
        ``loss_fn`` object and shapes of ``args``: a lambda made anew in every iteration compiles in every iteration.
        What the function reads from elsewhere, a global or an attribute of its ``self``, is read once: whatever changes
        must be among ``args``.

        Args:
          loss_fn: returns a real scalar, or ``(scalar, aux)`` with ``has_aux``.
          args: arrays and trees of arrays; other leaves (strings, functions) are compiled in.
          has_aux: whether ``loss_fn`` returns something beside the loss.

        Returns:
          The loss, or ``(loss, aux)``.

        >>> import jax.numpy as jnp, optimjax as optim
        >>> optimizer = optim.SGD({"w": jnp.array(2.0)}, lr=0.1)
        >>> loss = optimizer.backward(lambda params, x: (params["w"] * x) ** 2, 3.0)
        >>> print(loss, optimizer.param_groups[0]["params"][0].grad)
        36.0 36.0
        """
        self._check_trace()
        loss_function = self._loss_function(loss_fn)
        program = loss_function.program(value_and_grad, static=2)

        def plan() -> Launch:
            call = self._captured(loss_function, args)
            accumulated = [box.grad for box in call.boxes]

            def commit(results: list[Any]) -> list[Any]:
                ((_, _, changed, written, grads),) = results
                call.write_back(changed, written)
                for box, grad in zip(call.boxes, grads, strict=True):
                    box._grad = grad  # without checks, because it has been made for the parameter
                return []

            arguments = call.cut, has_aux, call.differentiated, call.traced, accumulated
            return Launch(program, (), [Call((call.cut, has_aux), arguments)], commit)

        ((loss, aux, *_),) = self._handover.launch(plan)
        return (loss, aux) if has_aux else loss

    def _check_trace(self) -> None:
        """Raise if JAX is tracing a function other than the one that the optimizer was made in.

        Its state would be left with tracers.
        """
        if trace_state() != self._trace:
            raise RuntimeError(
                f"this {type(self).__name__} was made outside of the function that JAX is tracing (jit, scan, grad, "
                "...), or in one that has ended: what is traced must not get into it. It compiles by itself, so call "
                "it where it was made. For a loop of your own inside jit take optimizer.algorithm and "
                "optimizer.functional_state(), or make the optimizer inside, too"
            )

    def _loss_function(self, loss_fn: Any) -> LossFunction:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}: {loss_fn!r}")
        return self._losses(loss_fn)

    def _captured(self, loss_function: LossFunction, args: tuple[Any, ...]) -> LossCall:
        given = not all(source.bound for source in self._sources)
        if given:
            args = (self._view(lambda source: source.boxed()), *args)
        loss_function.check(len(args), given)
        boxes = self._parameters()
        call = self._cut(args, boxes, given)
        if len(call.boxes) != len(boxes):
            self._check_found(call.boxes, given)
        return call

    def _check_found(self, found: Sequence[Parameter], given: bool) -> None:
        """Raise where parameters would not be trained because they are not among the arguments of the loss."""
        wanted = [box for box in self._parameters() if box.requires_grad]
        if not wanted:
            raise ValueError("all of the optimizer's parameters have requires_grad=False: nothing would be trained")
        if given:
            shown = {box for source in self._sources for box in source.parameters}
            strange = [self._name(box) for box in wanted if box not in shown]
            if strange:
                raise ValueError(
                    f"{', '.join(strange[:3])}: put into param_groups by hand, but not part of what the optimizer was "
                    "made from, which the loss function is given; add parameters with add_param_group, or make a new "
                    "optimizer"
                )
        if not found:
            raise ValueError(
                "none of the optimizer's parameters that require a gradient is among the arguments: "
                "pass the module that they belong to, as in step(loss_fn, model, x, y)"
            )

    # --- step ---

    def step(self, grads_or_loss: Any = None, *args: Any, closure: Any = None) -> Any:
        """Update every parameter that has a gradient.

        Three forms: ``step()`` uses ``Parameter.grad``; ``step(grads)`` takes gradients in the structure of
        ``params`` (for a module what ``nnx.grad`` returns, for parameters a list in their order), ``None`` where one is
        missing; ``step(loss_fn, *args)`` computes value, gradient and update in one compiled program and returns the
        loss; whatever changes must be among ``args``, as for :meth:`backward`. A parameter without a gradient is left
        alone, with its state and its count; in the last two forms one with ``requires_grad=False``, too.

        PyTorch's closure, a function without arguments that calls :meth:`zero_grad` and :meth:`backward` itself, is
        called before the step, and its result is returned; ``closure`` is PyTorch's name of the argument.

        Whatever ends a step early (Ctrl-C, an error in the loss while it runs, a look at the state meanwhile),
        parameters and state are afterwards those before the step, or those after it. A loss that calls back into Python
        while it runs (``jax.pure_callback``, ``jax.debug.callback``, ``equinox.error_if``) costs memory for a second
        copy of the state during the step, which then waits for it.

        Inside a ``jit`` of your own use :attr:`algorithm` instead, which has no state to write to.

        Raises:
          RuntimeError: called inside a ``jit``, ``scan``, ``grad``, ... that began after the optimizer was made.
          ValueError, TypeError: gradients of another structure, shape or kind; state that was edited into another shape
            or kind; the message names the path. Nothing has changed then.
          RuntimeError: a gradient is sparse and the algorithm takes dense ones, or the other way round; a closure has
            left no gradient. As above.
        """
        self._check_trace()
        kwargs: dict[str, Any] = {} if closure is None else {"closure": closure}
        given = (self, grads_or_loss, *args) if args or grads_or_loss is not None else (self,)
        hooked = not self._in_step  # the step of a subclass, which called this one, has run the hooks
        if hooked:
            given, kwargs = self._hooks.before_step(self, given, kwargs)
        form, args = _form(*given[1:], **kwargs)
        loss = None
        if form is None:
            if args:
                raise TypeError(f"step(None) takes no further arguments, got {len(args)}: is the loss function None?")
            self._update(self._gradients)
        elif callable(form) and not self._are_gradients(form):
            known = self._losses.find(form)
            if known is None and not args and takes_no_arguments(form):
                loss = self._update_from_closure(form)
            else:
                loss = self._update_from_loss(known or self._loss_function(form), args)
        elif args:
            raise TypeError(f"step(grads) takes no further arguments, got {len(args)}")
        else:
            self._update(lambda: self._unfrozen(self._pair(form)))
        self._step_called = True
        if hooked:
            self._hooks.after_step(self, given, kwargs)
        return loss

    def _gradients(self) -> Iterable[tuple[Parameter, Any]]:
        return [(box, box.grad) for box in self._parameters()]

    def _are_gradients(self, x: Any) -> bool:
        """Whether a callable is a tree of gradients, as an Equinox module is."""
        if jax.tree_util.all_leaves([x]):  # a function
            return False
        try:
            return not any(callable(grad) for _, grad in self._pair(x))
        except (ValueError, TypeError):
            return False

    def _unfrozen(self, pairs: Iterable[tuple[Parameter, Any]]) -> Iterator[tuple[Parameter, Any]]:
        """The gradients that count; those of frozen parameters must fit, too."""
        for box, grad in pairs:
            if box.requires_grad:
                yield box, grad
            elif grad is not None:
                check_gradient(functools.partial(self._name, box), box.value, grad)

    def _pair(self, grads: Any) -> Iterable[tuple[Parameter, Any]]:
        parts = [grads]
        if self._grouped:
            if not isinstance(grads, (list, tuple)) or len(grads) != len(self._sources):
                raise ValueError(f"gradients must be a list with one entry for each of {len(self._sources)} groups")
            parts = list(grads)
        elif len(self._sources) > 1:
            raise ValueError("groups were added to this module's optimizer: use backward() and step(), or a loss_fn")
        gradients = [source.gradients(part) for source, part in zip(self._sources, parts, strict=True)]
        boxes = itertools.chain.from_iterable(source.parameters for source in self._sources)
        return zip(boxes, itertools.chain.from_iterable(gradients), strict=True)

    def _update(self, gradients: Callable[[], Iterable[tuple[Parameter, Any]]]) -> None:
        def plan() -> Launch:
            grads = {box: own_memory(grad) for box, grad in gradients() if grad is not None}
            plan, rows = self._planned(grads)
            calls = plan.calls(grads, rows, self.donate)
            return Launch(update_bucket, (1, 2) if self.donate else (1,), calls, plan.commit(self.state))

        self._handover.launch(plan)

    def _update_from_loss(self, loss_function: LossFunction, args: tuple[Any, ...]) -> Array:
        program = loss_function.program(update_from_loss, static=2)

        def plan() -> Launch:
            call = self._captured(loss_function, args)
            plan, (row,) = self._planned(dict(zip(call.boxes, call.differentiated, strict=True)), together=True)
            (bucket,) = plan.buckets
            params = distinct(call.differentiated, call.traced) if self.donate else call.differentiated
            take = plan.commit(self.state)

            def commit(results: list[Any]) -> list[tuple[Any, str, Any]]:
                call.write_back(results[0][3])
                return take(results)

            key = call.cut, bucket.updates, *kinds(call.traced)
            arguments = call.cut, bucket.updates, bucket.store.slots, params, call.traced, row
            return Launch(program, (2, 3) if self.donate else (2,), [Call(key, arguments)], commit)

        ((_, _, loss, _),) = self._handover.launch(plan)
        return loss

    def _update_from_closure(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        if all(box.grad is None for box in self._parameters()):
            raise RuntimeError(
                f"{getattr(closure, '__name__', 'the closure')}() has left no gradient: it must call "
                "optimizer.backward(loss_fn, ...). Or give step a function of the model that returns the loss, "
                "optimizer.step(loss_fn, ...), and it is differentiated here"
            )
        self._update(self._gradients)
        return loss

    def _planned(self, grads: Mapping[Parameter, Any], together: bool = False) -> tuple[Plan, list[Any]]:
        """The buckets of a step, and the scalars of each; everything is checked here, before anything changes.

        A step that is like the last one, of arrays that the last one has left, takes over its buckets.

        Args:
          grads: by parameter, whatever is not ``None``.
          together: one bucket, in the order of ``grads``; as it always is for a rule that takes all parameters at once.
        """
        resolved = [self._resolved(index) for index in range(len(self.param_groups))]
        hypers, flags = [hyper for hyper, _ in resolved], [flag for _, flag in resolved]
        sizes = [len(group["params"]) for group in self.param_groups]
        leaves, structure = jax.tree.flatten(list(grads.values()))  # a sparse gradient has two
        key = together, sizes, flags, self._parameters(), list(grads), structure, kinds(leaves)
        together |= self._rule().takes == "all"
        plan = self._plan
        if plan is None or plan.key != key or not all(bucket.fits(self.state) for bucket in plan.buckets):
            members = self._members(grads, hypers, flags)
            places, shared = self._layout(members)
            if together:
                position = {member.parameter: index for index, member in enumerate(members)}
                places = [[position[box] for box in grads]]
            rule = self._rule()
            scalars = type(rule.scalars(1, hypers[0]))
            if plan is not None:
                plan.drop()
            parts = [[members[index] for index in part] for part in places]
            plan = Plan(key, [Bucket(self._handover, rule, scalars, part, shared) for part in parts])
            self._plan = plan
        known: dict[tuple[int, int], Any] = {}
        return plan, [bucket.scalars(hypers, known) for bucket in plan.buckets]

    def _layout(self, members: list[Member]) -> tuple[list[list[int]], bool]:
        """The members of each bucket, and whether those of one group share a row of scalars.

        Each pattern of present gradients compiles programs of its own. Where the patterns do not end (routing,
        stochastic depth), later ones use programs of which there are only so many. Nor may every pattern of step counts
        be another program: where a group's counts differ, each member has its own row.
        """
        even = len({(m.group, m.step) for m in members}) == len({m.group for m in members})
        pattern = [(member.signature, member.group if even else 0) for member in members]
        for known, places in self._patterns:
            if pattern == known:
                return places, even
        if len(self._patterns) == PATTERNS:
            return bounded_layout(members), False
        self._patterns.append((pattern, layout(members)))
        return self._patterns[-1][1], even

    def _members(self, grads: Mapping[Parameter, Any], hypers: list[Any], flags: list[Any]) -> list[Member]:
        members = []
        for index, group in enumerate(self.param_groups):
            for box in group["params"]:
                if (grad := grads.get(box)) is not None:
                    value = box.value
                    name = functools.partial(self._name, box)
                    check_gradient(name, value, grad)
                    check_layout(self._rule(), type(self).__name__, grad, name)
                    known = self.state.get(box)
                    state = ParameterState.of({} if known is None else known)
                    slots, step = self._prepared(name, value, state, hypers[index], flags[index])
                    grad_kind = tuple(kinds(jax.tree.leaves(grad)))
                    members.append(Member(box, value, grad_kind, index, flags[index], state, known, slots, step))
        return members

    def _prepared(
        self, name: Callable[[], str], param: Array, state: ParameterState, hyper: Any, flags: Any
    ) -> tuple[Any, int]:
        """Slots that a step may update in place, and the count of updates.

        Slots that somebody has seen are checked, because they may have been edited, and copied; those that are missing
        are made.
        """
        rule, place = self._rule(), state.place
        if isinstance(place, Place) and (place.flags, place.shape) == (flags, param.shape):
            return place.slots, place.step
        values = state.peek()
        types = slot_types(rule, self.hyperparameters, flags, param.shape, param.dtype)
        of_parameter = f"state of parameter {name()!r}" if values else ""
        seen = {
            field: jax.tree.map(copied_array, read_slot(values[field], type_, param, f"{of_parameter}: {field!r}"))
            for field, type_ in types.items()
            if type_ is not None and values.get(field) is not None
        }
        complete = all(type_ is None or field in seen for field, type_ in types.items())
        slots = rule.slots(**dict.fromkeys(types)) if complete else initial_slots(rule, param, hyper, flags)
        # Where PyTorch keeps no count, the presence of the slots says whether this is the first update.
        step = as_count(values.get("step", 0), f"{of_parameter}: 'step'") if rule.counts_steps else int(complete)
        return slots._replace(**seen), step

    def _resolved(self, index: int) -> tuple[Any, Any]:
        """A group's hyperparameters and flags; the same again until somebody edits the group."""
        group = self.param_groups[index]
        given = list(map(group.get, self.hyperparameters.kinds))
        known = self._known_groups.get(index)
        if known is None or not all(map(is_, given, known[0])):
            known = given, self._resolve(group, f" of param_groups[{index}]")
            if all(map(_is_constant, given)):
                self._known_groups[index] = known
        return known[1]

    def _resolve(self, group: Mapping[str, Any], where: str) -> tuple[Any, Any]:
        """The group's hyperparameters as Python numbers, and its flags."""
        values = dict(group)
        for name in self.hyperparameters.numeric:
            if name not in group:
                raise KeyError(f"{name!r}{where} is missing: groups are added with add_param_group")
            try:
                kind: Any = self.hyperparameters.kinds[name]
                values[name] = kind.over_numbers(concrete, group[name])
            except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
                error_type = TypeError if isinstance(error, TypeError) else ValueError
                value = reprlib.repr(group[name])
                raise error_type(f"{name}{where} is {value}, which is not a number: {error}") from None
        return self.hyperparameters.hyper(values), self.hyperparameters.flags(group)

    @classmethod
    def _rule(cls) -> Rule:
        if cls.rule is None:
            raise NotImplementedError(
                f"{cls.__name__} has no `rule`: it must set one or override step(); only a rule has a functional form"
            )
        return cls.rule

    def _name(self, box: Parameter) -> str:
        """For messages: its name, or its place."""
        places = (
            (i, j) for i, group in enumerate(self.param_groups) for j, b in enumerate(group["params"]) if b is box
        )
        return box.name or next((f"params[{j}] of param_groups[{i}]" for i, j in places), str(box))

    def _parameters(self) -> list[Parameter]:
        return [box for group in self.param_groups for box in group["params"]]

    # --- saving and loading ---

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups in PyTorch's layout: arrays and plain Python values only.

        ``{'state': {0: {'step': 1, 'exp_avg': ...}}, 'param_groups': [{'lr': ..., 'params': [0]}]}``. A snapshot:
        neither later steps nor edits change it. What ``state`` has under other keys than parameters is in it, too.
        """
        self._hooks.notify("state_dict_pre", self)
        with self._handover.lock:  # of one moment, whoever steps meanwhile
            self._handover.look()
            packed = _state_dict.pack(self)
        return self._hooks.replace("state_dict_post", self, packed)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Load what :meth:`state_dict` returned, of this library or of PyTorch (NumPy, JAX or PyTorch arrays).

        Parameters are matched by name where both sides have names, else by order. The saved dtype is kept. At the end
        it calls ``__setstate__`` with the optimizer's own ``state`` and ``param_groups``, as PyTorch does.

        Args:
          state_dict: the state and the groups.
          strict: ``False`` is for a model that has changed. Of parameters with names it loads those that both sides
            have, in one shape; all others are left as they are. A parameter may have moved to another group if its name
            is in one group only. Groups that both sides have take the saved options.

        Returns:
          ``missing_keys`` and ``unexpected_keys``, the names of what was not loaded; both are empty if ``strict``.

        Raises:
          ValueError: another number of groups or of parameters, other names or shapes, arrays of another kind, state
            that this optimizer does not keep. Nothing has changed then.

        >>> import jax.numpy as jnp, optimjax as optim
        >>> old = optim.SGD({"body": jnp.ones(2), "head": jnp.ones(3)}, lr=0.1, momentum=0.9)
        >>> old.step({"body": jnp.ones(2), "head": jnp.ones(3)})
        >>> new = optim.SGD({"body": jnp.ones(2), "head": jnp.ones(5), "neck": jnp.ones(1)}, lr=0.1, momentum=0.9)
        >>> new.load_state_dict(old.state_dict(), strict=False)
        IncompatibleKeys(missing_keys=['neck', 'head'], unexpected_keys=['head'])
        """
        self._check_trace()
        state_dict = self._hooks.replace("load_state_dict_pre", self, _state_dict.as_dict(state_dict))
        with self._handover.lock:
            self._handover.look()
            keys = _state_dict.load(self, state_dict, strict)
            self._loaded, self._built = True, []
        self._hooks.notify("load_state_dict_post", self)
        return keys

    def _slot_types(self, group: Mapping[str, Any], where: str) -> Callable[[Parameter], dict[str, Any]] | None:
        """For a parameter of this loaded group the types of its slots, see :func:`optimjax.rule.slot_types`.

        Where there is no rule, nothing is known of the state.
        """
        rule = self.rule
        self.hyperparameters.check_structural(group)
        _, flags = self._resolve(group, where)
        if rule is None:
            return None

        def types(box: Parameter) -> dict[str, Any]:
            check_param(rule, box.value, flags, box.__str__)
            return slot_types(rule, self.hyperparameters, flags, box.shape, box.dtype)

        return types

    @classmethod
    def _state_names(cls) -> tuple[str, ...]:
        """The names of what the algorithm keeps for a parameter."""
        return () if cls.rule is None else cls.rule.slots._fields

    @classmethod
    def _names_of_others(cls) -> set[str]:
        """The names of what only other algorithms of the package keep."""
        names = {name for other in _algorithms() for name in other._state_names()}
        return names.difference(cls._state_names())

    def _checked(self, box: Parameter, entries: dict[str, Any]) -> dict[str, Any]:
        """The loaded state of a parameter, where there is no rule that says what it must be; or ``ValueError``.

        ``entries`` is as it was saved, but for arrays, which are JAX's where these can have the saved dtype.
        """
        return entries

    # --- the functional form ---

    @property
    def algorithm(self) -> Algorithm:
        """The same algorithm as pure functions, with the hyperparameters that the groups have now.

        Raises:
          ValueError: groups differ in what the functional form has once for all (``amsgrad``, ``maximize``, ...).
        """
        return algorithm_of(self)

    def functional_state(self) -> tuple[Any, Any]:
        """Parameters and state for :attr:`algorithm`: to leave the facade, for a loop inside ``jit``.

        The parameters have the structure of ``params``, with ``None`` in place of leaves that are not optimized, or
        frozen; those of a module are an ``nnx.State`` of its ``nnx.Param`` variables, like the gradients of
        ``nnx.grad``.

        Raises:
          ValueError: parameters have done different numbers of updates, for the functional state has one count.

        >>> import jax, jax.numpy as jnp, optimjax as optim
        >>> optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
        >>> optimizer.step(lambda params: jnp.sum(params["w"] ** 2))
        Array(2., dtype=float32)
        >>> adam = optimizer.algorithm
        >>> def one(carry, _):
        ...     params, state = carry
        ...     return adam.update(params, jax.tree.map(lambda w: 2 * w, params), state), None
        >>> (params, state), _ = jax.lax.scan(one, optimizer.functional_state(), length=10)
        >>> optimizer.load_functional_state(params, state)
        >>> optimizer.state_dict()["state"][0]["step"]
        11
        """
        with self._handover.lock:
            self._handover.look()
            return functional_state(self)

    def load_functional_state(self, params: Any, state: Any) -> None:
        """Take over what :attr:`algorithm` has made of :meth:`functional_state`: to come back to the facade.

        Raises:
          ValueError: their structure, shapes or dtypes are others. Nothing has changed then.
        """
        with self._handover.lock:
            self._handover.look()
            load_functional_state(self, params, state)

    # --- hooks ---

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` before each step; it may return new ``(args, kwargs)``.

        As in PyTorch, ``args`` begins with the optimizer itself.
        """
        return self._hooks.add("step_pre", hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` after each step."""
        return self._hooks.add("step_post", hook)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer)`` before :meth:`state_dict`."""
        return self._hooks.add("state_dict_pre", hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` after :meth:`state_dict`; it may return another one."""
        return self._hooks.add("state_dict_post", hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` with a shallow copy before loading; it may return another one."""
        return self._hooks.add("load_state_dict_pre", hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer)`` after loading."""
        return self._hooks.add("load_state_dict_post", hook, prepend)

    def __repr__(self) -> str:
        # Names that the user has given are shown, as in PyTorch; those of the leaves of a tree or a module are not.
        given = {box for source in self._sources if isinstance(source, BoxSource) for box in source.parameters}
        text = f"{type(self).__name__} ("
        for index, group in enumerate(self.param_groups):
            hidden = ["params"] if given.issuperset(group["params"]) else ["params", "param_names"]
            text += f"\nParameter Group {index}\n"
            text += "".join(f"    {key}: {group[key]}\n" for key in sorted(group, key=str) if key not in hidden)
        return text + ")"

    def _repr_html_(self) -> str:
        return notebook.table(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no hooks, as in PyTorch, and is in no step. What was remembered of steps names devices, which do
        # not pickle.
        left = ("_handover", "_hooks", "_in_step", "_known_groups", "_losses", "_plan", "_patterns", "_trace")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self._handover.lock:  # of one moment, whoever steps meanwhile
            self._handover.look()
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


Optimizer.hyperparameters = Hyperparameters(Optimizer, Optimizer)

_DEFAULTS_ONLY = object()  # in place of params: work out the defaults, make no optimizer


def _form(grads_or_loss: Any = None, *args: Any, closure: Any = None) -> tuple[Any, tuple[Any, ...]]:
    """The arguments of ``step`` as a hook has left them, whatever they are called."""
    if closure is not None and (grads_or_loss is not None or args):
        raise TypeError("step takes a closure by position or by name, not both")
    return (grads_or_loss if closure is None else closure), args


def _without_tensors(value: Any) -> Any:
    """The value of an option, with JAX's arrays in place of PyTorch's."""
    if isinstance(value, tuple):
        return tuple(map(_without_tensors, value))
    return jnp.asarray(from_tensor(value)) if hasattr(value, "detach") else value


def _is_option(value: Any) -> bool:
    """Whether this can be the value of an option, and not a leaf that is trained."""
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, tuple) and bool(value) and all(map(_is_option, value))
    )


def _all_options() -> set[str]:
    """The options of all algorithms of the package: a group that was another optimizer's has those of that one."""
    return {name for cls in _algorithms() for name in cls.hyperparameters.kinds}


def _algorithms(cls: type[Optimizer] = Optimizer) -> Iterator[type[Optimizer]]:
    """The classes of the package."""
    for subclass in cls.__subclasses__():
        if subclass.__module__.startswith("optimjax.algorithms."):
            yield subclass
        yield from _algorithms(subclass)


# What these options are called elsewhere.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
}


def _meant(name: Any, options: Iterable[str]) -> str | None:
    """The option that a key resembles; one that says more, such as ``lr_scale``, is another word."""
    if name in ("params", "param_names", "name") or not isinstance(name, str):
        return None
    known = {*options, "params"}
    if (other := _OTHER_NAMES.get(name)) in known:
        return other
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return None if not near or name.startswith(f"{near[0]}_") or name.endswith(f"_{near[0]}") else near[0]


def _is_constant(value: Any) -> bool:
    """Whether a value of a group can only be replaced, not edited in place."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_list_of_groups(params: Any) -> bool:
    if not isinstance(params, (list, tuple)) or not params or not all(isinstance(group, dict) for group in params):
        return False
    without = [index for index, group in enumerate(params) if "params" not in group]
    if without and len(without) < len(params):
        raise ValueError(f"param_groups[{without[0]}] has no 'params', only {list(params[without[0]])}")
    return not without


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of a subclass, with the hooks around it."""

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if self._in_step:
            return step(self, *args, **kwargs)
        self._check_trace()
        self._in_step = True
        try:
            given, kwargs = self._hooks.before_step(self, (self, *args), kwargs)
            result = step(*given, **kwargs)
            self._step_called = True
            self._hooks.after_step(self, given, kwargs)
        finally:
            self._in_step = False
        return result

    return wrapper


def register_optimizer_step_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(optimizer, args, kwargs)`` before each step of every optimizer."""
    return global_hooks.add("step_pre", hook)


def register_optimizer_step_post_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(optimizer, args, kwargs)`` after each step of every optimizer."""
    return global_hooks.add("step_post", hook)
