"""optax and PyTorch, as far as they are installed and have the device on which JAX runs."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

__all__ = ["Neighbours"]


@dataclass(frozen=True)
class Neighbours:
    """What a comparison can be with.

    Attributes:
      optax: the package, or ``None``.
      torch: the package, or ``None``.
      left_out: why the others are not there, and what to do, by name.
    """

    optax: Any
    torch: Any
    left_out: dict[str, str]

    @classmethod
    def find(cls) -> "Neighbours":
        """Import what there is."""
        optax, torch, left_out = None, None, {}
        try:
            import optax
        except ImportError:
            left_out["optax"] = 'optax is not installed: pip install "optimjax[interop]"'
        try:
            import torch
        except ImportError:
            left_out["PyTorch"] = "PyTorch is not installed: pip install torch"
        backend = jax.default_backend()
        if torch is not None and backend not in ("cpu", "gpu"):
            torch, left_out["PyTorch"] = None, f"JAX runs on a {backend}, where PyTorch cannot follow"
        if torch is not None and backend == "gpu" and not torch.cuda.is_available():
            torch, left_out["PyTorch"] = None, "JAX runs on a GPU, and this PyTorch has none: install a build for it"
        return cls(optax, torch, left_out)

    def tensor(self, array: np.ndarray) -> Any:
        """An array for PyTorch, on the device on which JAX runs."""
        return self.torch.tensor(array, device="cuda" if jax.default_backend() == "gpu" else "cpu")

    def wait(self) -> None:
        """Until PyTorch is done; on a CPU it always is."""
        if jax.default_backend() == "gpu":
            self.torch.cuda.synchronize()
