"""Clipping, averages and files work on eight devices of one process, and on four of two processes."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "helpers" / "distributed_utilities.py"


def start(*arguments: int) -> Any:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check(*processes: Any) -> None:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def test_on_eight_devices() -> None:
    check(start(8))


def test_in_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    check(*(start(2, rank, 2, port) for rank in range(2)))
