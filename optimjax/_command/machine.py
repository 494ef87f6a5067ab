"""What a report of a bug or a measurement should say: versions, devices, threads, settings and folders."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import optimjax
from optimjax._core.processors import usable_cores

__all__ = ["facts", "lines"]

REQUIRED = ("jax", "jaxlib", "numpy", "chex", "flax", "safetensors")
# What is there for some purpose, and how it is installed.
EXTRAS = {
    "optax": 'pip install "optimjax[interop]"',
    "torch": "pip install torch",
    "matplotlib": 'pip install "optimjax[demo]"',
    "rich": 'pip install "optimjax[demo]"',
    "scikit-learn": 'pip install "optimjax[demo]"',
    "equinox": "pip install equinox",
    "orbax-checkpoint": "pip install orbax-checkpoint",
}
OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
    "jax_debug_nans",
    "jax_default_device",
    "jax_num_cpu_devices",
)
# Besides those that begin with JAX_ or XLA_. No others are read: they may hold secrets.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH")


def facts() -> dict[str, Any]:
    """All of it, as plain data. Starts JAX's backend, because only that knows the devices."""
    devices: dict[str, int] = {}
    for device in jax.devices():
        kind, backend = device.device_kind, device.platform
        name = backend if kind == backend else f"{backend}, {kind}"
        devices[name] = devices.get(name, 0) + 1
    return {
        "optimjax": {"version": optimjax.__version__, "folder": str(Path(optimjax.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": usable_cores(),
            "memory_gb": _memory(),
            "compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        },
        "devices": devices,
        "processes": jax.process_count(),
        "packages": {name: _version(name) for name in REQUIRED},
        "extras": {name: _version(name) for name in EXTRAS},
        "options": {name: str(value) for name in OPTIONS if (value := getattr(jax.config, name, None)) is not None},
        "cache": _cache(),
        "environment": dict(sorted(_environment())),
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The same for people, a line for each thing."""
    system, python = found["system"], found["python"]
    yield f"optimjax {found['optimjax']['version']} in {found['optimjax']['folder']}"
    yield f"Python {python['version']}, {python['executable']}"
    memory = f", {system['memory_gb']:.0f} GB of memory" if system["memory_gb"] else ""
    yield f"{system['platform']}, {system['processor']}, {system['cores']} cores for this process{memory}"
    yield f"C compiler: {system['compiler'] or 'none'}"
    yield ""
    for name, count in found["devices"].items():
        yield f"{count} device{'s' * (count > 1)} of JAX: {name}"
    if found["processes"] > 1:
        yield f"{found['processes']} processes"
    yield ""
    for name, version in {**found["packages"], **found["extras"]}.items():
        yield f"{name:18}" + (version or f"not installed: {EXTRAS.get(name, 'pip install ' + name)}")
    yield ""
    for name, value in found["options"].items():
        yield f"{name} = {value}"
    cache = found["cache"]
    kept = f"{cache['folder']}, {cache['programs']} programs, {cache['mb']:.0f} MB" if cache["folder"] else "none"
    yield f"compiled programs are kept in: {kept}"
    for name, value in found["environment"].items():
        yield f"{name}={value}"


def _version(package: str) -> str | None:
    """What is installed, without importing it, which takes seconds for some."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # only Linux has it
        pass
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (AttributeError, OSError, ValueError):  # Windows has no such function, other systems no such names
        return None


def _cache() -> dict[str, Any]:
    """JAX's folder of compiled programs, if one is set, and how much is in it."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    sizes = []
    if folder:
        try:
            with os.scandir(folder) as entries:
                sizes = [entry.stat().st_size for entry in entries if entry.name.endswith("-cache")]
        except OSError:  # not made yet, or a bucket that is not on a disk
            pass
    return {"folder": folder, "programs": len(sizes), "mb": sum(sizes) / 1e6}


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if name.startswith(("JAX_", "XLA_")) or name in VARIABLES:
            yield name, value
