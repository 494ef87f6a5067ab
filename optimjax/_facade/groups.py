"""Groups of parameters as an optimizer takes them: what may be in one, and errors for what looks like one."""

import difflib
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optimjax._core import definition as _definition
from optimjax._core.containers import as_array
from optimjax._core.definition import Definition
from optimjax._core.foreign import from_tensor
from optimjax._core.guard import Options
from optimjax._params.source import ParameterSource, Source, is_single, not_parameters, source_of

__all__ = ["check_not_options", "defaults_of", "is_list_of_groups", "new_group", "without_tensors"]

Groups = Sequence[Mapping[str, Any]]


def new_group(
    given: Any, groups: Groups, defaults: Mapping[str, Any], definition: Definition, where: str
) -> tuple[dict[str, Any], Source]:
    """A group made from what the user has given, and the source of its parameters.

    Args:
      given: a dict with ``params`` and options.
      groups: those that there are.
      defaults: options that the dict may leave out, unless it has an ``algorithm``.
      definition: what updates the group, unless it has an ``algorithm``.
      where: the group's place, for messages.

    Raises:
      TypeError: not a dict, or nothing in it can be a parameter, or an option is misspelt, of another type, or one of
        another algorithm.
      ValueError: it has no parameters, an option is out of range, a parameter is in two groups, an algorithm that
        cannot share an optimizer.
    """
    if not isinstance(given, dict):
        raise TypeError(f"param_group must be a dict, but got {type(given).__name__}: {given!r}")
    if "params" not in given:
        raise ValueError(f"param_group has no 'params', only {list(given)}")
    params = given["params"]
    source = source_of([params] if is_single(params) else params)
    if not source.parameters and (params is None or jax.tree_util.all_leaves([params])):
        raise TypeError(not_parameters(f"params{where}", params))
    options = {name: without_tensors(value) for name, value in given.items()}
    algorithm = options.pop("algorithm", None)
    if algorithm is not None:
        definition = _algorithm(algorithm, definition, where)
        defaults = {"algorithm": definition.owner, **defaults_of(definition, options)}
        _check_not_of_others(options, definition, where)
    group: dict[str, Any] = {**defaults, **options, "params": list(source.parameters)}
    names = group.pop("param_names", None)
    if isinstance(source, ParameterSource) and source.names is None and names and len(names) == len(source.parameters):
        source = ParameterSource(zip(names, source.parameters, strict=True))  # a group of another optimizer
    # A group without parameters neither has names nor lacks them, and is as the groups before it.
    names_of_none = [] if any("param_names" in other for other in groups) else None
    names = source.names if source.parameters else names_of_none
    if names is not None:
        group["param_names"] = list(names)
    _check_keys(options, definition, defaults, where)
    definition.check(group, where)
    _check_apart(group, groups, where)
    return group, source


def _algorithm(algorithm: Any, own: Definition, where: str) -> Definition:
    """What updates a group, by its ``algorithm``: a class, or the name of one of ours."""
    known = {definition.name: definition for definition in _definition.package}
    if isinstance(algorithm, str):
        if algorithm not in known:
            near = difflib.get_close_matches(algorithm, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"algorithm{where} must be an optimizer class or the name of one, got {algorithm!r}{hint}")
        definition = known[algorithm]
    else:
        definition = getattr(algorithm, "definition", None)
        if isinstance(definition, Definition) and not isinstance(algorithm, type):
            raise TypeError(f"algorithm{where} must be the class {definition.name} itself, not an optimizer made of it")
        if not isinstance(algorithm, type) or not isinstance(definition, Definition):
            raise TypeError(f"algorithm{where} must be an optimizer class or the name of one, got {algorithm!r}")
    for one in (own, definition):
        if one.rule is None or (one is definition and one.own_step):
            raise ValueError(
                f"{one.name} has a step of its own, so it cannot share an optimizer: see 'algorithm'{where}"
            )
    return definition


