"""The command line: ``python -m optimjax demo``, ``bench``, ``info``, ``convert``; alone it prints what there is."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from optimjax import __version__
from optimjax.interop import _torch_convert

EXTRAS = ("matplotlib", "rich", "sklearn")  # what the extra [demo] installs, by import name
BENCHES = ("mlp", "resnet50", "training", "sweep")  # what `bench` times


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m optimjax", description="torch.optim for JAX.")
    parser.add_argument("--version", action="version", version=f"optimjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train on the handwritten digits and compare optimizers",
        description="Train one small classifier on the handwritten digits with four optimizers and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=_at_least(1), default=30, help="passes over the training images")
    demo.add_argument("--out", type=_picture, default=Path("demo.png"), help="where the picture goes, a .png file")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of the initial weights and the batches")
    demo.set_defaults(run=_demo)
    bench = commands.add_parser(
        "bench",
        help="time steps on this machine, alongside optax and PyTorch where they are installed",
        description="Time updates, a training step and a sweep on this machine, alongside optax and PyTorch where they "
        "are installed. About a minute on two cores.",
    )
    bench.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, help="what to time; all unless given")
    bench.add_argument("--seconds", type=_positive, default=3.0, help="for the turns of each; 3 unless given")
    bench.add_argument("--json", action="store_true", help="print JSON instead of tables")
    bench.set_defaults(run=_bench)
    info = commands.add_parser(
        "info",
        help="print what a report of a bug should say: versions, devices, settings",
        description="Print what a report of a bug should say: versions, devices, threads, settings and folders.",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of PyTorch into one of ours, and back",
        description="Turn a checkpoint of PyTorch, with weights and states of optimizers, into one of ours, and back.",
    )
    _torch_convert.add_arguments(convert)
    convert.set_defaults(run=_convert)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    return options.run(options)


def _demo(options: argparse.Namespace) -> int:
    try:
        from optimjax import demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        install = 'pip install "optimjax[demo]", or pip install ".[demo]" in a clone'
        print(f"The demo needs {package}, which is not installed: {install}", file=sys.stderr)
        return 1
    demo.run(options.epochs, options.seed, options.out)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from optimjax._command import bench

    def progress(text: str) -> None:
        print(text, "...", file=sys.stderr, flush=True)

    found = bench.measure(options.only, options.seconds, progress)
    _print(found, bench.lines(found), options.json)
    return 0


def _info(options: argparse.Namespace) -> int:
    from optimjax._command import machine

    found = machine.facts()
    _print(found, machine.lines(found), options.json)
    return 0


def _print(found: Any, lines: Iterable[str], as_json: bool) -> None:
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


def _convert(options: argparse.Namespace) -> int:
    try:
        _torch_convert.run(options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"Nothing was converted: {error}", file=sys.stderr)
        return 1
    return 0


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
        return number

    return parse


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def _picture(text: str) -> Path:
    """A path that can be written: better to hear of it before the training than after."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not writable")
    return path


if __name__ == "__main__":
    sys.exit(main())
