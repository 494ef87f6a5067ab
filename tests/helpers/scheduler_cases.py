"""The table of schedulers that tests run through, how to build and follow them, and the orders in which to resume.

`CASES` is the one table of schedulers: what is asked of all is asked of each of its entries.
"""

import contextlib
import copy
import functools
import inspect
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim

__all__ = [
    "CASES",
    "EPOCHS",
    "METRICS",
    "OPTIONS",
    "ORDERS",
    "RATES",
    "SINGLE",
    "THROUGH",
    "WITHOUT_METRIC",
    "Case",
    "Decay",
    "Warm",
    "build",
    "build_torch",
    "chain",
    "collect",
    "contents",
    "every_case",
    "follow",
    "groups_of",
    "make",
    "outcome",
    "rates_of",
    "sequence",
    "takes_metric",
    "warm_up",
]

EPOCHS = 200
RATES = (0.1, 0.037, 1e-3)
METRICS = np.random.default_rng(0).uniform(0.5, 1.5, 300).round(2) / np.sqrt(1 + np.arange(300))


def warm_up(epoch: int) -> float:
    return (epoch + 1) / 7 if epoch < 7 else 0.97 ** (epoch // 3)


class Decay:
    """A callable object: PyTorch saves its attributes."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, epoch: float) -> float:
        return self.factor**epoch


# The name of a scheduler and its arguments; `schedulers` are other cases.
Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    "lambda": ("LambdaLR", dict(lr_lambda=warm_up)),
    "lambda of numpy numbers": ("LambdaLR", dict(lr_lambda=lambda epoch: np.float64(0.97) ** epoch)),
    "lambda of each group": ("LambdaLR", dict(lr_lambda=[Decay(0.95), lambda epoch: 1 / (1 + epoch), warm_up])),
    "multiplicative": ("MultiplicativeLR", dict(lr_lambda=lambda epoch: 0.95 + 0.01 * (epoch % 7))),
    "multiplicative of each group": (
        "MultiplicativeLR",
        dict(lr_lambda=[lambda epoch: 0.99, lambda epoch: epoch / (epoch + 1), Decay(0.999)]),
    ),
    "step": ("StepLR", dict(step_size=7)),
    "step gamma": ("StepLR", dict(step_size=1, gamma=0.993)),
    "multi-step": ("MultiStepLR", dict(milestones=[3, 50, 50, 120], gamma=0.3)),
    "multi-step of floats": ("MultiStepLR", dict(milestones=(20.0, 5, 60.0))),
    "constant": ("ConstantLR", dict()),
    "constant factor": ("ConstantLR", dict(factor=0.15, total_iters=31)),
    "linear": ("LinearLR", dict()),
    "linear down": ("LinearLR", dict(start_factor=0.9, end_factor=0.0, total_iters=50)),
    "linear of no epochs": ("LinearLR", dict(start_factor=0.4, total_iters=0)),
    "exponential": ("ExponentialLR", dict(gamma=0.977)),
    "polynomial": ("PolynomialLR", dict()),
    "polynomial power": ("PolynomialLR", dict(total_iters=111, power=1.7)),
    "polynomial of no epochs": ("PolynomialLR", dict(total_iters=0)),
    "cosine": ("CosineAnnealingLR", dict(T_max=30)),
    "cosine eta_min": ("CosineAnnealingLR", dict(T_max=17, eta_min=2e-3)),
    "cosine once": ("CosineAnnealingLR", dict(T_max=EPOCHS)),
    "cosine of one epoch": ("CosineAnnealingLR", dict(T_max=1)),
    "warm restarts": ("CosineAnnealingWarmRestarts", dict(T_0=9)),
    "warm restarts ever longer": ("CosineAnnealingWarmRestarts", dict(T_0=5, T_mult=2, eta_min=1e-4)),
    "cyclic": ("CyclicLR", dict(base_lr=0.01, max_lr=0.3, step_size_up=4, step_size_down=7)),
    "cyclic of each group": (
        "CyclicLR",
        dict(
            base_lr=[0.01, 0.02, 0.0],
            max_lr=[0.3, 0.1, 0.2],
            step_size_up=9,
            mode="triangular2",
            base_momentum=[0.7, 0.75, 0.8],
            max_momentum=[0.9, 0.95, 0.85],
        ),
    ),
    "cyclic exp_range": (
        "CyclicLR",
        dict(base_lr=0.01, max_lr=0.3, step_size_up=6, mode="exp_range", gamma=0.99, cycle_momentum=False),
    ),
    "cyclic scale_fn": (
        "CyclicLR",
        dict(base_lr=0.01, max_lr=0.3, step_size_up=6, scale_fn=Decay(0.97), scale_mode="iterations"),
    ),
    "one cycle": ("OneCycleLR", dict(max_lr=0.4, total_steps=EPOCHS)),
    "one cycle of each group": (
        "OneCycleLR",
        dict(
            max_lr=[0.4, 0.2, 0.1],
            epochs=2,
            steps_per_epoch=EPOCHS // 2,
            pct_start=0.25,
            anneal_strategy="linear",
            base_momentum=[0.7, 0.75, 0.8],
            max_momentum=[0.9, 0.95, 0.85],
        ),
    ),
    "one cycle of three phases": (
        "OneCycleLR",
        dict(max_lr=0.4, total_steps=EPOCHS, three_phase=True, div_factor=10.0, final_div_factor=100.0),
    ),
    "one cycle without momentum": (
        "OneCycleLR",
        dict(max_lr=0.4, total_steps=EPOCHS, pct_start=0.0, cycle_momentum=False),
    ),
    "plateau": ("ReduceLROnPlateau", dict(patience=4)),
    "plateau abs": (
        "ReduceLROnPlateau",
        dict(factor=0.5, patience=2, threshold=0.01, threshold_mode="abs", cooldown=2, min_lr=[1e-3, 1e-4, 0.0]),
    ),
    "plateau max": ("ReduceLROnPlateau", dict(mode="max", factor=0.9, patience=0, eps=1e-3, min_lr=1e-3)),
    "plateau max abs": ("ReduceLROnPlateau", dict(mode="max", threshold_mode="abs", cooldown=7)),
    "sequence": ("SequentialLR", dict(schedulers=["linear", "cosine eta_min", "exponential"], milestones=[5, 60])),
    "sequence of one": ("SequentialLR", dict(schedulers=["step gamma"], milestones=[])),
    "sequence of cycles": (
        "SequentialLR",
        dict(schedulers=["exponential", "one cycle", "cyclic"], milestones=[20, 90]),
    ),
    "sequence from its second": (
        "SequentialLR",
        dict(schedulers=["step", "linear", "warm restarts"], milestones=[0, 9]),
    ),
    "chain": ("ChainedScheduler", dict(schedulers=["constant factor", "exponential", "step"])),
    "chain of one": ("ChainedScheduler", dict(schedulers=["cosine"])),
    "sequence of a sequence": ("SequentialLR", dict(schedulers=["sequence", "polynomial power"], milestones=[80])),
    "sequence of a chain": ("SequentialLR", dict(schedulers=["chain", "warm restarts"], milestones=[40])),
    "chain of a sequence": ("ChainedScheduler", dict(schedulers=["sequence", "step"])),
}
SINGLE = [case for case, (_, arguments) in CASES.items() if "schedulers" not in arguments]
WITHOUT_METRIC = [case for case in SINGLE if "plateau" not in case]
every_case = pytest.mark.parametrize("case", CASES)


def sequence(schedulers: list[Any], *milestones: int) -> Case:
    return "SequentialLR", dict(schedulers=schedulers, milestones=list(milestones))


def chain(schedulers: list[Any]) -> Case:
    return "ChainedScheduler", dict(schedulers=schedulers)


def make(module: Any, case: str | Case, **options: Any) -> Callable[..., Any]:
    """``optimizer -> scheduler``, of this library or of PyTorch; ``options`` are for each that is not composed."""
    name, arguments = CASES[case] if isinstance(case, str) else case
    scheduler = getattr(module, name)
    if options.get("key") == "momentum" and "cycle_momentum" in inspect.signature(scheduler).parameters:
        options = options | {"cycle_momentum": False}
    if "schedulers" not in arguments:
        return functools.partial(scheduler, **(arguments | options))
    inside = [make(module, each, **options) for each in arguments["schedulers"]]
    if name == "ChainedScheduler":
        return lambda optimizer: scheduler([each(optimizer) for each in inside])

    def build_sequence(optimizer: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if module is not optim.lr_scheduler:  # PyTorch warns of the order of steps when it builds some nests
                stack.enter_context(warnings.catch_warnings(action="ignore"))
            return scheduler(optimizer, [each(optimizer) for each in inside], arguments["milestones"])

    return build_sequence


OPTIONS: dict[str, dict[str, Any]] = {"SGD": dict(momentum=0.9), "Adam": dict()}


def build(rates: Sequence[Any] = RATES, name: str = "SGD", key: str = "lr") -> Any:
    groups = [{"params": [jnp.ones(())], key: rate} for rate in rates]
    return getattr(optim, name)(groups, **{"lr": 0.5, **OPTIONS[name]})


def build_torch(torch: Any, rates: Sequence[Any] = RATES, name: str = "SGD") -> Any:
    groups = [{"params": [torch.nn.Parameter(torch.ones(()))], "lr": rate} for rate in rates]
    return getattr(torch.optim, name)(groups, **{"lr": 0.5, **OPTIONS[name]})


def rates_of(optimizer: Any) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in optimizer.param_groups]


def takes_metric(scheduler: Any) -> bool:
    return "metrics" in inspect.signature(scheduler.step).parameters


def follow(optimizer: Any, schedulers: Any, epochs: int, look: Any = rates_of, first: int = 0) -> list[Any]:
    """What ``look`` sees in each epoch, the optimizer stepped without gradients."""
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    trace = []
    for epoch in range(first, first + epochs):
        trace.append(look(optimizer))
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*([METRICS[epoch]] if takes_metric(scheduler) else []))
    return trace


def outcome(script: Callable[[], Any]) -> Any:
    """What a script returns, or the type of what it raises."""
    try:
        return script()
    except Exception as error:
        return type(error)


# --- Orders in which a run resumes ----------------------------------------------------------------------------------


def load_after_building(optimizer: Any, schedulers: Any, saved: Any) -> list[Any]:
    built = [scheduler(optimizer) for scheduler in schedulers]
    optimizer.load_state_dict(saved[0])
    for scheduler, state in zip(built, saved[1], strict=True):
        scheduler.load_state_dict(state)
    return built


def load_schedulers_first(optimizer: Any, schedulers: Any, saved: Any) -> list[Any]:
    built = [scheduler(optimizer) for scheduler in schedulers]
    for scheduler, state in zip(built, saved[1], strict=True):
        scheduler.load_state_dict(state)
    optimizer.load_state_dict(saved[0])
    return built


def load_before_building(optimizer: Any, schedulers: Any, saved: Any) -> list[Any]:
    """The order in which PyTorch loses the learning rate."""
    optimizer.load_state_dict(saved[0])
    built = [scheduler(optimizer) for scheduler in schedulers]
    for scheduler, state in zip(built, saved[1], strict=True):
        scheduler.load_state_dict(state)
    return built


def load_before_building_last_scheduler_first(optimizer: Any, schedulers: Any, saved: Any) -> list[Any]:
    optimizer.load_state_dict(saved[0])
    built = [scheduler(optimizer) for scheduler in schedulers]
    for scheduler, state in reversed(list(zip(built, saved[1], strict=True))):
        scheduler.load_state_dict(state)
    return built


def load_each_where_it_is_built(optimizer: Any, schedulers: Any, saved: Any) -> list[Any]:
    optimizer.load_state_dict(saved[0])
    built = []
    for scheduler, state in zip(schedulers, saved[1], strict=True):
        built.append(scheduler(optimizer))
        built[-1].load_state_dict(state)
    return built


def load_twice(optimizer: Any, schedulers: Any, saved: Any) -> list[Any]:
    """The second time over a run that has gone on."""
    built = load_before_building(optimizer, schedulers, saved)
    follow(optimizer, built, 3)
    optimizer.load_state_dict(saved[0])
    for scheduler, state in zip(built, saved[1], strict=True):
        scheduler.load_state_dict(state)
    return built


ORDERS = [
    load_after_building,
    load_schedulers_first,
    load_before_building,
    load_before_building_last_scheduler_first,
    load_each_where_it_is_built,
    load_twice,
]
THROUGH = [
    lambda saved: saved,
    lambda saved: pickle.loads(pickle.dumps(saved)),
    lambda saved: json.loads(json.dumps(saved)),
]


# --- What a scheduler holds -----------------------------------------------------------------------------------------


def contents(optimizer: Any, scheduler: Any) -> Any:
    """All that a failed load must leave as it was."""
    return *copy.deepcopy((groups_of(optimizer), scheduler.state_dict())), optimizer._record


class Warm(optim.lr_scheduler.StepLR):
    """A class of the user's, with attributes of its own, and rates of groups where ours has one for all."""

    def __init__(self, optimizer: Any, warm_up: int, **attributes: Any):
        self.warm_up = warm_up
        super().__init__(optimizer, 3, gamma=[0.5, 0.4, 0.3])  # pyright: ignore[reportArgumentType]
        vars(self).update(attributes)

    def get_lr(self) -> list[Any]:
        return [rate * gamma for rate, gamma in zip(self._rates(), self.gamma, strict=False)]  # pyright: ignore


# --- What it warns of -----------------------------------------------------------------------------------------------


def collect(script: Callable[[], Any]) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script()
    return [(warning.category, str(warning.message)[:40]) for warning in caught]
