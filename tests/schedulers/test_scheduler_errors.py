"""Schedulers warn where PyTorch's warn and refuse what PyTorch's refuse, and an error changes nothing."""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from scheduler_cases import (
    CASES,
    RATES,
    WITHOUT_METRIC,
    build,
    build_torch,
    collect,
    contents,
    every_case,
    follow,
    groups_of,
    make,
    outcome,
    rates_of,
    takes_metric,
    warm_up,
)

import optimjax as optim


@pytest.mark.parametrize("steps", list(itertools.product(("optimizer", "scheduler"), repeat=3)), ids="-".join)
def test_the_warning_about_the_order_comes_when_pytorchs_comes(steps: Any, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> list[Any]:
        scheduler = module.StepLR(optimizer, 2)
        return collect(lambda: [{"optimizer": optimizer, "scheduler": scheduler}[step].step() for step in steps])

    ours = run(optim.lr_scheduler, build())
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch))
    assert len(ours) == (steps[0] == "scheduler")


@every_case
def test_the_warnings_of_steps_before_the_optimizers_are_pytorchs(case: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> list[Any]:
        scheduler = make(module, case)(optimizer)
        metric = [1.0] if takes_metric(scheduler) else []
        return collect(lambda: [scheduler.step(*metric) for _ in range(3)])

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@pytest.mark.parametrize("case", WITHOUT_METRIC)
def test_get_lr_outside_of_step_warns(case: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> list[Any]:
        scheduler = make(module, case)(optimizer)
        return collect(lambda: outcome(scheduler.get_lr))

    ours = run(optim.lr_scheduler, build())
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch))
    assert len(ours) == 1


