"""The documentation's code runs, and its page of algorithms can be made from the package."""

import inspect
import pkgutil
import re
from pathlib import Path

import generate_algorithms
import pytest

from optimjax import algorithms
from optimjax.algorithms import adam

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_code_runs(page):
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(algorithms.__path__)])
def test_section_of_an_algorithm(name):
    entry = generate_algorithms.read(name)
    assert ".. math::" in entry.equations
    section = generate_algorithms.section(entry)
    assert [option for option in inspect.signature(entry.cls).parameters if f"``{option}" not in section] == []


def test_memory():
    entry = generate_algorithms.read("adam")
    assert generate_algorithms.memory(entry) == ["8", "12"]
    assert "``max_exp_avg_sq``" in generate_algorithms.state_table(entry)


@pytest.mark.parametrize("part", ["Adam: ", "Source: ", "Differs from PyTorch:", "Differs from optax:"])
def test_a_module_docstring_without_a_part_is_refused(monkeypatch, part):
    monkeypatch.setattr(adam, "__doc__", adam.__doc__.replace(part, ""))
    with pytest.raises(ValueError, match="adam has not the layout"):
        generate_algorithms.read("adam")


def test_an_argument_that_is_not_described_is_refused(monkeypatch):
    monkeypatch.setattr(adam.Adam, "__doc__", adam.Adam.__doc__.replace("eps: ", ""))
    with pytest.raises(ValueError, match="Args of Adam does not describe eps"):
        generate_algorithms.section(generate_algorithms.read("adam"))
