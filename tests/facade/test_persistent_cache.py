"""A second process finds every compiled program in JAX's persistent cache: nothing in one names the process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent.parent / "helpers" / "cached_programs.py"


def run(folder: Path) -> dict[str, Any]:
    """What a new process has found in the cache, and computed; its hashes of strings differ from another's."""
    command = [sys.executable, str(PROGRAM), str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first = run(tmp_path)
    files = set(tmp_path.glob("*-cache"))
    second = run(tmp_path)
    assert first["misses"] > 20
    assert (second["misses"], second["hits"]) == (0, first["hits"] + first["misses"])
    assert set(tmp_path.glob("*-cache")) == files
    assert second["numbers"] == first["numbers"]
