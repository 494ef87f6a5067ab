"""The short form and the thorough one; fixtures: seeds, strict promotion, double precision, PyTorch, compilations."""

import ctypes
import functools
import gc
import importlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import settings

# What test files share is not a test, and some of it is a program that a test starts.
collect_ignore = ["helpers"]
# An assertion in a helper says as much as one in a test.
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py")))

# Before anything asks for a device: the tests of meshes have eight, all others run on the first.
jax.config.update("jax_num_cpu_devices", 8)

# Random sequences compile programs, so there are few of them. These are what `--hypothesis-profile` may name.
settings.register_profile("few", max_examples=5, deadline=None, derandomize=True)
settings.register_profile("more", max_examples=15, deadline=None, derandomize=True)  # of the thorough form
settings.register_profile("thorough", max_examples=150, deadline=None)

# Most of the time of these tests goes into compiling small programs, so the short form asks XLA for quick ones: three
# times as fast in all. The thorough form runs what users run.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
USUAL: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # later ones have no such option, and compile quickly without it
    QUICK["xla_cpu_use_fusion_emitters"], USUAL["xla_cpu_use_fusion_emitters"] = False, True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="programs as users run them, and everything in between")


def pytest_configure(config: pytest.Config) -> None:
    thorough = config.getoption("--thorough")
    config.addinivalue_line("markers", "thorough: one more of a kind that the short form has, run by --thorough")
    if not hasattr(config, "workerinput"):  # the process that starts the workers, which share what one has compiled
        folder = tempfile.TemporaryDirectory(prefix="optimjax_tests_")
        config.add_cleanup(folder.cleanup)
        for name, value in (
            ("jax_compilation_cache_dir", folder.name),
            ("jax_persistent_cache_min_compile_time_secs", 0),
            ("jax_persistent_cache_min_entry_size_bytes", -1),
        ):
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # for workers, and for processes that tests start
        if not thorough:
            flags = (f"--{name}={value}" for name, value in QUICK.items())
            os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("more" if thorough else "few")


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector, which tests call often, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thorough"):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


COMPILED = "/jax/core/compile/backend_compile_duration"
MANY = 400
_compiled: list[str] = []


def _listen(event: str, duration: float, **_: Any) -> None:
    if event == COMPILED:
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """Now and then the compiled programs are dropped: a thousand of them take more than a gigabyte."""
    yield
    if len(_compiled) > MANY:
        _compiled.clear()
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # where what is free is kept by the process, in pieces
            ctypes.CDLL(None).malloc_trim(0)


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


@pytest.fixture
def usual() -> dict[str, Any]:
    """For ``lowered.compile(usual)``, where a test reads the program itself: the options under which users compile."""
    return USUAL
