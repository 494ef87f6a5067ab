"""A module with batch statistics whose average is taken."""

from typing import Any

from flax import nnx

__all__ = ["Net"]


class Net(nnx.Module):
    def __init__(self, rngs: Any):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.linear(x)))
