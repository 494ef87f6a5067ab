"""The commands `bench` and `info` say what they have found, with and without neighbours, and as JSON."""

import json
import subprocess
import sys
from typing import Any

import jax
import pytest

from optimjax.__main__ import BENCHES, main
from optimjax._command import bench, machine
from optimjax._command.neighbours import Neighbours


def without(monkeypatch: Any, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_info_says_what_a_report_needs(capsys: Any, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "jit_f-0123-cache").write_bytes(bytes(3_000_000))
    (tmp_path / "jit_f-0123-atime").write_bytes(b"1")
    monkeypatch.setenv("XLA_SOMETHING", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MY_TOKEN", "secret")
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert main(["info"]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    shown = capsys.readouterr().out
    for text in (
        "optimjax 0.1.0.dev0 in ",
        f"Python {sys.version.split()[0]}, {sys.executable}",
        " cores for this process",
        f"{jax.device_count()} devices of JAX: cpu",
        f"jax               {jax.__version__}",
        "jax_enable_x64 = False",
        f"compiled programs are kept in: {tmp_path}, 1 programs, 3 MB",
        "XLA_SOMETHING=1",
        "OMP_NUM_THREADS=7",
    ):
        assert text in shown
    assert "secret" not in shown


def test_info_as_json_is_the_same(capsys: Any) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    again = machine.facts()
    assert found.pop("cache")["folder"] == again.pop("cache")["folder"]  # to which other tests add meanwhile
    assert found == again
    assert found["packages"]["jax"] == jax.__version__
    assert found["devices"] == {"cpu": jax.device_count()}


def test_info_says_how_to_install_what_is_not_there(monkeypatch: Any) -> None:
    monkeypatch.setitem(machine.EXTRAS, "no-such-package", "pip install it")
    assert "no-such-package   not installed: pip install it" in list(machine.lines(machine.facts()))


def test_a_cache_that_is_not_made_yet(monkeypatch: Any, tmp_path: Any) -> None:
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "absent"))
    try:
        assert machine.facts()["cache"] == {"folder": str(tmp_path / "absent"), "programs": 0, "mb": 0}
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_bench_prints_tables(capsys: Any) -> None:
    pytest.importorskip("torch")
    assert main(["bench", "--only", "mlp", "training", "--seconds", "0.05"]) == 0
    captured = capsys.readouterr()
    assert [line.partition(":")[0] for line in captured.err.splitlines()[1:]] == ["1 of 2", "2 of 2"]
    for text in (
        "AdamW update, small network, 4 tensors; ",
        "training step, three layers, batch of 128; ",
        "PyTorch, fused",
        "nnx.jit, nnx.Optimizer, optax",
        "memory is read and written at ",
    ):
        assert text in captured.out
    assert "Left out" not in captured.out
    assert max(map(len, captured.out.splitlines())) <= 120


def test_bench_as_json(capsys: Any) -> None:
    assert main(["bench", "--only", "mlp", "--seconds", "0.05", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (case,) = found["cases"]
    ours, *others = case["contenders"]
    assert (case["name"], ours["name"], ours["ours_of_it"]) == ("mlp", "optimjax, class", 1)
    assert case["bytes"] == 28 * 203_530
    assert case["turns"] >= 2
    assert found["machine"]["packages"] == machine.facts()["packages"]
    for one in others:
        low, high = one["quartiles"]
        assert 0 < low <= one["ours_of_it"] <= high
        assert one["median_s"] > 0


def test_bench_without_pytorch_says_how_to_install_it(monkeypatch: Any, capsys: Any) -> None:
    without(monkeypatch, "torch")
    assert main(["bench", "--only", "mlp", "training", "sweep", "--seconds", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "Left out: PyTorch is not installed: pip install torch" in shown
    for name in ("optimjax, class", "optimjax, function", "optax", "optimjax, step(loss_fn)", "optimjax.sweep"):
        assert f"  {name} " in shown
    assert "  PyTorch" not in shown


def test_bench_without_optax_says_how_to_install_it(monkeypatch: Any, capsys: Any) -> None:
    without(monkeypatch, "torch", "optax")
    assert main(["bench", "--only", "mlp", "--seconds", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert 'Left out: optax is not installed: pip install "optimjax[interop]"' in shown
    assert "  optax" not in shown


@pytest.mark.parametrize(("backend", "reason"), [("gpu", "this PyTorch has none"), ("tpu", "JAX runs on a tpu")])
def test_pytorch_without_the_device_is_left_out(torch: Any, monkeypatch: Any, backend: str, reason: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found = Neighbours.find()
    assert found.torch is None
    assert reason in found.left_out["PyTorch"]


def test_pytorch_is_waited_for_on_a_gpu(monkeypatch: Any) -> None:
    class Torch:
        waited = 0

        class cuda:  # noqa: N801
            @staticmethod
            def synchronize() -> None:
                Torch.waited += 1

    Neighbours(None, Torch, {}).wait()
    assert Torch.waited == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    Neighbours(None, Torch, {}).wait()
    assert Torch.waited == 1


def test_the_sweep_counts_all_of_pytorchs_runs(monkeypatch: Any) -> None:
    case = bench.Case("title", lambda _: {"ours": lambda: 0, "PyTorch, x": lambda: 0}, scale={"PyTorch": 1000})
    ours, theirs = bench._timed_case(case, Neighbours(None, None, {}), seconds=0.01)["contenders"]
    assert theirs["median_s"] > 50 * ours["median_s"]
    assert bench.CASES["sweep"].scale["PyTorch"] == bench.EVERY


def test_the_command_names_every_case() -> None:
    assert list(BENCHES) == list(bench.CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench --only nothing", "argument --only: invalid choice: 'nothing'"),
        ("bench --seconds 0", "argument --seconds: must be positive and finite, got 0"),
        ("bench --seconds inf", "argument --seconds: must be positive and finite, got inf"),
        ("bench --seconds soon", "argument --seconds: must be a number, got 'soon'"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_other_commands_do_not_import_neighbours() -> None:
    script = (
        "import sys; from optimjax.__main__ import main; main(['info'])\n"
        "sys.exit(', '.join({'torch', 'optax', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
