"""``python -m optimjax convert``: checkpoints of PyTorch into ours and back; what does not fit is refused by name."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimjax as optim
from optimjax.__main__ import main
from optimjax.interop import torch as interop

pytestmark = pytest.mark.usefixtures("folder")

MODEL = """
from flax import nnx

def make():
    rngs = nnx.Rngs(0)
    return nnx.Dict(fc=nnx.Linear(4, 4, rngs=rngs), norm=nnx.BatchNorm(4, rngs=rngs))
"""


def checkpoint(names: bool = True) -> dict[str, Any]:
    """What a run in PyTorch has saved."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": (4, 4), "fc.bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    statistics = {"norm.running_mean": arrays["norm.bias"], "norm.running_var": arrays["norm.weight"]}
    group = {"lr": 0.1, "momentum": 0.9, "params": [0, 1, 2, 3]} | ({"param_names": list(weights)} if names else {})
    state = {index: {"momentum_buffer": 2 * array} for index, array in enumerate(arrays.values())}
    return {
        "model": arrays | statistics | {"norm.num_batches_tracked": np.array(3)},
        "optimizer": {"state": state, "param_groups": [group]},
        "epoch": 7,
    }


def convert(arguments: str) -> int:
    """The exit code of the command."""
    return main(["convert", *arguments.split()])


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_a_checkpoint_goes_and_comes_back(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interop.save("run.pt", checkpoint())
    Path("model_of_test.py").write_text(MODEL)
    monkeypatch.syspath_prepend(os.getcwd())
    assert convert("run.pt ours.safetensors --model model_of_test:make --layout-out layout.json") == 0
    sys.modules.pop("model_of_test")
    assert capsys.readouterr().out == (
        "fc.weight -> fc.kernel (axes 1, 0)\n"
        "fc.bias -> fc.bias\n"
        "norm.weight -> norm.scale\n"
        "norm.bias -> norm.bias\n"
        "norm.running_mean -> norm.mean\n"
        "norm.running_var -> norm.var\n"
        "norm.num_batches_tracked -> left out\n"
        "model: 6 arrays\n"
        "optimizer: state of 4 parameters in 1 group\n"
        "wrote ours.safetensors\n"
    )
    ours, theirs = optim.load("ours.safetensors"), checkpoint()
    np.testing.assert_array_equal(ours["model"]["fc.kernel"], theirs["model"]["fc.weight"].T)
    np.testing.assert_array_equal(ours["optimizer"]["state"][0]["momentum_buffer"], 2 * theirs["model"]["fc.weight"].T)
    assert ours["optimizer"]["param_groups"][0]["param_names"] == ["fc.kernel", "fc.bias", "norm.scale", "norm.bias"]
    assert ours["epoch"] == 7

    assert convert("ours.safetensors back.pt --layout layout.json") == 0
    assert "fc.weight <- fc.kernel (axes 1, 0)" in capsys.readouterr().out
    del theirs["model"]["norm.num_batches_tracked"]
    assert_equal(interop.load("back.pt"), theirs)


def test_without_a_model(capsys: Any) -> None:
    """Bare states, bare weights, names in a file, globs."""
    saved = checkpoint(names=False)
    interop.save("state.pt", saved["optimizer"])
    interop.save("model.safetensors", saved["model"])
    Path("names.txt").write_text("fc.weight\nfc.bias\nnorm.weight\nnorm.bias\n")
    assert convert("state.pt state.safetensors --transpose fc.w* --names names.txt") == 0
    state = optim.load("state.safetensors")
    np.testing.assert_array_equal(state["state"][0]["momentum_buffer"], 2 * saved["model"]["fc.weight"].T)
    assert convert("state.safetensors back.pt --transpose fc.w* --names names.txt") == 0
    back = interop.load("back.pt")
    assert back["param_groups"][0].pop("param_names") == ["fc.weight", "fc.bias", "norm.weight", "norm.bias"]
    assert_equal(back, saved["optimizer"])
    capsys.readouterr()
    assert convert("model.safetensors ours.safetensors --keep *.weight") == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "norm.running_mean stays as it is", "norm.running_var stays as it is", "the file: 7 arrays",
        "wrote ours.safetensors",
    ]  # fmt: skip
    assert convert("ours.safetensors back.pt --keep fc.weight") == 0
    assert_equal(interop.load("back.pt"), saved["model"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run.pt ours.safetensors", r"'fc.weight' of shape (4, 4) would fit with its axes exchanged, too"),
        ("run.pt ours.safetensors --keep nix*", "'nix*' matches none of the names ['fc.weight'"),
        ("run.pt ours.safetensors --transpose *", "'fc.bias' has shape (4,), its layout the axes (1, 0)"),
        ("run.pt ours.npz", "'ours.npz' must end in .safetensors"),
        ("run.pt back.pt", "'run.pt' must end in .safetensors"),
        ("missing.pt ours.safetensors", "missing.pt"),
        ("run.pt ours.safetensors --layout bad.json", "'bad.json' is not JSON"),
        ("run.pt ours.safetensors --layout list.json", "'list.json' has no object from names to layouts"),
        ("run.pt ours.safetensors --layout axes.json", "the layout of 'fc.weight': axes of a layout must be"),
        ("run.pt ours.safetensors --model make", "--model must be MODULE:FUNCTION, got 'make'"),
        ("run.pt ours.safetensors --model missing:make", "No module named 'missing'"),
        ("run.pt ours.safetensors --model json:make", "json has no function 'make'"),
        ("state.pt ours.safetensors --transpose fc.weight", "matches none of the names"),
        ("state.pt ours.safetensors", "the state of a parameter without a name has shape (4, 4)"),
        ("ours.safetensors back.pt --model json:make", "--model does not know PyTorch's names"),
        ("evil.pt ours.safetensors", "'evil.pt' is not a file of torch.save"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: str, message: str, capsys: Any) -> None:
    interop.save("run.pt", checkpoint())
    interop.save("state.pt", checkpoint(names=False)["optimizer"])
    optim.save("ours.safetensors", {"kept": 1})
    Path("bad.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("axes.json").write_text(json.dumps({"fc.weight": [0, 2]}))
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    before = set(os.listdir())
    assert convert(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Nothing was converted: ")
    assert message in printed.err
    assert set(os.listdir()) == before
    assert optim.load("ours.safetensors") == {"kept": 1}
