"""Hooks: functions that run before and after a step, and around saving and loading, as in PyTorch."""

import itertools
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

__all__ = ["Hooks", "RemovableHandle", "global_hooks"]


class RemovableHandle:
    """What registering a hook returns: ``remove()`` takes it off again; also a context manager.

    Attributes:
      id: a number that no other hook has.
    """

    def __init__(self, hooks: "HookList", key: int):
        self._hooks = hooks
        self.id = key

    def remove(self) -> None:
        """Take the hook off; a second call does nothing."""
        self._hooks.pop(self.id, None)

    def __enter__(self) -> "RemovableHandle":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.remove()


class HookList(OrderedDict[int, Callable[..., Any]]):
    """The hooks of one kind, in the order in which they run."""

    _keys = itertools.count()

    def add(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Register a hook, last or first.

        Raises:
          TypeError: it cannot be called.
        """
        if not callable(hook):
            raise TypeError(f"a hook must be callable, got {type(hook).__name__}: {hook!r}")
        key = next(self._keys)
        self[key] = hook
        if prepend:
            self.move_to_end(key, last=False)
        return RemovableHandle(self, key)

    def notify(self, optimizer: Any) -> None:
        """Run hooks that only get the optimizer."""
        for hook in list(self.values()):
            hook(optimizer)

    def replace(self, optimizer: Any, state_dict: Any) -> Any:
        """Run hooks that may return a state dict in place of the one they are given."""
        for hook in list(self.values()):
            replacement = hook(optimizer, state_dict)
            if replacement is not None:
                state_dict = replacement
        return state_dict


class Hooks:
    """The hooks of one optimizer, or those of all (:data:`global_hooks`)."""

    def __init__(self) -> None:
        self.step_pre = HookList()
        self.step_post = HookList()
        self.state_dict_pre = HookList()
        self.state_dict_post = HookList()
        self.load_state_dict_pre = HookList()
        self.load_state_dict_post = HookList()

    def before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the hooks before a step, the global ones first; each may return new ``(args, kwargs)``."""
        for hook in [*global_hooks.step_pre.values(), *self.step_pre.values()]:
            result = hook(optimizer, args, kwargs)
            if result is not None:
                if not isinstance(result, tuple) or len(result) != 2:
                    name = getattr(hook, "__qualname__", type(hook).__name__)
                    got = " ".join(reprlib.repr(result).split())  # in one line
                    raise RuntimeError(
                        f"step pre-hook {name} of {type(optimizer).__name__} must return None or a tuple of "
                        f"(new_args, new_kwargs), but got {got}"
                    )
                args, kwargs = result
        return args, kwargs

    def after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the hooks after a step, the global ones last."""
        for hook in [*self.step_post.values(), *global_hooks.step_post.values()]:
            hook(optimizer, args, kwargs)


global_hooks = Hooks()
