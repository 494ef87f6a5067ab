"""The documentation's code runs and prints what is shown, and its page of algorithms can be made from the package."""

import inspect
import pkgutil
import re
from pathlib import Path

import generate_algorithms
import pages
import pytest

from optimjax import algorithms
from optimjax.algorithms import adam

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_code_runs(page):
    pages.run(page)


def test_a_page_that_shows_something_else_is_refused(tmp_path):
    page = tmp_path / "page.md"
    text = "```python\nprint('loss', 1 / 3)\n```\n\n```text\n{}\n```\n"
    page.write_text(text.format("loss 0.3333333333333334"))  # one in the last digit is rounding
    assert pages.run(page) == ["loss 0.3333333333333333"]
    for wrong in ("loss 0.3333333333333335", "rate 0.3333333333333333", "loss", ""):
        page.write_text(text.format(wrong))
        with pytest.raises(AssertionError, match="shown:"):
            pages.run(page)


def test_every_page_is_in_the_table_of_contents():
    contents = "".join(re.findall(r"```{toctree}(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)).split()
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= set(contents)


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(algorithms.__path__) if not module.ispkg]
)
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
