"""The repr of an optimizer is PyTorch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimjax as optim


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Adam", {}),
        ("AdamW", {"lr": 1e-3, "amsgrad": True}),
        ("RMSprop", {"centered": True}),
        ("Adagrad", {"lr_decay": 0.1}),
    ],
)
def test_repr_is_pytorchs(name: str, options: Any, torch: Any) -> None:
    def build(module: Any, box: Callable[[Any], Any]) -> Any:
        first, second = box(np.ones(2)), box(np.ones(3))
        optimizer = getattr(module, name)([{"params": [first]}, {"params": [second], "lr": 0.5}], **options)
        optimizer.param_groups[0]["lr"] = 0.25
        return optimizer

    ours = build(optim, optim.Parameter)
    theirs = build(torch.optim, lambda value: torch.nn.Parameter(torch.from_numpy(value)))
    assert repr(ours).splitlines() == repr(theirs).splitlines()