ERRORS: dict[str, Callable[[Any, Any], Any]] = {
    "too few lambdas": lambda m, o: m.LambdaLR(o, [warm_up]),
    "too many lambdas": lambda m, o: m.MultiplicativeLR(o, [warm_up] * 4),
    "no function": lambda m, o: m.MultiplicativeLR(o, 0.9),
    "no initial_lr": lambda m, o: m.StepLR(o, 3, last_epoch=4),
    "abstract": lambda m, o: m.LRScheduler(o),
    "not an optimizer": lambda m, o: m.StepLR("sgd", 3),
    "the groups": lambda m, o: m.ExponentialLR(o.param_groups, 0.9),
    "not an optimizer for cycles": lambda m, o: m.CyclicLR("sgd", 0.1, 0.2),
    "not an optimizer for one cycle": lambda m, o: m.OneCycleLR("sgd", 0.1, 100),
    "not an optimizer for a plateau": lambda m, o: m.ReduceLROnPlateau("sgd"),
    "constant": lambda m, o: m.ConstantLR(o, factor=1.5),
    "constant below": lambda m, o: m.ConstantLR(o, factor=-0.1),
    "linear start": lambda m, o: m.LinearLR(o, start_factor=0.0),
    "linear end": lambda m, o: m.LinearLR(o, end_factor=1.1),
    "restarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 0),
    "restarts of half epochs": lambda m, o: m.CosineAnnealingWarmRestarts(o, 2.5),
    "restarts ever shorter": lambda m, o: m.CosineAnnealingWarmRestarts(o, 2, T_mult=0),
    "restarts of a list": lambda m, o: m.CosineAnnealingWarmRestarts(o, 2, eta_min=[0.1]),
    "restarts before the first": lambda m, o: m.CosineAnnealingWarmRestarts(o, 2).step(-1.0),
    "cycles of other groups": lambda m, o: m.CyclicLR(o, [0.1], 0.2),
    "cycles with other heights": lambda m, o: m.CyclicLR(o, 0.1, [0.2, 0.3]),
    "cycles of a mode": lambda m, o: m.CyclicLR(o, 0.1, 0.2, mode="square"),
    "one cycle of no length": lambda m, o: m.OneCycleLR(o, 0.1),
    "one cycle of half its length": lambda m, o: m.OneCycleLR(o, 0.1, epochs=3),
    "one cycle of negative length": lambda m, o: m.OneCycleLR(o, 0.1, total_steps=-3),
    "one cycle of a broken length": lambda m, o: m.OneCycleLR(o, 0.1, total_steps=2.5),
    "one cycle of no epochs": lambda m, o: m.OneCycleLR(o, 0.1, epochs=0, steps_per_epoch=3),
    "one cycle of no steps": lambda m, o: m.OneCycleLR(o, 0.1, epochs=2, steps_per_epoch=0),
    "one cycle of a share": lambda m, o: m.OneCycleLR(o, 0.1, 100, pct_start=1.5),
    "one cycle of an integer share": lambda m, o: m.OneCycleLR(o, 0.1, 100, pct_start=1),
    "one cycle of a strategy": lambda m, o: m.OneCycleLR(o, 0.1, 100, anneal_strategy="square"),
    "one cycle of other groups": lambda m, o: m.OneCycleLR(o, [0.1], 100),
    "one cycle with other momenta": lambda m, o: m.OneCycleLR(o, 0.1, 100, max_momentum=[0.9]),
    "plateau that grows": lambda m, o: m.ReduceLROnPlateau(o, factor=1.0),
    "plateau of a mode": lambda m, o: m.ReduceLROnPlateau(o, mode="less"),
    "plateau of a threshold mode": lambda m, o: m.ReduceLROnPlateau(o, threshold_mode="half"),
    "plateau of other groups": lambda m, o: m.ReduceLROnPlateau(o, min_lr=[0.1]),
    "plateau without a metric": lambda m, o: m.ReduceLROnPlateau(o).step(None),
    "plateau with an empty metric": lambda m, o: m.ReduceLROnPlateau(o).step("good"),
    "empty sequence": lambda m, o: m.SequentialLR(o, [], []),
    "sequence without milestones": lambda m, o: m.SequentialLR(o, [m.StepLR(o, 3), m.StepLR(o, 4)], []),
    "sequence of numbers": lambda m, o: m.SequentialLR(o, [0.1, 0.2], [3]),
    "sequence of another": lambda m, o: m.SequentialLR("sgd", [m.StepLR(o, 3)], []),
    "empty chain": lambda m, o: m.ChainedScheduler([]),
    "chain of another": lambda m, o: m.ChainedScheduler([m.StepLR(o, 3)], "sgd"),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors_are_pytorchs(call: Any, torch: Any) -> None:
    """The type and PyTorch's text, after which ours names the value."""

    def error(module: Any, optimizer: Any) -> tuple[type, str]:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call(module, optimizer)
        return caught.type, str(caught.value).strip("\"'").split("\\n")[0].split(" has SGD")[0]

    ours, theirs = error(optim.lr_scheduler, build()), error(torch.optim.lr_scheduler, build_torch(torch))
    assert ours[0] is theirs[0]
    assert ours[1].startswith(theirs[1].rstrip(".")) or ours[0] in (NotImplementedError, TypeError)


PERIODS: dict[str, tuple[str, dict[str, Any]]] = {
    "step_size": ("StepLR", {}),
    "T_max": ("CosineAnnealingLR", {}),
    "step_size_up": ("CyclicLR", dict(base_lr=0.1, max_lr=0.2)),
    "div_factor": ("OneCycleLR", dict(max_lr=0.1, total_steps=10)),
    "final_div_factor": ("OneCycleLR", dict(max_lr=0.1, total_steps=10)),
}
LENGTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "total_iters": ("ConstantLR", {}),
    "total_iters ": ("LinearLR", {}),
    "total_iters  ": ("PolynomialLR", {}),
    "step_size_down": ("CyclicLR", dict(base_lr=0.1, max_lr=0.2)),
}


@pytest.mark.parametrize(
    ("name", "case", "value", "bound"),
    [(name, case, value, "above 0") for name, case in PERIODS.items() for value in (0, -3, 0.0, float("nan"))]
    + [(name, case, value, "at least 0") for name, case in LENGTHS.items() for value in (-1, -0.5, float("nan"))],
)
def test_a_length_out_of_range_is_named(name: str, case: Any, value: float, bound: str) -> None:
    """PyTorch divides by zero, at once or in the middle of the run, or takes a negative one for another."""
    optimizer = build()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"^{name.strip()} must be {bound}, got {value}"):
        make(optim.lr_scheduler, case)(optimizer, **{name.strip(): value})
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("name", PERIODS)
def test_a_length_that_is_no_number_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got '3'"):
        make(optim.lr_scheduler, PERIODS[name])(build(), **{name: "3"})


@pytest.mark.parametrize("milestones", [[9, 3], ["a", 3], [float("nan"), 3]])
def test_milestones_that_do_not_ascend(milestones: Any) -> None:
    optimizer = build()
    inside = [optim.lr_scheduler.StepLR(optimizer, 3) for _ in range(3)]
    with pytest.raises(ValueError, match="milestones must be numbers that ascend, got"):
        optim.lr_scheduler.SequentialLR(optimizer, inside, milestones)


