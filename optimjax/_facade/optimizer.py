"""The public face of an optimizer: groups, gradients, steps, saving and loading, in PyTorch's form."""

import copy
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Literal, Self, TypeVar, Unpack, overload

import chex
import jax
from jax import Array

from optimjax._core.algorithm import Algorithm
from optimjax._core.contract import Rule
from optimjax._core.definition import UNBOUND, Definition, of_group, package
from optimjax._core.guard import Guard, Options
from optimjax._core.hyperparameters import Hyperparameters
from optimjax._core.sparse import zeros_like
from optimjax._core.tracing import is_top_level, trace_state
from optimjax._core.tree import check_gradient
from optimjax._engine.loss_call import LossArguments
from optimjax._engine.loss_function import takes_no_arguments
from optimjax._engine.state import ParameterState
from optimjax._engine.stepping import Stepper
from optimjax._engine.watch import Tally, Watch
from optimjax._facade import functional_form, group_table
from optimjax._facade import state_dict as state_dicts
from optimjax._facade.groups import check_not_options, is_list_of_groups, new_group, without_tensors
from optimjax._facade.guarded import Guarded
from optimjax._facade.hooks import Hooks, RemovableHandle, global_hooks
from optimjax._facade.record import ScheduleRecord
from optimjax._facade.state_dict import IncompatibleKeys
from optimjax._params.grouping import ParameterGroups
from optimjax._params.handed import Handed, name_of
from optimjax._params.parameter import Parameter
from optimjax._params.source import ParameterSource, is_single

__all__ = ["Optimizer", "register_optimizer_step_post_hook", "register_optimizer_step_pre_hook"]


Aux = TypeVar("Aux")


