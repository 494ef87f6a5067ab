"""A fixture that several files of this folder ask for."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of files runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