def test_a_scheduler_that_fails_when_it_is_built_leaves_nothing_behind() -> None:
    class Fails(optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            if self.optimizer.param_groups[0]["lr"] == 7:
                raise RuntimeError("no rate")
            return self.base_lrs

    optimizer = build()
    optimizer.param_groups[0]["lr"] = 7
    optimizer.step()
    before = groups_of(optimizer), optimizer._record
    with pytest.raises(RuntimeError, match="no rate"):
        Fails(optimizer)
    assert (groups_of(optimizer), optimizer._record) == before
    optimizer.param_groups[0]["lr"] = 1
    inner = Fails(optimizer)
    follow(optimizer, inner, 2)
    optimizer.param_groups[0]["initial_lr"] = 7
    before = contents(optimizer, inner)
    with pytest.raises(RuntimeError, match="no rate"):  # the sequence lets it begin again
        optim.lr_scheduler.SequentialLR(optimizer, [inner], [])
    assert contents(optimizer, inner) == before


def test_momentum_to_cycle_is_missed_as_in_pytorch(torch: Any) -> None:
    for name, arguments in (("CyclicLR", (0.1, 0.2)), ("OneCycleLR", (0.1, 100))):
        optimizer = optim.Adagrad([jnp.ones(())])
        before = groups_of(optimizer)
        with pytest.raises(ValueError, match="optimizer must support momentum or beta1 with `cycle_momentum`"):
            getattr(optim.lr_scheduler, name)(optimizer, *arguments)
        assert groups_of(optimizer) == before
        getattr(optim.lr_scheduler, name)(optimizer, *arguments, cycle_momentum=False)


@pytest.mark.parametrize(
    "name", [name for name in ERRORS if not name.startswith(("sequence of", "chain of", "plateau with"))]
)
def test_an_error_leaves_the_optimizer_as_it_was(name: str) -> None:
    optimizer, call = build(), ERRORS[name]
    before = copy.deepcopy(optimizer.state_dict())
    with contextlib.suppress(Exception):
        call(optim.lr_scheduler, optimizer)
    assert rates_of(optimizer) == list(RATES)
    if name not in ("restarts before the first", "sequence without milestones"):  # where others were built before
        assert optimizer.state_dict() == before


def test_a_step_that_fails_changes_nothing() -> None:
    def fails(epoch: int) -> float:
        if epoch == 3:
            raise RuntimeError("no factor")
        return 0.9**epoch

    optimizer = build()
    first, second = optim.lr_scheduler.ExponentialLR(optimizer, 0.5), optim.lr_scheduler.LambdaLR(optimizer, fails)
    scheduler = optim.lr_scheduler.ChainedScheduler([first, second])
    follow(optimizer, scheduler, 2)
    before = groups_of(optimizer), scheduler.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no factor"):
            scheduler.step()
        assert (groups_of(optimizer), scheduler.state_dict()) == before


def test_more_steps_than_one_cycle_has(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = module.OneCycleLR(optimizer, max_lr=0.1, total_steps=5, cycle_momentum=False)
        follow(optimizer, scheduler, 5)
        with pytest.raises(ValueError, match=r"Tried to step 6 times. The specified number of total steps is 5"):
            scheduler.step()
        return rates_of(optimizer)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@pytest.mark.parametrize("name", sorted(set(optim.lr_scheduler.__all__) - {"find_lr", "preview"}))
def test_signatures_are_pytorchs_but_for_key(name: str, torch: Any) -> None:
    def arguments(module: Any, method: str) -> list[Any]:
        signature = inspect.signature(getattr(getattr(module, name), method))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    ours, theirs = arguments(optim.lr_scheduler, "__init__"), arguments(torch.optim.lr_scheduler, "__init__")
    key = [("key", inspect.Parameter.KEYWORD_ONLY, "lr")]
    assert ours == theirs + ([] if name in ("SequentialLR", "ChainedScheduler") else key)
    more = [("metrics", inspect.Parameter.POSITIONAL_OR_KEYWORD, None)]
    ours, theirs = arguments(optim.lr_scheduler, "step"), arguments(torch.optim.lr_scheduler, "step")
    assert ours == theirs + (more if name in ("SequentialLR", "ChainedScheduler") else [])


def test_every_scheduler_of_pytorch_is_here_and_among_the_cases(torch: Any) -> None:
    assert set(torch.optim.lr_scheduler.__all__) == set(optim.lr_scheduler.__all__) - {"find_lr", "preview"}
    assert {name for name, _ in CASES.values()} == set(torch.optim.lr_scheduler.__all__) - {"LRScheduler"}