class Optimizer(Guarded):
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
        place; an iterable of :class:`optimjax.Parameter` (or ``nnx.Param``, which stands for the module's parameter) or
        of ``(name, Parameter)``; or a list of dicts, each with ``params`` (any of these) and the group's own options.
      defaults: the hyperparameters of groups that do not give their own.
      options: ``max_grad_norm`` and ``skip_nonfinite``, which every optimizer of this library takes; see below. They
        are attributes, too. Another value compiles nothing; to set one from or to ``None`` or ``False`` may.

    Raises:
      ValueError: nothing to optimize, a hyperparameter out of range, a parameter in two groups.
      TypeError: ``params`` is a single Parameter or a set; a value of the wrong type; an unknown option.

    Attributes:
      max_grad_norm: the gradients of all parameters together are scaled down to this norm in each step, exactly as
        :func:`optimjax.clip_grad_norm_` does, within the compiled step. ``math.inf`` only measures.
      grad_norm: the norm of all gradients of the last step before clipping, a scalar array that has not been waited
        for; ``None`` if neither of these options is set.
      skip_nonfinite: whether a step whose gradients are not all finite changes nothing: neither parameters nor state
        nor the counts of updates. What the loss has changed in a module, such as batch statistics, stays.
      skipped: how many steps that has skipped, an int32 array that has not been waited for.
      donate: set it to ``True`` (``optimizer.donate = True``) and a step updates the parameters in place, too, not only
        the state: it needs no second copy of them. Arrays taken from ``params`` or from a module before a step are
        then gone after it.
    """

    rule: ClassVar[Rule | None] = None
    definition: ClassVar[Definition]
    joint_state: ClassVar[bool] = False  # whether the first parameter keeps the state of all, in their order
    slot_names: ClassVar[tuple[str, ...]] = ()  # what a class without a rule keeps
    donate: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _define(cls)
        if "step" in vars(cls):
            cls.step = _hooked(vars(cls)["step"])

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An optimizer without groups: of a copy, and of a subclass that wraps another one, the only constructor."""
        self = super().__new__(cls)
        self._begin()
        return self

    def _begin(self) -> None:
        self._hooks = Hooks()
        self._handed = Handed()
        self._record = ScheduleRecord()
        self._guard, self._watch = Guard(), Watch()
        self._in_step = False
        self._trace = trace_state()
        self._stepper = Stepper(self.definition, traced=not is_top_level(self._trace))

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]):
        self._set_options(options)
        self.defaults = defaults = {name: without_tensors(value) for name, value in defaults.items()}
        if params is UNBOUND:
            return
        self.state: MutableMapping[Any, Any] = defaultdict(ParameterState)
        self.param_groups: list[dict[str, Any]] = []
        self.definition.check(defaults)

        if is_single(params):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Parameters or dicts, "
                f"but got a single {params!r}: put it in a list"
            )
        if isinstance(params, Iterator):  # of parameters, or of groups
            params = list(params)
        groups = params if is_list_of_groups(params) else None
        if groups is None:
            check_not_options(params, self.definition.hyperparameters.kinds)
        whole = [params.source] if isinstance(params, ParameterGroups) else []
        self._handed = Handed(whole, grouped=groups is not None and not whole)
        if not (isinstance(params, (list, tuple)) and not params):
            for group in groups or [{"params": params}]:
                self.add_param_group(group)
        if not any(group["params"] for group in self.param_groups):
            found = f"no floating array in this {type(params).__name__}"
            if isinstance(params, list) and not params:
                found = "nothing was in it; a generator can be used once only"
            raise ValueError(f"optimizer got an empty parameter list: {found}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own options.

        Args:
          param_group: ``params``, anything that an optimizer takes, and any of the hyperparameters. With an
            ``algorithm``, an optimizer class or the name of one of ours, the group is updated by that: it takes the
            options of that class, with the defaults of that class.

        Raises:
          TypeError: not a dict, or an option that this optimizer does not know, or one of another algorithm.
          ValueError: a parameter is in two groups, an option is out of range, some groups have names and some not; an
            algorithm that cannot share an optimizer (LBFGS, one with a ``step`` of its own).
        """
        self._check_trace()
        where = f" of param_groups[{len(self.param_groups)}]"
        group, source = new_group(param_group, self.param_groups, self.defaults, self.definition, where)
        definition = of_group(group, self.definition)
        hyper, flags = definition.resolve(group, where)
        for parameter in group["params"]:
            definition.check_param(parameter.value, flags, parameter.__str__)
        before = self._handed
        handed = before.extended(source, group["params"])
        try:
            if definition.rule is not None and definition.rule.eager:
                values = [parameter.value for parameter in group["params"]]
                slots = definition.slots(values, [hyper] * len(values), [flags] * len(values))
                for parameter, slot in zip(group["params"], slots, strict=True):
                    self.state[parameter].update(definition.entries(slot, 0))
            self._handed = handed
            self.param_groups.append(group)
        except BaseException:  # an interrupt
            self._handed = before
            self.param_groups[:] = [other for other in self.param_groups if other is not group]
            raise

    @property
    def params(self) -> Any:
        """The parameters as they were handed in, with their present values.

        For a module it is the module; for parameters the list of their values, or a dict by name; for a list of
        groups, a list with one entry a group.
        """
        with self._looking():
            return self._view().view()

    def _view(self) -> Handed:
        """What was handed in, with the parameters that the groups have now."""
        self._handed.follow(self.param_groups)
        return self._handed

    def _parameters(self) -> list[Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _looking(self) -> Any:
        """A context in which no other thread steps, and what the last step has left is in its place."""
        return self._stepper.handover.looking()

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

    # --- gradients ---

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set those that exist to zero."""
        self._check_trace()
        with self._looking():
            for parameter in self._parameters():
                grad = parameter.grad
                parameter.grad = None if set_to_none or grad is None else zeros_like(grad)

    def backward(
        self, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False, micro_batches: int = 1, **kwargs: Any
    ) -> Any:
        """Differentiate ``loss_fn(optimizer.params, *args)`` and add the gradients into ``Parameter.grad``.

        An optimizer made from parameters of a ``flax.nnx`` module takes the module among ``args`` instead:
        ``backward(loss_fn, model, x, y)`` calls ``loss_fn(model, x, y)``. Batch statistics and random state of
        modules are updated, and what the function writes into an ``nnx.Param`` is kept. Compiled once for each
        ``loss_fn`` object and shapes of ``args``: a lambda created inside the loop recompiles on every iteration.
        What the function reads from elsewhere, a global or an attribute of its ``self``, is read once: whatever changes
        must be among ``args``.

        Args:
          loss_fn: returns a real scalar, or ``(scalar, aux)`` with ``has_aux``.
          args: arrays and trees of arrays; other leaves (strings, functions) are compiled in.
          has_aux: whether ``loss_fn`` returns something in addition to the loss.
          micro_batches: see :meth:`step`.
          kwargs: further arguments of ``loss_fn``, by name.

        Returns:
          The loss, or ``(loss, aux)``.

        >>> import jax.numpy as jnp, optimjax as optim
        >>> optimizer = optim.SGD({"w": jnp.array(2.0)}, lr=0.1)
        >>> loss = optimizer.backward(lambda params, x: (params["w"] * x) ** 2, 3.0)
        >>> print(loss, optimizer.param_groups[0]["params"][0].grad)
        36.0 36.0
        """
        self._check_trace()
        given = LossArguments(args, kwargs, has_aux, micro_batches)
        return self._stepper.backward(self.param_groups, self._handed, loss_fn, given)

    # --- step ---

    @overload
    def step(self) -> None: ...
    @overload
    def step(self, *, closure: Callable[[], Any]) -> Any: ...
    @overload
    def step(
        self,
        loss_fn: Callable[..., tuple[chex.Numeric, Aux]],
        /,
        *args: Any,
        has_aux: Literal[True],
        micro_batches: int = 1,
        **kwargs: Any,
    ) -> tuple[Array, Aux]: ...
    @overload
    def step(
        self,
        loss_fn: Callable[..., chex.Numeric],
        /,
        *args: Any,
        has_aux: Literal[False] = False,
        micro_batches: int = 1,
        **kwargs: Any,
    ) -> Array: ...
    @overload
    def step(self, grads: Any, /) -> None: ...
    def step(
        self,
        grads_or_loss: Any = None,
        *args: Any,
        closure: Any = None,
        has_aux: bool = False,
        micro_batches: int = 1,
        **kwargs: Any,
    ) -> Any:
        """Update every parameter that has a gradient.

        Three forms: ``step()`` uses ``Parameter.grad``; ``step(grads)`` takes gradients in the structure of
        ``params`` (for a module what ``nnx.grad`` returns, for parameters a list in their order), ``None`` where one is
        missing; ``step(loss_fn, *args, **kwargs)`` computes value, gradient and update in one compiled program and
        returns the loss; whatever changes must be among the arguments, as for :meth:`backward`. A parameter without a
        gradient is left alone, with its state and its count; in the last two forms one with ``requires_grad=False``,
        too.

        With ``has_aux=True`` the loss function returns ``(loss, aux)``, and so does ``step``.

        With ``micro_batches=n`` a large batch costs the memory of a small one: every array among the arguments is
        divided along its first axis into ``n`` parts, which go through the loss one after the other, still in one
        program. The update is by the mean of their gradients, summed in float32 at least; the loss returned is the
        mean, and ``aux`` has one more axis in front, for the parts. Numbers, arrays without axes and parameters are
        given to every part; of a ``jax.random.key`` each part gets one of its own. What a part changes in a module, the
        next one begins with.

        PyTorch's closure, a function without arguments that calls :meth:`zero_grad` and :meth:`backward` itself, is
        called before the step, and its result is returned; ``closure`` is PyTorch's name of the argument.

        Whatever ends a step early (Ctrl-C, an error in the loss while it runs, a look at the state meanwhile),
        parameters and state are afterwards those before the step, or those after it. A loss that calls back into Python
        while it runs (``jax.pure_callback``, ``jax.debug.callback``, ``equinox.error_if``) costs memory for a second
        copy of the state during the step, which then waits for it.

        Inside a ``jit`` of your own use :attr:`algorithm` instead, which has no state to write to.

        >>> import jax.numpy as jnp, optimjax as optim
        >>> optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.25)
        >>> def loss_fn(params, x, *, y):
        ...     error = params["w"] * x - y
        ...     return jnp.mean(error**2), error
        >>> x = jnp.array([1.0, 1.0, 2.0, 2.0])
        >>> loss, error = optimizer.step(loss_fn, x, y=2 * x, has_aux=True, micro_batches=2)
        >>> print(loss, error.tolist(), optimizer.params["w"])
        2.5 [[-1.0, -1.0], [-2.0, -2.0]] 2.25

        Raises:
          RuntimeError: called inside a ``jit``, ``scan``, ``grad``, ... that began after the optimizer was made.
          ValueError: an array among the arguments cannot be divided into the micro-batches.
          ValueError, TypeError: gradients of another structure, shape or kind; state that was edited into another shape
            or kind; the message names the path. Nothing has changed then.
          RuntimeError: a gradient is sparse and the algorithm takes dense ones, or the other way round; a closure has
            left no gradient. As above.
        """
        self._check_trace()
        kwargs |= _given(closure=(closure, None), has_aux=(has_aux, False), micro_batches=(micro_batches, 1))
        given = (self, grads_or_loss, *args) if args or grads_or_loss is not None else (self,)
        hooked = not self._in_step  # the step of a subclass, which called this one, has run the hooks
        if hooked:
            given, kwargs = self._hooks.before_step(self, given, kwargs)
        form, call = _form(*given[1:], **kwargs)
        loss = None
        if callable(form) and not self._are_gradients(form):
            if not call.names and self._stepper.losses.find(form) is None and takes_no_arguments(form):
                loss = self._update_from_closure(form)
            else:
                loss = self._update_from_loss(form, call)
        elif call.names:
            what = "None" if form is None else "grads"
            hint = ": is the loss function None?" if form is None else ", which belong to step(loss_fn, ...)"
            raise TypeError(f"step({what}) takes no further arguments, got {', '.join(call.names)}{hint}")
        else:
            self._update(self._gradients if form is None else lambda: self._unfrozen(self._view().pairs(form)))
        self._note_step()
        if hooked:
            self._hooks.after_step(self, given, kwargs)
        return loss

    def _note_step(self) -> None:
        if not self._record.stepped:
            self._record = dataclasses.replace(self._record, stepped=True)

    def _update(self, gradients: Callable[[], Iterable[tuple[Parameter, Any]]]) -> None:
        self._stepper.by_gradients(
            self.param_groups, self.state, gradients, self._guard, self._watch, donate=self.donate
        )

    def _update_from_loss(self, loss_fn: Callable[..., Any], given: LossArguments) -> Any:
        return self._stepper.by_loss(
            self.param_groups, self.state, self._handed, loss_fn, given, self._guard, self._watch, donate=self.donate
        )

    def _gradients(self) -> Iterable[tuple[Parameter, Any]]:
        return [(parameter, parameter.grad) for parameter in self._parameters()]

    def _are_gradients(self, x: Any) -> bool:
        """Whether a callable is a tree of gradients, as an Equinox module is."""
        if jax.tree_util.all_leaves([x]):  # a function
            return False
        try:
            return not any(callable(grad) for _, grad in self._view().pairs(x))
        except (ValueError, TypeError):
            return False

    def _unfrozen(self, pairs: Iterable[tuple[Parameter, Any]]) -> Iterator[tuple[Parameter, Any]]:
        """The gradients that count; those of frozen parameters must fit, too."""
        for parameter, grad in pairs:
            if parameter.requires_grad:
                yield parameter, grad
            elif grad is not None:
                check_gradient(functools.partial(name_of, parameter, self.param_groups), parameter.value, grad)

    def _update_from_closure(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        if all(parameter.grad is None for parameter in self._parameters()):
            raise RuntimeError(
                f"{getattr(closure, '__name__', 'the closure')}() has left no gradient: it must call "
                "optimizer.backward(loss_fn, ...). Or give step a function of the model that returns the loss, "
                "optimizer.step(loss_fn, ...), and it is differentiated here"
            )
        self._update(self._gradients)
        return loss

    # --- saving and loading ---

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups in PyTorch's layout: arrays and plain Python values only.

        ``{'state': {0: {'step': 1, 'exp_avg': ...}}, 'param_groups': [{'lr': ..., 'params': [0]}]}``. A snapshot:
        neither later steps nor edits change it. What ``state`` has under other keys than parameters is in it, too.
        """
        self._hooks.state_dict_pre.notify(self)
        with self._looking():  # of one moment, whoever steps meanwhile
            packed = state_dicts.pack(self.param_groups, self.state)
        return self._hooks.state_dict_post.replace(self, packed)

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
        state_dict = self._hooks.load_state_dict_pre.replace(self, state_dicts.as_dict(state_dict))
        with self._looking():
            groups, state, keys = state_dicts.read(
                state_dict, self.param_groups, self.state, self.definition, self.defaults, self._reader,
                strict=strict, in_order=self.definition.name if self.joint_state else "",
            )  # fmt: skip
            before = [dict(group) for group in self.param_groups], dict(self.state)
            try:
                self._set(groups, state)
                # As in PyTorch: a subclass may complete here what an older version of it has saved.
                self.__setstate__({"state": self.state, "param_groups": self.param_groups})
            except BaseException:
                self._set(*before)
                raise
            self._record = dataclasses.replace(self._record, loaded=True, built=())
        self._hooks.load_state_dict_post.notify(self)
        return keys

    def _reader(self, group: Mapping[str, Any], where: str) -> state_dicts.Reader:
        """What reads the loaded entries of the parameters of a loaded group."""
        return state_dicts.reader_of(of_group(group, self.definition), group, where)

    def _set(self, groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
        """Give the groups, which stay the same objects, and the state these contents."""
        for group, values in zip(self.param_groups, groups, strict=True):
            group.clear()
            group.update(values)
        self._set_state(state)

    def _set_state(self, state: Mapping[Any, Any]) -> None:
        self.state.clear()
        self.state.update(state)

    # --- the functional form ---

    @classmethod
    def _algorithm(cls, values: Mapping[str, Any]) -> Algorithm:
        """The functional form, with these hyperparameters."""
        return Algorithm(cls.definition, values)

    @property
    def algorithm(self) -> Algorithm:
        """The same algorithm as pure functions, with the hyperparameters that the groups have now.

        Where groups have an ``algorithm`` of their own, it is a :func:`optimjax.functional.partition`.

        Raises:
          ValueError: groups differ in what the functional form has once for all (``amsgrad``, ``maximize``, ...).
        """
        algorithm = functional_form.algorithm_of(self._algorithm, self.definition, self.param_groups, self._view())
        return dataclasses.replace(algorithm, guard=self._guard)

    def functional_state(self) -> tuple[Any, Any]:
        """Parameters and state for :attr:`algorithm`: to leave the facade, for a loop inside ``jit``.

        The parameters have the structure of ``params``, with ``None`` in place of leaves that are not optimized, or
        frozen; those of a module are an ``nnx.State`` of its ``nnx.Param`` variables, like the gradients of
        ``nnx.grad``.

        Raises:
          ValueError: parameters have done different numbers of updates; the functional state has one count.

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
        with self._looking():
            params, state = functional_form.functional_state(
                self.algorithm, self.definition, self.param_groups, self.state, self._view()
            )
            return params, state._replace(skipped=self.skipped) if self.skip_nonfinite else state

    def load_functional_state(self, params: Any, state: Any) -> None:
        """Take over what :attr:`algorithm` has made of :meth:`functional_state`: to come back to the facade.

        Raises:
          ValueError: their structure, shapes or dtypes are others. Nothing has changed then.
        """
        with self._looking():
            values, new = functional_form.taken_over(
                self.algorithm, self.definition, self.param_groups, self.state, self._view(), params, state
            )
            before = {parameter: parameter.value for parameter in values}, dict(self.state)
            try:
                self._write(values, new)
            except BaseException:  # an interrupt
                self._write(*before)
                raise
            if self.skip_nonfinite:
                self._watch.tally = Tally(int(state.skipped))
        if int(state.step):  # outside of the class: a scheduler need not warn that it is stepped first
            self._note_step()

    def _write(self, values: Mapping[Parameter, Array], state: Mapping[Any, Any]) -> None:
        for parameter, value in values.items():
            parameter._write(value)
        self._set_state(state)

    # --- hooks ---

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` before each step; it may return new ``(args, kwargs)``.

        As in PyTorch, ``args`` begins with the optimizer itself.
        """
        return self._hooks.step_pre.add(hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` after each step."""
        return self._hooks.step_post.add(hook)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer)`` before :meth:`state_dict`."""
        return self._hooks.state_dict_pre.add(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` after :meth:`state_dict`; it may return another one."""
        return self._hooks.state_dict_post.add(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` with a shallow copy before loading; it may return another one."""
        return self._hooks.load_state_dict_pre.add(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call ``hook(optimizer)`` after loading."""
        return self._hooks.load_state_dict_post.add(hook, prepend)

    def __repr__(self) -> str:
        # Names that the user has given are shown, as in PyTorch; those of the leaves of a tree or a module are not.
        sources = [source for source in self._handed.sources if isinstance(source, ParameterSource)]
        given = {parameter for source in sources for parameter in source.parameters}
        text = f"{type(self).__name__} ("
        for index, group in enumerate(self.param_groups):
            hidden = ["params"] if given.issuperset(group["params"]) else ["params", "param_names"]
            text += f"\nParameter Group {index}\n"
            shown = state_dicts.named(group)
            text += "".join(f"    {key}: {shown[key]}\n" for key in sorted(group, key=str) if key not in hidden)
        return text + ")"

    def _repr_html_(self) -> str:
        return group_table.table(type(self), self.param_groups, self.state, self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no hooks, as in PyTorch, and is in no step. What was remembered of steps names devices, which do
        # not pickle.
        left = ("_hooks", "_in_step", "_stepper", "_trace")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self._looking():  # of one moment, whoever steps meanwhile
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _define(cls: type[Optimizer]) -> None:
    """Give a class its definition."""
    slot_names = cls.slot_names if cls.rule is None else cls.rule.slots._fields
    own_step = any(
        "step" in vars(base) for base in cls.__mro__ if issubclass(base, Optimizer) and base is not Optimizer
    )
    cls.definition = Definition(cls, cls.rule, Hyperparameters(cls, Optimizer), slot_names, own_step)
    if cls.__module__.startswith("optimjax.algorithms."):
        package.append(cls.definition)


_define(Optimizer)


def _form(
    grads_or_loss: Any = None,
    *args: Any,
    closure: Any = None,
    has_aux: bool = False,
    micro_batches: int = 1,
    **kwargs: Any,
) -> tuple[Any, LossArguments]:
    """The arguments of ``step`` as a hook has left them, whatever they are called."""
    if closure is not None and (grads_or_loss is not None or args):
        raise TypeError("step takes a closure by position or by name, not both")
    return (grads_or_loss if closure is None else closure), LossArguments(args, kwargs, has_aux, micro_batches)


def _given(**options: tuple[Any, Any]) -> dict[str, Any]:
    """What was given of options, each with its default; hooks see only this."""
    return {name: value for name, (value, default) in options.items() if value is not default}


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
            self._note_step()
            self._hooks.after_step(self, given, kwargs)
        finally:
            self._in_step = False
        return result

    return wrapper


def register_optimizer_step_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(optimizer, args, kwargs)`` before each step of every optimizer."""
    return global_hooks.step_pre.add(hook)


def register_optimizer_step_post_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(optimizer, args, kwargs)`` after each step of every optimizer."""
    return global_hooks.step_post.add(hook)
