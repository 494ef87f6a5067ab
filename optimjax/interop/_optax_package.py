"""The package optax, which is imported only where it is used."""

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["accepted", "optax", "transformation"]


def optax() -> Any:
    """The package.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError("this needs optax, which is not installed: pip install 'optimjax[interop]'") from error
    return optax


def transformation(tx: Any) -> Any:
    """An optax transformation as a ``GradientTransformation``; ``MultiSteps`` has the methods of one.

    Raises:
      TypeError: it is none.
    """
    if hasattr(tx, "gradient_transformation"):  # which would drop extra arguments
        return optax().GradientTransformationExtraArgs(tx.init, tx.update)
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        hint = f": call it, as in {tx.__name__}(1e-3)" if callable(tx) and hasattr(tx, "__name__") else ""
        raise TypeError(f"tx must be an optax transformation, with init and update, got {tx!r}{hint}")
    return tx


def accepted(tx: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that the ``update`` of a transformation takes."""
    if not isinstance(tx, optax().GradientTransformationExtraArgs):
        return {}
    known = inspect.signature(tx.update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return dict(extra)
    return {name: value for name, value in extra.items() if name in known}
