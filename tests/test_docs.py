"""The documentation's code runs, and its page of algorithms names every one."""

import re
from pathlib import Path

import pytest

from optimjax import functional

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_code_runs(page):
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


def test_every_algorithm_has_its_page():
    pages = (DOCS / "algorithms.md").read_text(), (DOCS / "functional.md").read_text()
    for name in set(functional.__all__) - {"Algorithm", "factory"}:
        assert f"optimjax.algorithms.{name}\n" in pages[0]
        assert f"optimjax.functional.{name}\n" in pages[1]
