"""Data, values and names that the tests of models share."""

from typing import Any, NamedTuple

import numpy as np

__all__ = ["KERNEL", "Named", "X", "names_of"]

X = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)


def names_of(optimizer: Any) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


class Named(NamedTuple):
    kernel: Any
    bias: Any = None
