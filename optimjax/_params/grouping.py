"""Groups of parameters chosen by their names."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from optimjax._params.parameter import Parameter
from optimjax._params.source import Source, not_parameters, source_of

__all__ = ["ParameterGroups", "group_parameters", "matcher", "named_source", "nothing_matches"]


class ParameterGroups(list[dict[str, Any]]):
    """Groups for an optimizer, and the whole that they were made from.

    :func:`group_parameters` and :func:`optimjax.muon_groups` return it.

    Attributes:
      source: the tree or module.
      frozen: ``(name, parameter)`` of those that no group has; ``add_param_group`` takes the list.
    """

    def __init__(self, groups: list[dict[str, Any]], source: Source, frozen: list[tuple[str, Parameter]]):
        super().__init__(groups)
        self.source = source
        self.frozen = frozen

    def __add__(self, groups: list[dict[str, Any]]) -> "ParameterGroups":  # pyright: ignore[reportIncompatibleMethodOverride]
        """These groups and others, of the same whole."""
        return ParameterGroups([*self, *groups], self.source, self.frozen)

    def __getitem__(self, key: Any) -> Any:
        """A group, or for a slice the groups, of the same whole."""
        found = super().__getitem__(key)
        return ParameterGroups(found, self.source, self.frozen) if isinstance(key, slice) else found

    def __repr__(self) -> str:
        groups = [group | {"params": _names(group.get("params"))} for group in self]
        return f"ParameterGroups({groups}, frozen={_names(self.frozen)})"


def group_parameters(params: Any, rules: Sequence[Mapping[str, Any]]) -> ParameterGroups:
    """Sort the parameters of a tree or module into groups, by name.

    The optimizer made from them treats the tree or module as one whole: ``optimizer.params`` and the gradients given to
    ``step`` have its structure.

    Args:
      params: a pytree of arrays, a ``flax.nnx`` module, or ``(name, Parameter)`` pairs.
      rules: dicts like parameter groups, whose ``params`` says which: a glob (``"base.*"``; ``*`` also matches dots), a
        compiled regular expression, which is searched for in the dotted name, or a function ``(name, value) -> bool``.
        The first rule that matches a parameter has it. Those that none matches form a last group on the optimizer's
        defaults. With ``requires_grad=False`` in place of options the parameters are frozen: they are in no group and
        have no state.

    Raises:
      ValueError: a rule matches nothing; the message names near misses. Or parameters have no names.
      TypeError: a rule of another form.

    >>> import jax.numpy as jnp, optimjax as optim
    >>> params = {"base": {"w": jnp.ones(2), "b": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    >>> groups = optim.group_parameters(
    ...     params, [{"params": "base.b", "requires_grad": False}, {"params": "base.*", "lr": 0.1}]
    ... )
    >>> groups
    ParameterGroups([{'lr': 0.1, 'params': ['base.w']}, {'params': ['head.w']}], frozen=['base.b'])
    >>> optimizer = optim.SGD(groups, lr=1.0)
    >>> optimizer.step({"base": {"w": jnp.ones(2), "b": None}, "head": {"w": jnp.ones(2)}})
    >>> print(optimizer.params["base"]["w"], optimizer.params["base"]["b"], optimizer.params["head"]["w"])
    [0.9 0.9] [1. 1.] [0. 0.]
    """
    source, named = named_source(params, "params")
    left = dict(named)
    groups, frozen, grads = [], [], {}
    for index, rule in enumerate(rules):
        where = f"rules[{index}]"
        if not isinstance(rule, Mapping) or "params" not in rule:
            raise TypeError(f"{where} must be a dict with 'params', got {rule!r}")
        if not isinstance(rule.get("requires_grad", True), bool):
            raise TypeError(f"'requires_grad' of {where} must be True or False, got {rule['requires_grad']!r}")
        matches = matcher(rule["params"], f"'params' of {where}")
        members = [(name, parameter) for name, parameter in left.items() if matches(name, parameter.value)]
        if not members:
            raise ValueError(nothing_matches(where, rule["params"], matches, named))
        for name, parameter in members:
            del left[name]
            grads[parameter] = rule.get("requires_grad", parameter.requires_grad)
        options = {key: value for key, value in rule.items() if key not in ("params", "requires_grad")}
        if rule.get("requires_grad", True):
            groups.append({**options, "params": members})
        elif options:
            raise TypeError(f"{where} freezes its parameters, so {sorted(options)} would have no effect: leave it out")
        else:
            frozen += members
    if left:
        groups.append({"params": list(left.items())})
    for parameter, wanted in grads.items():
        parameter.requires_grad = wanted
    return ParameterGroups(groups, source, frozen)


def named_source(params: Any, what: str) -> tuple[Source, list[tuple[str, Parameter]]]:
    """The source of what is to be grouped, and its parameters with their names.

    Raises:
      TypeError: the argument ``what`` has no parameters.
      ValueError: its parameters have no names.
    """
    source = source_of(params)
    if not source.parameters and jax.tree_util.all_leaves([params]):
        raise TypeError(not_parameters(what, params))
    if source.names is None:
        raise ValueError("parameters without names cannot be grouped by name: give (name, Parameter) pairs")
    return source, list(zip(source.names, source.parameters, strict=True))


def _names(params: Any) -> Any:
    """Names only, so that the assignment is readable; items that the user added are unchanged."""
    return [item[0] if isinstance(item, tuple) else item for item in params] if isinstance(params, list) else params


def matcher(pattern: Any, what: str) -> Callable[[str, Any], Any]:
    """The function ``(name, value)`` that says whether a pattern matches.

    Raises:
      TypeError: ``what`` is not a pattern.
    """
    if isinstance(pattern, str):
        return lambda name, value: fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return lambda name, value: pattern.search(name)
    if callable(pattern):
        return pattern
    raise TypeError(f"{what} must be a glob, a compiled regular expression or a function, got {pattern!r}")


def nothing_matches(
    where: str, pattern: Any, matches: Callable[[str, Any], Any], named: list[tuple[str, Parameter]]
) -> str:
    """The message for a pattern that has no parameter; it names those with a similar name."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    taken = [name for name, parameter in named if matches(name, parameter.value)]
    if taken:
        return f"{where} ({text!r}) matches only what rules before it have: {', '.join(taken[:3])}"
    names = [name for name, _ in named]
    near = difflib.get_close_matches(text, names, cutoff=0.3) if isinstance(text, str) else []
    return f"{where} ({text!r}) matches no parameter; there are, for example, {', '.join(near or names[:3])}"
