"""Several processes can train with arrays that none of them sees whole."""

import socket
import subprocess
import sys
from pathlib import Path


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    program = Path(__file__).parent.parent / "helpers" / "two_processes.py"
    arguments = [sys.executable, str(program), str(port)]
    processes = [
        subprocess.Popen(
            [*arguments, str(index), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output[-5000:]
        assert f"done {index}" in output