def defaults_of(definition: Definition, options: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The options of a group with an ``algorithm``, with the defaults of its class.

    What the class sets by itself, as ``AdamW`` decoupled decay, its constructor does not take.
    """
    taken = inspect.signature(definition.owner).parameters
    passes_on = any(
        parameter.kind is parameter.VAR_KEYWORD and "Options" not in str(parameter.annotation)
        for parameter in taken.values()
    )
    known = {name for name in definition.hyperparameters.kinds if passes_on or name in taken}
    given = {name: value for name, value in options.items() if name in known}
    return {name: without_tensors(value) for name, value in definition.defaults(**given).items()}


def _check_not_of_others(options: Mapping[str, Any], definition: Definition, where: str) -> None:
    """Raise for an option of another of our algorithms, which would have no effect."""
    known = definition.hyperparameters.kinds
    for name in options:
        others = [other.name for other in _definition.package if name in other.hyperparameters.kinds]
        if name not in known and others:
            raise TypeError(
                f"{name!r}{where} is an option of {', '.join(others[:3])}; {definition.name}, the algorithm of this "
                f"group, knows {sorted(known)}"
            )


def _check_keys(group: Mapping[str, Any], definition: Definition, defaults: Mapping[str, Any], where: str) -> None:
    """Raise for a misspelt option; a key that resembles none is the user's own."""
    known = definition.hyperparameters.kinds.keys() | defaults.keys() | {"algorithm"}
    if whole := [name for name in Options.__annotations__ if name in group and name not in known]:
        raise TypeError(
            f"{whole[0]!r}{where} is an option of the whole optimizer, because it concerns the gradients of all "
            f"parameters together: {definition.name}(params, {whole[0]}=...)"
        )
    for name in group:
        meant = None if name in known else _meant(name, known)
        if meant is not None and not any(name in other.hyperparameters.kinds for other in _definition.package):
            raise TypeError(
                f"unknown option {name!r}{where}: did you mean {meant!r}? {definition.name} knows "
                f"{sorted(known)}; entries of your own need a name that does not resemble these"
            )


# What these options are called elsewhere.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "algo": "algorithm",
    "optimizer": "algorithm",
}


def _meant(name: Any, options: Iterable[str]) -> str | None:
    """The option that a key resembles; one that says more, such as ``lr_scale``, is another word."""
    if name in ("params", "param_names", "name") or not isinstance(name, str):
        return None
    known = {*options, "params"}
    lower = name.lower()
    if lower in known and name != lower:
        return lower
    if (other := _OTHER_NAMES.get(lower)) in known:
        return other
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return None if not near or name.startswith(f"{near[0]}_") or name.endswith(f"_{near[0]}") else near[0]


def _check_apart(group: Mapping[str, Any], groups: Groups, where: str) -> None:
    """Raise where a new group and those before it do not go together."""
    seen = {parameter for other in groups for parameter in other["params"]}
    double = [str(parameter) for parameter, count in Counter(group["params"]).items() if count > 1]
    if double:
        raise ValueError(f"a parameter appears more than once{where}: {', '.join(double)}")
    twice = [str(parameter) for parameter in group["params"] if parameter in seen]
    if twice:
        raise ValueError(f"some parameters appear in more than one parameter group: {', '.join(twice)}")
    for other in groups:
        if other["params"] and ("param_names" in other) != ("param_names" in group):
            with_or_without = "with names" if "param_names" in group else "without names"
            raise ValueError(
                "all optimizer param groups should be with/without names. "
                f"cannot add param group {with_or_without} to the optimizer"
            )


def is_list_of_groups(params: Any) -> bool:
    """Whether this is a list of dicts that each have ``params``.

    Raises:
      ValueError: only some of them have.
    """
    if not isinstance(params, (list, tuple)) or not params or not all(isinstance(group, dict) for group in params):
        return False
    without = [index for index, group in enumerate(params) if "params" not in group]
    if without and len(without) < len(params):
        raise ValueError(f"param_groups[{without[0]}] has no 'params', only {list(params[without[0]])}")
    return not without


def check_not_options(params: Any, options: Iterable[str]) -> None:
    """Raise for misspelt groups, which would be taken for a tree, and their options ignored."""
    if not isinstance(params, (list, tuple, dict)):
        return
    for item in params.values() if isinstance(params, dict) else params:
        check_not_options(item, options)
    if not isinstance(params, dict):
        return
    given = [name for name, value in params.items() if name in options and _is_option(value)]
    near = [str(name) for name in params if difflib.get_close_matches(str(name), ["params"])]
    if given and (near or {"lr", "weight_decay", "betas"} & {*given}):
        option = given[0]
        raise ValueError(
            f"{option!r} is an option, here {params[option]!r}, in a dict that is taken for a tree of parameters "
            f"because it is not a group: groups are a list of dicts, each with 'params', as in "
            f"[{{'params': ..., {option!r}: {params[option]!r}}}]; this one has the keys {list(params)}"
        )


def _is_option(value: Any) -> bool:
    """Whether this can be the value of an option, and not a leaf that is trained."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_option, value))
    return isinstance(value, (bool, int, float, np.generic))


def without_tensors(value: Any) -> Any:
    """The value of an option, with JAX's arrays in place of PyTorch's."""
    if isinstance(value, tuple):
        return tuple(map(without_tensors, value))
    return as_array(from_tensor(value)) if hasattr(value, "detach") else value
