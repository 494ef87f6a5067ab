"""Runs the Python blocks of a page in Markdown, and compares what they print with what the page shows."""

import contextlib
import io
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax

__all__ = ["code_blocks", "run"]

# A block of Python and, where a block of text comes next, what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def code_blocks(page: Path) -> Iterator[tuple[str, str | None]]:
    """Code and shown output; before the code as many empty lines as put a traceback on the page's line."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield "\n" * text[: match.start(1)].count("\n") + match[1], match[2]


def run(page: Path) -> list[str]:
    """Run the blocks of a page one after the other; the lines that they print."""
    namespace: dict[str, Any] = {}
    lines = []
    for code, shown in code_blocks(page):
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            jax.numpy_dtype_promotion("standard"),  # which conftest.py makes strict
            jax.numpy_rank_promotion("allow"),
        ):
            exec(compile(code, str(page), "exec"), namespace)
        if shown is not None:
            compare(shown, out.getvalue())
        lines += out.getvalue().splitlines()
    return lines


def compare(shown: str, printed: str) -> None:
    """Raise unless they are equal; decimals may differ by one in the last digit shown, for rounding differs."""
    assert DECIMAL.sub("#", printed) == DECIMAL.sub("#", shown), f"shown:\n{shown}printed:\n{printed}"
    for a, b in zip(map(Decimal, DECIMAL.findall(shown)), map(Decimal, DECIMAL.findall(printed)), strict=True):
        assert abs(a - b) <= Decimal(1).scaleb(int(a.as_tuple().exponent)), f"shown:\n{shown}printed:\n{printed}"
