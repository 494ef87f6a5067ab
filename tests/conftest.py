"""Fixtures: seeds, strict promotion, double precision, PyTorch where it is installed, a count of compilations."""

import functools
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import settings

collect_ignore = ["two_processes.py"]  # a program, not a module

# Before anything asks for a device: the tests of meshes have eight, all others run on the first.
jax.config.update("jax_num_cpu_devices", 8)

# Random sequences compile programs, so CI has few of them. These are what `--hypothesis-profile` may name.
settings.register_profile("few", max_examples=5, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=150, deadline=None)
settings.load_profile("few")

COMPILED = "/jax/core/compile/backend_compile_duration"
_compiled: list[str] = []


def _listen(event: str, duration: float, **_: Any) -> None:
    if event == COMPILED:
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No dtype, and no number of axes, is promoted in silence: the library must not rely on it.

    Doctests and the code of pages, which are a user's, run by JAX's own rules.
    """
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 is float64, not float32; in PyTorch it is the default, which numbers kept for a parameter have."""
    if hasattr(jax, "enable_x64"):
        enable_x64 = jax.enable_x64
    else:
        from jax.experimental import enable_x64
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_default_dtype(torch.float64)
    with enable_x64(True):
        yield
    if torch is not None:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch, or the test is skipped."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist has the cores
    muon = importlib.import_module("torch.optim._muon")
    muon._zeropower_via_newtonschulz = in_full_precision(muon._zeropower_via_newtonschulz, torch.Tensor)
    return torch


def in_full_precision(function: Callable[..., Any], tensor: Any) -> Callable[..., Any]:
    """PyTorch's Newton-Schulz iteration without its rounding to bfloat16, which would hide every other difference."""

    @functools.wraps(function)  # which keeps the rounding one, as `__wrapped__`
    def wrapper(*args: Any) -> Any:
        with mock.patch.object(tensor, "bfloat16", tensor.clone):
            return function(*args)

    return wrapper


@pytest.fixture
def compilations() -> Callable[[], int]:
    """How many programs XLA has compiled so far: a test compares two readings."""
    return lambda: len(_compiled)
