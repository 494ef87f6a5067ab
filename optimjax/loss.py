"""Differentiate a loss function with respect to boxes, in one compiled program.

A call ``loss_fn(*arguments)`` is cut into what is differentiated (the boxes' arrays), what is only traced (other
arrays and numbers, other variables of ``flax.nnx`` modules) and what is static (functions, strings, the structure of
modules). A module that the loss changes, its batch statistics or random state, is written back afterwards.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from optimjax.parameter import Parameter
from optimjax.step import Updates, update_each
from optimjax.variable import VariableParameter, is_nnx, nnx

__all__ = ["Call", "capture", "update_from_loss", "value_and_grad"]


class Cut(NamedTuple):
    """The static description of a call: from it and the arrays, a compiled function puts the arguments together."""

    treedef: Any  # of the arguments, with modules and boxes as leaves
    leaves: tuple[tuple[str, Any], ...]  # for each leaf its role and index ("static": the leaf; "node": a module)
    graphdef: Any  # of all modules among the arguments together, so that what they share stays shared
    state_treedef: Any
    state_roles: tuple[tuple[str, int], ...]

    def arguments(self, differentiated: Sequence[Array], traced: Sequence[Array]) -> tuple[tuple[Any, ...], Any]:
        """The arguments made of these arrays, and the modules among them."""
        pick = {"differentiated": differentiated.__getitem__, "traced": traced.__getitem__}
        nodes = None
        if self.graphdef is not None:
            values = [pick[role](index) for role, index in self.state_roles]
            nodes = nnx().merge(self.graphdef, self.state_treedef.unflatten(values))
            pick["node"] = nodes.__getitem__
        leaves = [what if role == "static" else pick[role](what) for role, what in self.leaves]
        return self.treedef.unflatten(leaves), nodes

    def changed(self, nodes: Any) -> list[Array]:
        """The traced arrays of the modules after the call."""
        if nodes is None:
            return []
        state = nnx().split(nodes)[1]
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.state_treedef:
            raise ValueError(
                "the loss function added, removed or reshaped variables of a module (for example with sow); do that "
                "outside of it, or return what you need as auxiliary output"
            )
        return [leaf for leaf, (role, _) in zip(leaves, self.state_roles, strict=True) if role == "traced"]


class Call(NamedTuple):
    """A call of a loss function, cut."""

    cut: Cut
    boxes: list[Parameter]  # those found among the arguments, in the order of `differentiated`
    differentiated: list[Array]
    traced: list[Any]
    variables: list[Any]  # those whose arrays are traced, in the order of `Cut.changed`

    def write_back(self, changed: Sequence[Array]) -> None:
        """Write what the call changed into the modules."""
        values = iter(changed)
        for variable in self.variables:
            leaves, treedef = jax.tree.flatten(variable.get_value())
            variable.set_value(treedef.unflatten([next(values) for _ in leaves]))


def capture(arguments: tuple[Any, ...], boxes: Sequence[Parameter]) -> Call:
    """Cut the arguments of a loss function; ``boxes`` are to be differentiated where they occur.

    A box stands for its array; a box with ``requires_grad=False`` is traced, not differentiated.
    """
    wanted = {id(_identity(box)): box for box in boxes if box.requires_grad}
    found: dict[int, int] = {}
    call = Call(None, [], [], [], [])  # pyright: ignore[reportArgumentType]

    def differentiate(key: int, box: Parameter) -> tuple[str, int]:
        if key not in found:
            found[key] = len(call.boxes)
            call.boxes.append(box)
            call.differentiated.append(box.value)
        return "differentiated", found[key]

    def trace(value: Any) -> tuple[str, int]:
        call.traced.append(value)
        return "traced", len(call.traced) - 1

    leaves, treedef = jax.tree.flatten(arguments, is_leaf=lambda x: isinstance(x, Parameter) or is_nnx(x))
    nodes, roles = [], []
    for leaf in leaves:
        if isinstance(leaf, Parameter):
            key = id(_identity(leaf))
            roles.append(differentiate(key, wanted[key]) if key in wanted else trace(leaf.value))
        elif is_nnx(leaf):
            roles.append(("node", len(nodes)))
            nodes.append(leaf)
        elif isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            roles.append(trace(leaf))
        else:
            roles.append(("static", leaf))

    graphdef = state_treedef = None
    state_roles: list[tuple[str, int]] = []
    if nodes:
        graphdef, state = nnx().split(nodes)
        state_treedef = jax.tree.structure(state)
        for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx().Variable)):
            if id(variable) in wanted:
                state_roles.append(differentiate(id(variable), wanted[id(variable)]))
            else:
                state_roles.extend(map(trace, jax.tree.leaves(variable.get_value())))
                call.variables.append(variable)
    return call._replace(cut=Cut(treedef, tuple(roles), graphdef, state_treedef, tuple(state_roles)))


def _identity(box: Parameter) -> Any:
    return box.variable if isinstance(box, VariableParameter) else box


def _evaluate(loss_fn: Callable[..., Any], cut: Cut, has_aux: bool, differentiated: Any, traced: Any) -> Any:
    def compute(differentiated: Any) -> Any:
        arguments, nodes = cut.arguments(differentiated, traced)
        result = loss_fn(*arguments)
        loss, aux = result if has_aux else (result, None)
        return loss, (aux, cut.changed(nodes))

    (loss, (aux, changed)), grads = jax.value_and_grad(compute, has_aux=True)(differentiated)
    return loss, aux, changed, grads


@functools.partial(jax.jit, static_argnames=("loss_fn", "cut", "has_aux"))
def value_and_grad(
    loss_fn: Callable[..., Any], cut: Cut, has_aux: bool, differentiated: Any, traced: Any, accumulated: Any
) -> Any:
    """``(loss, aux, changed, gradients)``, the gradients added to those accumulated so far (``None``: none yet)."""
    loss, aux, changed, grads = _evaluate(loss_fn, cut, has_aux, differentiated, traced)
    total = [grad if old is None else old + grad for grad, old in zip(grads, accumulated, strict=True)]
    return loss, aux, changed, total


@functools.partial(jax.jit, static_argnames=("loss_fn", "cut", "updates"), donate_argnames="slots")
def update_from_loss(
    loss_fn: Callable[..., Any], cut: Cut, updates: Updates, differentiated: Any, traced: Any, slots: Any, rows: Any
) -> Any:
    """Value, gradient and update in one program: ``(slots, parameters, loss, changed)``, as :func:`update_each`."""
    loss, _, changed, grads = _evaluate(loss_fn, cut, False, differentiated, traced)
    return *update_each(updates, differentiated, grads, slots, rows), loss, changed
