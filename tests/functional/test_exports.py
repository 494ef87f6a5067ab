"""What the package exports, the table of cases and PyTorch's signatures agree."""

import importlib
import inspect
import pkgutil
from typing import Any

import jax.numpy as jnp
import pytest
from cases import CASES, EVERY, Case

import optimjax as optim
from optimjax import algorithms
from optimjax import functional as F

MODULES = [
    importlib.import_module(f"{algorithms.__name__}.{m.name}")
    for m in pkgutil.iter_modules(algorithms.__path__)
    if not m.ispkg
]
EXPORTS = [(name, getattr(module, name)) for module in MODULES for name in module.__all__]
every_case = pytest.mark.parametrize("case", EVERY, ids=str)


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    """Those of the algorithm: the options of a whole optimizer, which all have, are left out."""
    given = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in given if p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize(("name", "value"), EXPORTS, ids=[name for name, _ in EXPORTS])
def test_every_algorithm_is_exported_tested_and_documented(name: str, value: Any) -> None:
    package = optim if isinstance(value, type) else F
    assert getattr(package, name) is value
    assert name in package.__all__
    assert name in [tested.__name__ for case in EVERY for tested in (case.optimizer, case.factory)]
    assert inspect.getdoc(value)
    if isinstance(value, type):
        assert ">>>" in (value.__doc__ or "")


def test_every_case_is_of_an_exported_algorithm() -> None:
    for case in EVERY:
        assert issubclass(case.optimizer, getattr(optim, case.optimizer.__name__))  # a stand-in is derived from it
        assert (case.factory is getattr(F, case.factory.__name__)) != case.sparse


@pytest.mark.parametrize("package", [optim, F], ids=lambda package: package.__name__)
def test_all_names_what_is_there(package: Any) -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


@pytest.mark.parametrize("package", [optim, F], ids=lambda package: package.__name__)
def test_dir_shows_what_is_public(package: Any) -> None:
    assert [name for name in dir(package) if not name.startswith("__")] == sorted(package.__all__)
    assert {"__all__", "__doc__", "__file__", "__name__", "__spec__"} <= set(dir(package))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adam", ": you may mean optim.Adam, or the pure function optim.functional.adam"),
        ("Sparse_Adam", ": you may mean optim.SparseAdam, or the pure function optim.functional.sparse_adam"),
        ("StepLR", ": you may mean optim.lr_scheduler.StepLR"),
        ("cosine_annealing", ": you may mean optim.schedules.cosine_annealing"),
        ("AveragedModel", ": you may mean optim.swa_utils.AveragedModel"),
        ("to_optax", ": you may mean optim.interop.optax.to_optax"),
        ("absent", ""),
        ("__wrapped__", ""),
    ],
)
def test_a_name_that_is_not_there(name: str, hint: str) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(optim, name)
    assert str(error.value) == f"module 'optimjax' has no attribute {name!r}{hint}"
    assert not hasattr(optim, name)


@every_case
def test_signature_is_pytorchs(torch: Any, case: Case) -> None:
    theirs = arguments(case.reference(torch))
    ours = arguments(case.optimizer)
    assert ours[: len(theirs)] == theirs
    assert {name for name, _, _ in ours[len(theirs) :]} == set(case.beyond)
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(theirs) :])


@every_case
def test_factory_takes_what_the_class_takes(case: Case) -> None:
    assert arguments(case.factory) == arguments(case.optimizer)[1:]
    assert case.factory.__name__.replace("_", "") == case.optimizer.__name__.lower()


@every_case
def test_the_case_covers_every_option(case: Case) -> None:
    options = {name for name, _, _ in arguments(case.factory)}
    assert options == case.other.keys() | case.ignored.keys()
    assert case.other.keys().isdisjoint(case.ignored)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_are_the_options(case: Case) -> None:
    optimizer = case.optimizer(case.fit([jnp.ones(1)]))
    assert {name: default for name, _, default in arguments(case.factory)}.items() <= optimizer.defaults.items()
