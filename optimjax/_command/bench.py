"""The command ``bench``: the short form of the benchmarks, on the machine of whoever calls it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimjax._command.machine import facts
from optimjax._command.neighbours import Neighbours
from optimjax._command.timing import Timings, interleaved, timed
from optimjax._command.training import training_steps
from optimjax._command.workloads import SETS, Contenders, Shapes, sweeps, updates

__all__ = ["CASES", "lines", "measure"]

RATES, STEPS, EVERY = 64, 50, 32  # of the sweep


@dataclass(frozen=True)
class Case:
    """Something to be timed; ours is the first of the contenders.

    Attributes:
      title: what it is.
      make: the contenders.
      size: bytes that an update cannot but move, where that bounds it.
      scale: how many times the time of some contenders counts, by the beginning of their names.
    """

    title: str
    make: Callable[[Neighbours], Contenders]
    size: int | None = None
    scale: Mapping[str, int] = field(default_factory=dict)


def _update(title: str, shapes: Shapes) -> Case:
    elements = sum(int(np.prod(shape)) for shape in shapes)
    # In float32, parameters, both moments and gradients are read, and all but the gradients are written.
    return Case(f"AdamW update, {title}, {len(shapes)} tensors", partial(updates, shapes=shapes), 7 * 4 * elements)


def _sweep(neighbours: Neighbours) -> Contenders:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(STEPS, 64, 64)).astype(np.float32)
    labels = rng.integers(0, 10, (STEPS, 64)).astype(np.int32)
    return sweeps(neighbours, images, labels, np.geomspace(1e-4, 1, RATES), EVERY)


CASES: dict[str, Case] = {
    "mlp": _update("small network", SETS["mlp"]()),
    "resnet50": _update("ResNet-50", SETS["resnet50"]()),
    "training": Case("training step, three layers, batch of 128", training_steps),
    "sweep": Case(f"{RATES} learning rates, {STEPS} steps each", _sweep, scale={"PyTorch": EVERY}),
}


def measure(names: Sequence[str], seconds: float, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time the cases of these names.

    Args:
      names: keys of ``CASES``.
      seconds: for the turns of each case, compiling not counted; there are five turns at least.
      progress: is called with what is being done.

    Returns:
      Plain data: ``machine``, ``copy_gb_per_s``, ``cases``, and ``left_out``, why neighbours are not there.
    """
    neighbours = Neighbours.find()
    found: dict[str, Any] = {"machine": facts()}
    if neighbours.torch is not None:
        found["machine"]["torch_threads"] = neighbours.torch.get_num_threads()
    progress("how fast memory is copied")
    found["copy_gb_per_s"] = _copy_speed()
    found["cases"] = []
    for number, name in enumerate(names, 1):
        progress(f"{number} of {len(names)}: {CASES[name].title}")
        # optax relies on promotion, which an environment variable may have made strict.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found["cases"].append({"name": name, **_timed_case(CASES[name], neighbours, seconds)})
    found["left_out"] = neighbours.left_out
    return found


def _timed_case(case: Case, neighbours: Neighbours, seconds: float) -> dict[str, Any]:
    runs = case.make(neighbours)
    first = {name: timed(run) for name, run in runs.items()}
    timings = interleaved(runs, seconds=seconds, warm_up=2)
    factors = {name: next((f for start, f in case.scale.items() if name.startswith(start)), 1) for name in runs}
    timings = Timings({name: [factors[name] * one for one in spent] for name, spent in timings.seconds.items()})
    ours = next(iter(runs))
    return {
        "title": case.title,
        "turns": len(timings.seconds[ours]),
        "bytes": case.size,
        "contenders": [
            {
                "name": name,
                "first_s": factors[name] * first[name],
                "median_s": timings.median(name),
                "ours_of_it": timings.ratio(ours, name),
                "quartiles": timings.quartiles(ours, name),
            }
            for name in runs
        ],
    }


def _copy_speed() -> float:
    """Gigabytes a second that are read and written by adding 1 to a large array, in place."""
    array = jnp.zeros(2**25)
    program = jax.jit(lambda x: x + 1, donate_argnums=0)
    spent = []
    for _ in range(8):
        start = time.perf_counter()
        array = jax.block_until_ready(program(array))
        spent.append(time.perf_counter() - start)
    return 2 * array.nbytes / float(np.median(spent[3:])) / 1e9


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What :func:`measure` has returned, as tables for people."""
    machine = found["machine"]
    versions = {**machine["packages"], **machine["extras"]}
    devices = ", ".join(f"{count} × {name}" if count > 1 else name for name, count in machine["devices"].items())
    yield f"{devices}; {machine['system']['processor']}, {machine['system']['cores']} cores"
    yield f"optimjax {machine['optimjax']['version']}, " + ", ".join(
        f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "torch") if versions[name]
    )
    if "torch_threads" in machine:
        threads = machine["torch_threads"]
        few = "" if threads == 1 else "s (OMP_NUM_THREADS=1 may be faster where others use the cores)"
        yield f"PyTorch has {threads} thread{few}"
    yield f"memory is read and written at {found['copy_gb_per_s']:.1f} GB/s"
    for case in found["cases"]:
        yield ""
        yield f"{case['title']}; {case['turns']} turns"
        bound = "GB/s" if case["bytes"] else ""
        yield f"  {'':30}{'first s':>9}{'median ms':>11}{bound:>7}   ours / it (middle half)"
        for index, one in enumerate(case["contenders"]):
            speed = f"{case['bytes'] / one['median_s'] / 1e9:.1f}" if case["bytes"] else ""
            low, high = one["quartiles"]
            ratio = f"{one['ours_of_it']:.2f} ({low:.2f} to {high:.2f})" if index else "1"
            yield f"  {one['name']:30}{one['first_s']:9.2f}{1e3 * one['median_s']:11.2f}{speed:>7}   {ratio}"
    yield ""
    yield "Contenders take turns. The last column is the time of the first line, ours, divided by that of the line"
    yield "itself, the median over the turns: below 1, ours is faster. The first call makes the state and compiles."
    if any(case["bytes"] for case in found["cases"]):
        yield "GB/s counts what AdamW cannot but read and write, 28 bytes for each parameter."
    for reason in found["left_out"].values():
        yield f"Left out: {reason}"
