"""The README's code runs, its commands exist, and its table names everything that is exported."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pages
import pytest

import optimjax as optim

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_code_runs():
    torch = pytest.importorskip("torch", reason="the README runs the same loop in PyTorch")
    torch.manual_seed(0)  # one initial network in 25 is still above the bound at the end
    printed = pages.run(ROOT / "README.md")
    assert [line.split(":")[0] for line in printed[:2]] == ["PyTorch", "optimjax"]
    assert all(float(line.split(":")[1]) < 1e-3 for line in printed[:2]), printed
    assert re.fullmatch(r"norm \d\.\d\d, skipped 0", printed[2])
    first, last = re.fullmatch(r"(\S+) -> (\S+) in 300 steps", printed[3]).groups()
    assert float(last) < 1e-2 * float(first)


def test_the_two_loops_pair_line_by_line():
    torch, jax, *_ = (code.strip().splitlines() for code, _ in pages.code_blocks(ROOT / "README.md"))
    assert len(torch) == len(jax)
    for line in ("    optimizer.zero_grad()", "    optimizer.step()", "    scheduler.step()"):
        assert torch.index(line) == jax.index(line)


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in ("README.md", "CONTRIBUTING.md"):
        commands = re.findall(r"(?:`|^)make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE)
        assert commands
        for command in commands:
            assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_test_says_where_it_is():
    shown = subprocess.run(
        ["make", "-n", "test", "WORKERS=7"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    parts = [shown.index(text) for text in ("1/3 ", "ruff check", "2/3 ", "pytest -q -n 7", "3/3 ")]
    assert parts == sorted(parts), shown


def links():
    """Where the links of the documents at the root lead, as paths from there."""
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        yield from re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text())


def test_links_lead_somewhere():
    assert [target for target in links() if not (ROOT / target).exists()] == []


def test_source_distribution_has_what_tests_and_links_name():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = {path.removeprefix("/") for path in build["targets"]["sdist"]["include"]} | {"pyproject.toml"}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = {entry.name for entry in ROOT.iterdir() if f'"{entry.name}"' in tests}
    assert {"Makefile", "CONTRIBUTING.md", "notebooks"} <= named
    assert (named | {Path(target).parts[0] for target in links()}) - included == set()


def test_everything_exported_is_listed():
    table = README.split("## What is in")[1].split("## Not yet")[0]
    not_yet = README.split("## Not yet")[1].split("## More")[0]
    for name in [*optim.__all__, *optim.lr_scheduler.__all__]:
        value = getattr(optim, name, None) or getattr(optim.lr_scheduler, name)
        if isinstance(value, type) and issubclass(value, (optim.Optimizer, optim.lr_scheduler.LRScheduler)):
            assert f"{name}`" in table, name
        assert f"`{name}`" not in not_yet, name
