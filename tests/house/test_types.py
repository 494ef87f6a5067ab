"""An editor knows the types of the public functions: pyright says what it infers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright")

PROGRAM = """
import jax
import jax.numpy as jnp

import optimjax as optim
from optimjax import functional as F

params = {"w": jnp.ones(2)}


def loss(params: dict[str, jax.Array]) -> jax.Array:
    return params["w"].sum()


optimizer = optim.AdamW(params, lr=0.1)
reveal_type(optimizer.step())  # None
reveal_type(optimizer.step(params))  # None
reveal_type(optimizer.step(loss))  # Array
algorithm = F.adamw(lr=0.1)
reveal_type(algorithm)  # Algorithm
new, state = algorithm.update(params, params, algorithm.init(params), lr=0.2)
reveal_type(new)  # dict[str, Array]
F.adamw(lr="fast")  # error
F.adamw(learning_rate=0.1)  # error
optim.SGD(params, lr=[0.1], momentum=None)  # error
"""


def test_types(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(program)], capture_output=True, text=True
    )
    said = dict(re.findall(r":(\d+):\d+ - (?:information: Type of .* is )?(.*)", run.stdout))
    for number, line in enumerate(PROGRAM.splitlines(), start=1):
        if " # " in line:
            expected = line.split("  # ")[1]
            got = said.get(str(number), "nothing")
            assert got.startswith("error") if expected == "error" else got == f'"{expected}"', (line, got)
