"""Whether ``flax.nnx`` modules are still what they were, found without flattening them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

from optimjax._core.foreign import nnx
from optimjax._params.variable import holds_array

__all__ = ["Snapshot"]


class Snapshot:
    """What the structure of modules depends on, as it was at one moment.

    To flatten modules runs Python code for each module and each variable. But nothing has changed where every module
    has the same objects as attributes, and every variable holds an array and has the same metadata: that is a
    comparison of identities. Modules with attributes that can be changed in place, such as lists of arrays, and
    variables of trees, are not judged.
    """

    def __init__(self, modules: Sequence[Any]):
        self._modules = list(modules)
        self._attributes: list[dict[str, Any]] = []  # as they are now
        self._names: list[str] = []  # as they were
        self._values: list[Any] = []
        self._variables: list[Any] = []
        self._is_judged = self._note_all(list(modules))

    def _note_all(self, left: list[Any]) -> bool:
        """Note modules, variables and all that they hold; whether all of it can be judged."""
        seen: set[int] = set()
        while left:
            node = left.pop()
            if id(node) not in seen:
                seen.add(id(node))
                held = self._held(node)
                if held is None:
                    return False
                left += held
        return True

    def _held(self, node: Any) -> list[Any] | None:
        """Note a module or a variable; the modules and variables that it holds, ``None`` if it cannot be judged."""
        flax_nnx = nnx()
        if isinstance(node, flax_nnx.Variable):
            if not holds_array(node):
                return None
            self._variables.append(node)
            self._note(node._var_metadata)
            return []
        # Which attributes hold arrays: a mapping that flax.nnx never edits, but replaces.
        nodes: Any = getattr(node, "_pytree__nodes", None)
        if not getattr(node, "_pytree__is_pytree", False) or not isinstance(nodes, Mapping):
            return None
        self._note(vars(node))
        held = [
            value
            for name, value in vars(node).items()  # the names of the items of a list may be integers
            if value is not None and nodes.get(name) and not str(name).startswith("_pytree__")
        ]
        return held if all(isinstance(value, (flax_nnx.Pytree, flax_nnx.Variable)) for value in held) else None

    def _note(self, attributes: dict[str, Any]) -> None:
        self._attributes.append(attributes)
        self._names += attributes
        self._values += attributes.values()

    def holds(self, modules: Sequence[Any]) -> bool:
        """Whether these are the same modules, and nothing has changed."""
        if not self._is_judged or len(modules) != len(self._modules) or not all(map(is_, modules, self._modules)):
            return False
        # In few calls of C code, because there may be hundreds of modules.
        values = list(chain.from_iterable(map(dict.values, self._attributes)))
        return (
            len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and list(chain.from_iterable(self._attributes)) == self._names
            and all(map(holds_array, self._variables))
        )
