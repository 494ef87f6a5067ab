"""A package that is too old is named, with the version that is needed."""

import importlib
import tomllib
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optimjax as optim
from optimjax import _core
from optimjax._core.versions import OLDEST, check_version


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks again, because what has been found new enough is not looked at twice."""
    check_version.cache_clear()
    yield monkeypatch
    check_version.cache_clear()


def test_they_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + project["optional-dependencies"]["interop"]
    needed = dict(entry.split(">=") for entry in listed)
    assert needed | OLDEST == needed


@pytest.mark.parametrize("version", ["0.8.0", "0.7.9", "0.8.0.dev20251001"])
def test_jax(versions: Any, version: str) -> None:
    versions.setattr(jax, "__version__", version)
    with pytest.raises(ImportError, match=f"optimjax needs jax 0.8.1 or newer, and this is jax {version}: pip install"):
        importlib.reload(_core)


@pytest.mark.parametrize("version", ["0.8.1", "0.8.1.dev20251101+g123", "0.12", "1.0.0"])
def test_a_newer_one(versions: Any, version: str) -> None:
    versions.setattr(jax, "__version__", version)
    importlib.reload(_core)


def test_flax_is_asked_for_where_its_modules_are_used(versions: Any) -> None:
    model, tree = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), {"w": jnp.ones(2)}
    versions.setattr(flax, "__version__", "0.11.2")
    optim.SGD(tree).step(tree)
    for use in (lambda: optim.Adam(model), lambda: list(optim.parameters(model)), lambda: optim.Adam(model.kernel)):
        with pytest.raises(ImportError, match=r"needs flax 0\.12\.1 or newer, and this is flax 0\.11\.2"):
            use()
