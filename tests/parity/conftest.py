"""A fixture that several files of this folder ask for."""

from typing import Any

import pytest


@pytest.fixture
def double(torch: Any, x64: None) -> Any:
    """PyTorch with layers in float64."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(torch.float32)
