"""What the user has handed in as parameters, whole or by groups: their view of it, and gradients of that view."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optimjax._params.parameter import Parameter
from optimjax._params.source import ModuleSource, ParameterSource, Source

__all__ = ["Handed", "name_of"]


class Handed:
    """What an optimizer was made from.

    Attributes:
      sources: what was handed in, in order: one for the whole, or one for each group.
      grouped: whether the view is a list with one entry for each of them.
    """

    def __init__(self, sources: Iterable[Source] = (), grouped: bool = False):
        self.sources, self.grouped = list(sources), grouped

    def extended(self, source: Source, parameters: Iterable[Parameter]) -> "Handed":
        """With what a new group was made from, unless all of its parameters are in view already."""
        shown = {parameter for other in self.sources for parameter in other.parameters}
        if shown.issuperset(parameters):  # of a whole, unfrozen
            return self
        module = source.bound and bool(self.sources) and isinstance(self.sources[0], ModuleSource)
        return Handed([*self.sources, source], self.grouped or (bool(self.sources) and not module))

    def follow(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over the parameters of groups whose lists were edited, where these are the user's own parameters."""
        if len(self.sources) == len(groups):
            for index, (source, group) in enumerate(zip(self.sources, groups, strict=True)):
                if isinstance(source, ParameterSource) and source.parameters != group["params"]:
                    self.sources[index] = source.following(group, f" of param_groups[{index}]")

    @property
    def bound(self) -> bool:
        """Whether all belong to modules, which the user passes to the loss function."""
        return all(source.bound for source in self.sources)

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters in view, in order."""
        return [parameter for source in self.sources for parameter in source.parameters]

    def view(self) -> Any:
        """What ``optimizer.params`` shows."""
        return self._each(lambda source: source.view())

    def with_parameters(self) -> Any:
        """The view with parameters in place of the arrays to be differentiated."""
        return self._each(lambda source: source.with_parameters())

    def arranged(self, values: Mapping[Parameter, Any]) -> Any:
        """The view with these values for the parameters and ``None`` for all else."""
        return self._each(lambda source: source.arranged(values))

    def _each(self, look: Callable[[Source], Any]) -> Any:
        views = list(map(look, self.sources))
        return views if self.grouped else views[0]

    def pairs(self, grads: Any) -> Iterable[tuple[Parameter, Any]]:
        """Each parameter with its gradient, of gradients that have the structure of the view.

        Raises:
          ValueError: they have another structure.
        """
        parts = [grads]
        if self.grouped:
            if not isinstance(grads, (list, tuple)) or len(grads) != len(self.sources):
                raise ValueError(f"gradients must be a list with one entry for each of {len(self.sources)} groups")
            parts = list(grads)
        elif len(self.sources) > 1:
            raise ValueError("groups were added to this module's optimizer: use backward() and step(), or a loss_fn")
        gradients = [source.gradients(part) for source, part in zip(self.sources, parts, strict=True)]
        return zip(self.parameters, itertools.chain.from_iterable(gradients), strict=True)


def name_of(parameter: Parameter, groups: Sequence[Mapping[str, Any]]) -> str:
    """For messages: a parameter's name, or its place in the groups."""
    places = (
        f"params[{position}] of param_groups[{index}]"
        for index, group in enumerate(groups)
        for position, other in enumerate(group["params"])
        if other is parameter
    )
    return parameter.name or next(places, str(parameter))
