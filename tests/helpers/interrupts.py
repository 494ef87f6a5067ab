"""Ctrl-C at each line of a module: what a test calls to see that nothing is left half done."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def interrupted_everywhere(module: ModuleType, call: Callable[[], Any]) -> Iterator[bool]:
    """Call again and again with a KeyboardInterrupt at the next line of the module; at last without one.

    Yields after each call whether it was interrupted.
    """
    at, more = 0, True
    while more:
        at += 1
        more = _interrupted(module, call, at)
        yield more


def _interrupted(module: ModuleType, call: Callable[[], Any], at: int) -> bool:
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        lines += event == "line"
        if event == "line" and lines == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
