"""Whether JAX is just tracing a function."""

from typing import Any

import jax
from jax.core import Tracer

__all__ = ["holds_tracer", "is_top_level", "trace_state"]

try:
    from jax.extend.core import get_opaque_trace_state as trace_state
except ImportError:  # before JAX 0.9
    from jax.core import get_opaque_trace_state as trace_state  # pyright: ignore[reportAttributeAccessIssue]

with jax.ensure_compile_time_eval():
    _TOP_LEVEL = trace_state()


def is_top_level(state: Any) -> bool:
    """Whether this trace state is the one outside of all of JAX's transformations."""
    return state == _TOP_LEVEL


def holds_tracer(tree: Any) -> bool:
    """Whether a leaf of a tree is traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
