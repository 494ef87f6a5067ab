"""Schedulers: PyTorch's values float for float, resuming in any order, warnings, groups added later.

`CASES` is the one table of schedulers: what is asked of all is asked of each of its entries.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupted_everywhere

import optimjax as optim
from optimjax.lr_scheduler import base as base_module

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


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"), [(case, "SGD") for case in CASES] + [(case, "Adam") for case in CASES if "cycl" in case]
)
def test_values_are_pytorchs(case: str, name: str, torch: Any) -> None:
    ours, theirs = build(name=name), build_torch(torch, name=name)
    our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
    assert our.get_last_lr() == their.get_last_lr() == rates_of(ours)
    assert follow(ours, our, EPOCHS, groups_of) == follow(theirs, their, EPOCHS, groups_of)
    assert our.get_last_lr() == their.get_last_lr() == rates_of(ours)
    assert getattr(our, "last_epoch", None) == getattr(their, "last_epoch", None)


@every_case
def test_state_dict_is_pytorchs(case: str, torch: Any) -> None:
    ours, theirs = build(), build_torch(torch)
    our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
    for epochs in (0, 5, 60):
        follow(ours, our, epochs)
        follow(theirs, their, epochs)
        assert our.state_dict() == their.state_dict()


@every_case
def test_a_run_started_in_pytorch_goes_on(case: str, torch: Any) -> None:
    """The other way round, too, for the state dicts are equal."""
    ours, theirs = build(), build_torch(torch)
    our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
    follow(theirs, their, 23)
    ours.load_state_dict(theirs.state_dict())
    our.load_state_dict(their.state_dict())
    assert follow(ours, our, 60, groups_of) == follow(theirs, their, 60, groups_of)


LEAVES = [
    "lambda of each group",
    "multiplicative",
    "step",
    "multi-step",
    "constant factor",
    "linear down",
    "exponential",
    "polynomial power",
    "cosine eta_min",
    "warm restarts ever longer",
    "cyclic",
    "cyclic exp_range",
    "one cycle",
]


@pytest.mark.parametrize("first", LEAVES)
def test_pairs_are_pytorchs(first: str, torch: Any) -> None:
    for second in LEAVES:
        for case in (chain([first, second]), sequence([first, second], 13)):
            ours, theirs = build(), build_torch(torch)
            our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
            assert follow(ours, our, 40, groups_of) == follow(theirs, their, 40, groups_of), case


NESTED = ["multiplicative", "linear down", "cosine eta_min", "warm restarts", "cyclic"]


@pytest.mark.parametrize("first", NESTED)
def test_nests_are_pytorchs(first: str, torch: Any) -> None:
    """All that PyTorch takes; it refuses a sequence or a chain in a later place of a sequence."""
    for second, third in itertools.product(NESTED, repeat=2):
        for inner in (chain([first, second]), sequence([first, second], 7)):
            for case in (chain([inner, third]), chain([third, inner]), sequence([inner, third], 15)):
                ours, theirs = build(), build_torch(torch)
                our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
                assert follow(ours, our, 30) == follow(theirs, their, 30), case


@pytest.mark.parametrize("inner", [chain, lambda schedulers: sequence(schedulers, 7)], ids=["chain", "sequence"])
def test_a_nest_in_a_later_place_begins_as_one_that_is_built_then(inner: Any, torch: Any) -> None:
    for pair in itertools.product(["multiplicative", "constant", "linear down", "step", "cosine"], repeat=2):
        case = sequence(["exponential", inner(pair), inner(pair)], 11, 30)
        optimizer, alone = build(), build_torch(torch)
        trace = follow(optimizer, make(optim.lr_scheduler, case)(optimizer), 50)
        expected = follow(alone, make(torch.optim.lr_scheduler, inner(pair))(alone), 20)
        assert trace[11:30] == expected[:19]
        assert trace[30:] == expected


def test_a_plateau_after_a_warm_up(torch: Any) -> None:
    """Its turn begins at the base rate, with nothing counted, as if it were built then."""
    optimizer, theirs, alone = build(), build_torch(torch), build_torch(torch)
    case = sequence(["exponential", "plateau max", "step"], 5, 90)
    trace = follow(optimizer, make(optim.lr_scheduler, case)(optimizer), 120)
    assert trace[5:90] == follow(theirs, make(torch.optim.lr_scheduler, "plateau max")(theirs), 85, first=5)
    assert len({rates[0] for rates in trace[5:90]}) > 10
    assert trace[90:] == follow(alone, make(torch.optim.lr_scheduler, "step")(alone), 30)


def test_a_plateau_in_the_first_place(torch: Any) -> None:
    optimizer, theirs = build(), build_torch(torch)
    scheduler = make(optim.lr_scheduler, sequence(["plateau", "linear"], 50))(optimizer)
    assert scheduler.get_last_lr() == list(RATES)
    assert follow(optimizer, scheduler, 50) == follow(theirs, make(torch.optim.lr_scheduler, "plateau")(theirs), 50)


@pytest.mark.parametrize("cases", [("exponential", "plateau abs"), ("plateau", "cosine", "plateau max")])
def test_a_plateau_in_a_chain_is_one_beside_the_others(cases: Any, torch: Any) -> None:
    optimizer, theirs = build(), build_torch(torch)
    both = [make(torch.optim.lr_scheduler, case)(theirs) for case in cases]
    trace = follow(optimizer, make(optim.lr_scheduler, chain(list(cases)))(optimizer), 90)
    assert trace == follow(theirs, both, 90)


def test_schedulers_may_be_stacked(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        return follow(optimizer, [module.ExponentialLR(optimizer, 0.99), module.StepLR(optimizer, 9, 0.5)], EPOCHS)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@every_case
def test_hand_edits_carry_on(case: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = make(module, case)(optimizer)
        trace = follow(optimizer, scheduler, 4)
        optimizer.param_groups[1]["lr"] = 0.5
        return trace + follow(optimizer, scheduler, 60, first=4)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@pytest.mark.parametrize("last_epoch", [0, 1, 6, 29, 31])
@pytest.mark.parametrize("case", WITHOUT_METRIC)
def test_resuming_by_last_epoch(case: str, last_epoch: int, torch: Any) -> None:
    """As in PyTorch, where the groups carry `initial_lr` and the present rate; it raises where they lack more."""

    def run(module: Any, optimizer: Any) -> Any:
        for group in optimizer.param_groups:
            group["initial_lr"], group["lr"] = group["lr"], group["lr"] * 0.9
        return outcome(lambda: follow(optimizer, make(module, case)(optimizer, last_epoch=last_epoch), 70))

    ours = run(optim.lr_scheduler, build())
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch))
    assert ours is KeyError or len(ours) == 70


@pytest.mark.parametrize("case", WITHOUT_METRIC)
def test_resuming_by_last_epoch_over_a_loaded_optimizer(case: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any, other: Any) -> Any:
        follow(optimizer, make(module, case)(optimizer), 12)
        other.load_state_dict(optimizer.state_dict())
        return follow(other, make(module, case)(other, last_epoch=11), 50, groups_of)

    theirs = run(torch.optim.lr_scheduler, build_torch(torch), build_torch(torch))
    assert run(optim.lr_scheduler, build(), build()) == theirs


@pytest.mark.parametrize("milestones", [[0, 4, 9], [0, 0, 1], [0, 0, 0], [1, 1, 5]])
@pytest.mark.parametrize(
    "cases", [("constant", "exponential", "linear down", "cosine"), ("cyclic", "step", "constant", "lambda")]
)
def test_milestones_at_zero_are_pytorchs(cases: Any, milestones: Any, torch: Any) -> None:
    """As mended in pytorch#185872, which 2.13 has."""
    case = sequence(list(cases), *milestones)
    ours, theirs = build(), build_torch(torch)
    our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
    assert our.get_last_lr() == their.get_last_lr()
    assert follow(ours, our, 20, groups_of) == follow(theirs, their, 20, groups_of)


SEQUENCES = [case for case, (name, _) in CASES.items() if name == "SequentialLR"]


@pytest.mark.parametrize("last_epoch", [0, 1, 4, 5, 19, 60, 89])
@pytest.mark.parametrize("case", SEQUENCES)
@pytest.mark.parametrize("inside", [-1, None], ids=["inside from the start", "inside from there"])
def test_a_sequence_resumes_by_last_epoch(case: str, last_epoch: int, inside: int | None) -> None:
    """It is where one is that was stepped so far; PyTorch's begins with the rates of epoch 0 (pytorch#162591)."""
    optimizer, other = build(), build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, last_epoch + 1)
    other.load_state_dict(optimizer.state_dict())
    _, arguments = CASES[case]
    options = {} if inside == -1 or "sequence of a" in case else {"last_epoch": last_epoch}
    each = [make(optim.lr_scheduler, scheduler, **options)(other) for scheduler in arguments["schedulers"]]
    resumed = optim.lr_scheduler.SequentialLR(other, each, arguments["milestones"], last_epoch)
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert resumed.last_epoch == scheduler.last_epoch
    look = groups_of if inside == -1 else rates_of  # cycles that resume write the momentum of their own epoch
    assert follow(other, resumed, 40, look) == follow(optimizer, scheduler, 40, look)


def test_a_sequence_that_needs_metrics_does_not_resume_by_last_epoch() -> None:
    optimizer = build()
    inside = [make(optim.lr_scheduler, case)(optimizer) for case in ("linear", "plateau")]
    before = groups_of(optimizer)
    with pytest.raises(ValueError, match="last_epoch=3 cannot be resumed, because a ReduceLROnPlateau would need"):
        optim.lr_scheduler.SequentialLR(optimizer, inside, [5], last_epoch=3)
    assert groups_of(optimizer) == before


@pytest.mark.parametrize("case", WITHOUT_METRIC)
def test_jumping_to_an_epoch_is_deprecated_and_pytorchs(case: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = make(module, case)(optimizer)
        optimizer.step()
        trace = []
        for epoch in (5, 2, 40, 0):
            caught = collect(lambda epoch=epoch: scheduler.step(epoch))
            trace.append(([kind for kind, _ in caught], scheduler.last_epoch, groups_of(optimizer)))
            scheduler.step()
            trace.append((scheduler.get_last_lr(), scheduler.last_epoch, groups_of(optimizer)))
        return trace

    # Where PyTorch's closed form divides by zero, ours stays at what it comes to by steps.
    theirs = outcome(lambda: run(torch.optim.lr_scheduler, build_torch(torch)))
    assert run(optim.lr_scheduler, build()) == theirs or (theirs is ZeroDivisionError and "no epochs" in case)


def test_jumping_within_an_epoch(torch: Any) -> None:
    """`CosineAnnealingWarmRestarts` takes fractions: one call a batch."""

    def run(module: Any, optimizer: Any, t_mult: int) -> Any:
        scheduler = module.CosineAnnealingWarmRestarts(optimizer, 3, t_mult)
        optimizer.step()
        return [(scheduler.step(batch / 7), rates_of(optimizer), scheduler.last_epoch) for batch in range(200)]

    for t_mult in (1, 2, 3):
        theirs = run(torch.optim.lr_scheduler, build_torch(torch), t_mult)
        assert run(optim.lr_scheduler, build(), t_mult) == theirs


def test_a_metric_of_an_epoch(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = module.ReduceLROnPlateau(optimizer)
        return collect(lambda: scheduler.step(3.0, 7)), scheduler.last_epoch, scheduler.best

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


def test_metrics_may_be_arrays() -> None:
    def run(wrap: Any) -> Any:
        optimizer = build()
        scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for metric in (2.0, 3.0, float("nan"), 1.0):
            scheduler.step(wrap(metric))
        return rates_of(optimizer), scheduler.best

    assert run(jnp.float32) == run(np.float64) == run(float) == ([rate * 0.1 * 0.1 for rate in RATES], 1.0)


@pytest.mark.parametrize("base", ["LRScheduler", "_LRScheduler"])
def test_a_scheduler_of_ones_own_needs_only_get_lr(base: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        class Inverse(getattr(module, base)):
            def get_lr(self) -> list[float]:
                return [base / (1 + self.last_epoch) for base in self.base_lrs]

        return follow(optimizer, Inverse(optimizer), 20)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


def test_a_scheduler_of_ones_own_may_have_its_own_step(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        class Inverse(module.LRScheduler):
            def step(self) -> None:
                self.last_epoch += 1
                for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                    group["lr"] = base / (1 + self.last_epoch)

        return follow(optimizer, Inverse(optimizer), 20)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


def test_an_optimizer_of_ones_own_is_scheduled() -> None:
    class Own(optim.Optimizer):
        def __init__(self, params: Any, **options: Any):
            super().__init__(params, {"lr": 1.0, **options})

        def step(self) -> None:
            pass

    optimizer = Own([jnp.ones(())])
    assert follow(optimizer, optim.lr_scheduler.ExponentialLR(optimizer, 0.5), 3) == [[1.0], [0.5], [0.25]]


def test_get_last_lr_is_what_the_last_step_set() -> None:
    optimizer = build()
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert scheduler.get_last_lr() == list(RATES)
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 9.0
    assert scheduler.get_last_lr() == [rate * 0.5 for rate in RATES]


def test_what_pytorch_divides_by_zero_for(torch: Any) -> None:
    for script in (
        lambda m, o: follow(o, m.ConstantLR(o, factor=0.0, total_iters=2), 4),
        lambda m, o: follow(o, m.OneCycleLR(o, max_lr=1.0, total_steps=4, pct_start=0.25, anneal_strategy="linear"), 4),
    ):
        assert outcome(lambda script=script: script(torch.optim.lr_scheduler, build_torch(torch))) is ZeroDivisionError
    constant, cycle = (optim.lr_scheduler.ConstantLR, optim.lr_scheduler.OneCycleLR)
    optimizer = build([0.5])
    assert follow(optimizer, constant(optimizer, factor=0.0, total_iters=2), 4) == [[0.0], [0.0], [0.5], [0.5]]
    optimizer = build([0.5])
    one_cycle = cycle(optimizer, 1.0, total_steps=4, pct_start=0.25, anneal_strategy="linear", final_div_factor=1.0)
    np.testing.assert_allclose(follow(optimizer, one_cycle, 4), [[1.0], [0.68], [0.36], [0.04]])


# --- Other numbers of the groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight_decay", "momentum"])
@every_case
def test_any_number_of_the_groups_is_scheduled_alike(case: str, key: str) -> None:
    ours, rates = build(key=key), build()
    scheduler, reference = make(optim.lr_scheduler, case, key=key)(ours), make(optim.lr_scheduler, case)(rates)
    trace = follow(ours, scheduler, 100, lambda optimizer: [group[key] for group in optimizer.param_groups])
    assert trace == follow(rates, reference, 100)
    assert scheduler.get_last_lr() == reference.get_last_lr()
    assert rates_of(ours) == [0.5] * 3


@pytest.mark.parametrize("case", ["cyclic", "one cycle"])
def test_the_momentum_is_not_cycled_twice(case: str) -> None:
    optimizer = build()
    before = groups_of(optimizer)
    with pytest.raises(ValueError, match="key='momentum' needs cycle_momentum=False"):
        make(optim.lr_scheduler, case)(optimizer, key="momentum")
    assert groups_of(optimizer) == before


@pytest.mark.parametrize("key", ["rate", "nesterov", "foreach", "params", "betas"])
def test_a_key_that_is_no_number_is_refused(key: str) -> None:
    optimizer = optim.NAdam([jnp.ones(())]) if key == "betas" else build()
    before = groups_of(optimizer)
    for case in ("exponential", "cyclic", "one cycle", "plateau"):
        with pytest.raises((TypeError, KeyError), match=key):
            make(optim.lr_scheduler, case)(optimizer, key=key)
    assert groups_of(optimizer) == before


def test_two_numbers_of_one_optimizer(compilations: Any) -> None:
    """Side by side, in a chain, and in a sequence; the step compiles nothing for it."""

    def run(arrange: Any) -> Any:
        optimizer = optim.AdamW([jnp.ones(3)], lr=1.0, weight_decay=0.5)
        rate = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        decay = optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, key="weight_decay")
        schedulers, trace, compiled = arrange([rate, decay]), [], []
        for _ in range(12):
            trace.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
            optimizer.step([jnp.ones(3)])
            for scheduler in schedulers:
                scheduler.step()
            compiled.append(compilations())
        assert compiled[1] == compiled[-1]
        assert schedulers[0].get_last_lr() == [optimizer.param_groups[0]["lr"]]
        return trace

    trace = run(list)
    assert [rate for rate, _ in trace] == pytest.approx([0.9**epoch for epoch in range(12)])
    expected = [optim.schedules.cosine_annealing(0.5, 20)(epoch) for epoch in range(12)]
    assert [decay for _, decay in trace] == pytest.approx(expected)
    assert run(lambda both: [optim.lr_scheduler.ChainedScheduler(both)]) == trace
    in_turn = run(lambda both: [optim.lr_scheduler.SequentialLR(both[0].optimizer, both, [5])])
    assert in_turn[:5] == [(rate, 0.5) for rate, _ in trace[:5]]
    assert in_turn[5:] == [(in_turn[4][0], decay) for _, decay in trace[:7]]


# --- Resuming from state dicts --------------------------------------------------------------------------------------


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
RESUMED: dict[str, Any] = {name: [name] for name in CASES}
RESUMED["stacked"] = ["lambda", "exponential"]
RESUMED["stacked cosine"] = ["cosine", "step gamma"]
RESUMED["stacked cycle and plateau"] = ["one cycle", "plateau abs"]
RESUMED["stacked sequence and step"] = ["sequence", "step"]


def check_resuming(
    schedulers: Any, stops: list[int], order: Any, through: Any, same_rate: bool, edit: float | None, name: str
) -> None:
    """Stopped at any epochs, perhaps after an edit by hand, and loaded in any order."""

    def segments(resume: bool) -> Any:
        optimizer = build(name=name)
        built = [scheduler(optimizer) for scheduler in schedulers]
        trace = []
        for stop in [*stops, None]:
            trace += follow(optimizer, built, 30 if stop is None else stop, groups_of, first=len(trace))
            if edit is not None:
                optimizer.param_groups[0]["lr"] = edit
            if resume and stop is not None:
                saved = through([optimizer.state_dict(), [scheduler.state_dict() for scheduler in built]])
                saved[0]["state"] = {}
                optimizer = build(RATES if same_rate else (0.7, 0.7, 0.7), name)
                built = order(optimizer, schedulers, saved)
        last = [scheduler.get_last_lr() for scheduler in built]
        return trace, last, [scheduler.state_dict() for scheduler in built]

    assert segments(resume=True) == segments(resume=False)


how = dict(
    stops=st.lists(st.integers(0, 25), min_size=1, max_size=2),
    order=st.sampled_from(ORDERS),
    through=st.sampled_from(THROUGH),
    same_rate=st.booleans(),
    edit=st.sampled_from([None, 0.2, RATES[0]]),
    name=st.sampled_from(list(OPTIONS)),
)


@pytest.mark.parametrize("cases", RESUMED.values(), ids=RESUMED)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(**how)
def test_resuming_is_bit_for_bit(cases: list[str], **how: Any) -> None:
    check_resuming([make(optim.lr_scheduler, case) for case in cases], **how)


@st.composite
def nests(draw: Any, depth: int = 2) -> Any:
    """Sequences and chains of up to three, one in the other."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from([case for case in SINGLE if "no epochs" not in case]))
    inner = draw(st.lists(nests(depth=depth - 1), min_size=1, max_size=3))
    if draw(st.booleans()):
        return chain(inner)
    return sequence(inner, *sorted(draw(st.integers(0, 40)) for _ in inner[1:]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(nest=nests(), **how)
def test_resuming_a_nest_is_bit_for_bit(nest: Any, **how: Any) -> None:
    check_resuming([make(optim.lr_scheduler, nest)], **how)


@every_case
def test_a_scheduler_resumed_without_its_optimizer_sets_the_rates(case: str) -> None:
    """What scripts do that save only model and scheduler; a rate that was edited since building stays."""
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 23)
    fresh, edited = build(), build()
    resumed, other = make(optim.lr_scheduler, case)(fresh), make(optim.lr_scheduler, case)(edited)
    edited.param_groups[1]["lr"] = 0.25
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(scheduler.state_dict())
    assert rates_of(fresh) == rates_of(optimizer) == resumed.get_last_lr()
    assert rates_of(edited) == [rates_of(optimizer)[0], 0.25, rates_of(optimizer)[2]]
    assert follow(fresh, resumed, 40, first=23) == follow(optimizer, scheduler, 40, first=23)


@every_case
def test_a_rate_edited_between_loading_and_building_stays(case: str) -> None:
    """To go on with a smaller rate."""
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 23)
    other = build()
    other.load_state_dict(optimizer.state_dict())
    for edited in (other, optimizer):
        edited.param_groups[1]["lr"] = 3e-4
    resumed = make(optim.lr_scheduler, case)(other)
    resumed.load_state_dict(scheduler.state_dict())
    assert follow(other, resumed, 30, groups_of, first=23) == follow(optimizer, scheduler, 30, groups_of, first=23)


def test_a_run_with_a_model_resumes_bit_for_bit() -> None:
    """Parameters too: the rate enters the arithmetic."""

    def build_run(value: Any) -> Any:
        optimizer = optim.Adam({"w": value}, lr=0.1)
        return optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def loss(params: Any) -> Any:
        return jnp.sum(params["w"] ** 4)

    def train(optimizer: Any, scheduler: Any, epochs: int) -> None:
        for _ in range(epochs):
            optimizer.step(loss)
            scheduler.step()

    whole = build_run(jnp.arange(3.0))
    train(*whole, 12)
    first = build_run(jnp.arange(3.0))
    train(*first, 7)
    second = build_run(first[0].params["w"])
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*second, 5)
    np.testing.assert_array_equal(second[0].params["w"], whole[0].params["w"])


@every_case
def test_a_state_dict_is_a_snapshot(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 1)
    saved = scheduler.state_dict()
    before = copy.deepcopy(saved)
    follow(optimizer, scheduler, 5)
    optimizer.add_param_group({"params": [jnp.ones(())]})
    with contextlib.suppress(Exception):
        follow(optimizer, scheduler, 1)
    assert saved == before


@every_case
def test_loading_leaves_the_state_dict_alone(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 3)
    saved = scheduler.state_dict()
    before = copy.deepcopy(saved)
    other = build()
    loaded = make(optim.lr_scheduler, case)(other)
    loaded.load_state_dict(saved)
    follow(other, loaded, 3)
    assert saved == before


def test_callable_objects_are_saved_with_their_attributes(torch: Any) -> None:
    def run(module: Any, optimizer: Any, other: Any) -> Any:
        scheduler = module.LambdaLR(optimizer, [Decay(0.9), warm_up, functools.partial(pow, 0.5)])
        cyclic = module.CyclicLR(optimizer, 0.1, 0.2, 3, scale_fn=Decay(0.8))
        follow(optimizer, [scheduler, cyclic], 3)
        saved = scheduler.state_dict(), cyclic.state_dict()
        functions = saved[0]["lr_lambdas"], saved[1]["_scale_fn_custom"]
        loaded = module.LambdaLR(other, [Decay(0.1), warm_up, functools.partial(pow, 0.5)])
        loaded.load_state_dict(saved[0])
        cycles = module.CyclicLR(other, 0.1, 0.2, 3, scale_fn=Decay(0.1))
        cycles.load_state_dict(saved[1])
        return functions, loaded.lr_lambdas[0].factor, cycles.scale_fn(1), follow(other, [loaded, cycles], 4)[1:]

    ours = run(optim.lr_scheduler, build(), build())
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch), build_torch(torch))
    assert ours[:3] == (([{"factor": 0.9}, None, {}], {"factor": 0.8}), 0.9, 0.8)


def test_a_schedule_is_a_function_of_which_nothing_is_saved() -> None:
    optimizer = build()
    schedule = optim.schedules.warmup(optim.schedules.cosine_annealing(1.0, T_max=9), 3)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, schedule)
    assert scheduler.state_dict()["lr_lambdas"] == [None] * 3
    shown = repr(scheduler)
    assert shown.startswith(("LambdaLR(lr_lambda=warmup(", "LambdaLR(lr_lambda=joined)"))
    follow(optimizer, scheduler, 3)
    other = build()
    resumed = optim.lr_scheduler.LambdaLR(other, optim.schedules.warmup(optim.schedules.cosine_annealing(1.0, 9), 3))
    resumed.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    assert follow(other, resumed, 9) == follow(optimizer, scheduler, 9)


def test_a_jitted_function_is_not_saved() -> None:
    optimizer = build()
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, jax.jit(lambda epoch: 0.5**epoch))
    assert scheduler.state_dict()["lr_lambdas"] == [None] * 3


# --- State dicts that do not fit ------------------------------------------------------------------------------------


def contents(optimizer: Any, scheduler: Any) -> Any:
    """All that a failed load must leave as it was."""
    return *copy.deepcopy((groups_of(optimizer), scheduler.state_dict())), optimizer._record


def refused(scheduler: Any, state: Any, message: str) -> None:
    before = contents(scheduler.optimizer, scheduler)
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert contents(scheduler.optimizer, scheduler) == before


@pytest.mark.parametrize("saved", ["step", "sequence", "plateau"])
@pytest.mark.parametrize("case", ["lambda", "multi-step", "cyclic scale_fn", "sequence of a chain"])
def test_a_state_dict_of_another_scheduler_changes_nothing(case: str, saved: str) -> None:
    other = build()
    state = make(optim.lr_scheduler, saved)(other).state_dict()
    refused(make(optim.lr_scheduler, case)(build()), state, "the state dict has|_schedulers")


@every_case
def test_a_state_dict_that_is_ill_formed_names_the_entry(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 3)
    good = scheduler.state_dict()
    for wrong in (None, [], "state", 5):
        refused(scheduler, wrong, "a state dict is a dict, got")
    refused(scheduler, {}, "the state dict has no '")
    refused(scheduler, {"step": 5}, "the state dict has no '")
    refused(scheduler, good | {"stepsize": 5}, "the state dict has 'stepsize', which .* does not keep")
    refused(scheduler, good | {3: 5}, "the state dict has 3, which .* does not keep")
    refused(scheduler, good | {"key": "weight_decay"}, "of a scheduler with key='weight_decay', this")
    for name, value in good.items():
        optional = ("use_beta1", "base_momentums", "max_momentums", "_is_initial", "_get_lr_called_within_step")
        if name not in (*optional, "_anneal_func_type", "default_min_lr"):
            refused(scheduler, {n: v for n, v in good.items() if n != name}, f"the state dict has no '{name}'")
        if name == "default_min_lr" or value is None:
            continue
        for wrong in (object(), None, "abc", {1: 2}, [], [object()] * 3, [1.0] * 4):
            if isinstance(value, type(wrong)) and (not isinstance(wrong, list) or wrong == value):
                continue
            if name == "_scale_fn_custom" and wrong is None:  # a function, which has nothing to load
                continue
            refused(scheduler, good | {name: wrong}, f"{name}|[Ss]chedulers")
    for name, wrong in (("last_epoch", 2.5), ("_step_count", "1"), ("num_bad_epochs", 0.5)):
        if name in good:
            refused(scheduler, good | {name: wrong}, f"'{name}' of the state dict is {wrong!r}, expected a")
    cyclic: Any = {}
    cyclic["a"] = cyclic
    refused(scheduler, good | {"last_epoch": cyclic}, "holds itself, or is nested too deeply|'last_epoch'")
    scheduler.load_state_dict(good)
    assert scheduler.state_dict() == good


@pytest.mark.parametrize(
    ("case", "entries"),
    [
        ("step", {"step_size": 0}),
        ("constant", {"factor": 1.5}),
        ("constant", {"total_iters": -1}),
        ("linear", {"start_factor": 0.0}),
        ("polynomial", {"total_iters": -1}),
        ("cosine", {"T_max": 0}),
        ("warm restarts", {"T_0": 0}),
        ("warm restarts", {"T_i": -1}),
        ("cyclic", {"mode": "square"}),
        ("cyclic", {"total_size": 0.0}),
        ("one cycle", {"total_steps": 0}),
        ("one cycle", {"_anneal_func_type": "square"}),
        ("one cycle", {"_schedule_phases": [{"end_step": 3}]}),
        ("plateau", {"factor": 2.0}),
        ("plateau", {"mode": "best"}),
        ("sequence", {"_milestones": [9, 3]}),
        ("sequence", {"_milestones": [9]}),
        ("multi-step", {"milestones": {"abc": 1}}),
    ],
    ids=str,
)
def test_a_state_dict_with_a_value_out_of_range_is_refused(case: str, entries: Any) -> None:
    scheduler = make(optim.lr_scheduler, case)(build())
    refused(
        scheduler,
        scheduler.state_dict() | entries,
        f"{str(next(iter(entries))).strip('_')}|[Ss]chedulers|strategy|Factor",
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("loaded", [False, True], ids=["scheduler alone", "optimizer too"])
def test_a_failed_load_does_not_spoil_the_next(groups: int, loaded: bool) -> None:
    """What the optimizer has noted of building must come back with the groups."""

    def make(schedulers: int = 2) -> Any:
        optimizer = build([1.0] * groups)
        both = [optim.lr_scheduler.ExponentialLR(optimizer, 0.5), optim.lr_scheduler.ConstantLR(optimizer, 0.5, 20)]
        return optimizer, optim.lr_scheduler.ChainedScheduler(both[:schedulers])

    optimizer, scheduler = make()
    follow(optimizer, scheduler, 4)
    other, loading = make()
    if loaded:
        other.load_state_dict(optimizer.state_dict())
    broken = copy.deepcopy(scheduler.state_dict())
    broken["_schedulers"][1]["last_epoch"] = "abc"
    refused(loading, broken, r"_schedulers\[1\]: 'last_epoch' of the state dict is 'abc', expected a number")
    refused(loading, make(1)[1].state_dict(), "'_schedulers' .* expected a list with the state dicts of 2 schedulers")
    loading.load_state_dict(scheduler.state_dict())
    assert rates_of(other) == rates_of(optimizer) == [0.03125] * groups
    assert follow(other, loading, 30) == follow(optimizer, scheduler, 30)


def test_a_failed_load_leaves_the_attributes_of_functions() -> None:
    optimizer, decay = build(), Decay(0.5)
    inside = [
        optim.lr_scheduler.LambdaLR(optimizer, decay),
        optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, scale_fn=decay),
        optim.lr_scheduler.StepLR(optimizer, 3),
    ]
    scheduler = optim.lr_scheduler.ChainedScheduler(inside)
    state = scheduler.state_dict()
    state["_schedulers"][0]["lr_lambdas"] = [{"factor": 0.1, "more": 1}] * 3
    state["_schedulers"][2]["gamma"] = "abc"
    refused(scheduler, state, r"_schedulers\[2\]: 'gamma'")
    assert vars(decay) == {"factor": 0.5}


class Warm(optim.lr_scheduler.StepLR):
    """A class of the user's, with attributes of its own, and rates of groups where ours has one for all."""

    def __init__(self, optimizer: Any, warm_up: int, **attributes: Any):
        self.warm_up = warm_up
        super().__init__(optimizer, 3, gamma=[0.5, 0.4, 0.3])  # pyright: ignore[reportArgumentType]
        vars(self).update(attributes)

    def get_lr(self) -> list[Any]:
        return [rate * gamma for rate, gamma in zip(self._rates(), self.gamma, strict=False)]  # pyright: ignore


def test_the_attributes_of_a_users_class_are_its_own_business() -> None:
    optimizer = build()
    scheduler = Warm(optimizer, 3, note="old", new=None)
    follow(optimizer, scheduler, 2)
    saved = scheduler.state_dict() | {"of another version": 1, "note": ["anything"], "gamma": [0.1, 0.2]}
    del saved["warm_up"], saved["new"]
    scheduler.load_state_dict(saved)
    assert vars(scheduler)["of another version"] == 1
    assert (scheduler.gamma, scheduler.note, scheduler.warm_up, scheduler.new) == ([0.1, 0.2], ["anything"], 3, None)
    refused(scheduler, {"warm_up": 3}, "has no '")
    refused(scheduler, saved | {"last_epoch": "abc"}, "'last_epoch' of the state dict is 'abc', expected a number")


def test_an_attribute_of_ones_own_on_a_scheduler_of_ours() -> None:
    scheduler: Any = optim.lr_scheduler.StepLR(build(), 3)
    saved = scheduler.state_dict()
    scheduler.note = "kept"
    scheduler.load_state_dict(saved)
    scheduler.load_state_dict(saved | {"note": "loaded"})
    assert scheduler.note == "loaded"


def test_state_dicts_of_other_versions_of_pytorch() -> None:
    for case in ("step", "one cycle", "plateau"):
        scheduler = make(optim.lr_scheduler, case)(build())
        saved = scheduler.state_dict() | {"verbose": False}
        for name in ("_is_initial", "_get_lr_called_within_step", "_anneal_func_type", "default_min_lr", "use_beta1"):
            saved.pop(name, None)
        scheduler.load_state_dict(saved)


@pytest.mark.parametrize("case", ["exponential", "lambda", "cyclic", "cosine", "chain", "sequence"])
def test_a_run_that_is_saved_before_the_step_that_adopts_a_new_group_resumes(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 3)
    optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
    saved = optimizer.state_dict(), scheduler.state_dict()
    for order in (0, 1):
        other = build((*RATES, 0.25))
        resumed = make(optim.lr_scheduler, case)(other)
        for each in (saved, saved[::-1])[order]:
            (other if "param_groups" in each else resumed).load_state_dict(copy.deepcopy(each))
        assert follow(other, resumed, 20) == follow(*copy.deepcopy((optimizer, scheduler)), 20)


@pytest.mark.parametrize("case", ["step", "lambda of each group", "cyclic", "plateau", "sequence of a chain"])
@pytest.mark.parametrize("what", ["build", "step", "load"])
def test_an_interrupt_leaves_all_old_or_all_new(case: str, what: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 2)
    saved = scheduler.state_dict()
    follow(optimizer, scheduler, 5)
    calls: dict[str, Callable[[], Any]] = {
        "build": lambda: make(optim.lr_scheduler, "exponential")(optimizer),
        "step": lambda: scheduler.step(*([1.0] if takes_metric(scheduler) else [])),
        "load": lambda: scheduler.load_state_dict(saved),
    }
    before, count = contents(optimizer, scheduler), 0
    for interrupted in interrupted_everywhere(base_module, calls[what]):
        count += 1
        assert (contents(optimizer, scheduler) == before) == interrupted
    assert count > 15


# --- Warnings and errors --------------------------------------------------------------------------------------------


def collect(script: Callable[[], Any]) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script()
    return [(warning.category, str(warning.message)[:40]) for warning in caught]


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


# --- Arrays, compilation, groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@every_case
def test_rates_in_arrays_are_pytorchs(case: str, shape: Any, torch: Any, x64: None) -> None:
    """float64 tensors; only `LambdaLR` and what is nested differs, by the order of a product."""
    ours = build([jnp.full(shape, rate, jnp.float64) for rate in RATES])
    theirs = build_torch(torch, [torch.full(shape, rate, dtype=torch.float64) for rate in RATES])
    our, their = make(optim.lr_scheduler, case)(ours), make(torch.optim.lr_scheduler, case)(theirs)
    numbers = lambda optimizer: [(rate.shape, float(rate.reshape(()))) for rate in rates_of(optimizer)]  # noqa: E731
    assert follow(ours, our, 40, numbers) == follow(theirs, their, 40, numbers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_case
def test_a_rate_in_an_array_stays_an_array_of_its_dtype(case: str, dtype: Any) -> None:
    optimizer, plain = build([jnp.asarray(rate, dtype) for rate in RATES]), build()
    scheduler, reference = make(optim.lr_scheduler, case)(optimizer), make(optim.lr_scheduler, case)(plain)
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 0.2}[dtype]
    for ours, wanted in zip(follow(optimizer, scheduler, 12), follow(plain, reference, 12), strict=True):
        assert all(isinstance(rate, jax.Array) and rate.dtype == dtype and rate.shape == () for rate in ours)
        np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=tolerance, atol=1e-9)
    assert all(isinstance(rate, jax.Array) and rate.dtype == dtype for rate in scheduler.get_last_lr())


@every_case
def test_scheduling_never_recompiles_the_step(case: str, compilations: Any) -> None:
    optimizer = optim.Adam([{"params": [jnp.ones(3)]}, {"params": [jnp.ones(3)]}, {"params": [jnp.ones(2)]}], lr=0.1)
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    metric = [1.0] if takes_metric(scheduler) else []

    def epoch() -> None:
        optimizer.step([[jnp.ones(3)], [jnp.ones(3)], [jnp.ones(2)]])
        optimizer.step(sum_of_squares)
        scheduler.step(*metric)

    for _ in range(2):
        epoch()
    before = compilations()
    for _ in range(12):
        epoch()
    assert compilations() == before


def sum_of_squares(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@every_case
def test_a_group_added_mid_run_is_scheduled(case: str, torch: Any) -> None:
    """As in PyTorch, or, where that raises, the others as if nothing were, and the new one too."""

    def run(module: Any, optimizer: Any, params: Any, added: bool = True) -> Any:
        scheduler = make(module, case)(optimizer)
        follow(optimizer, scheduler, 10)
        if added:
            optimizer.add_param_group({"params": params, "lr": 0.25})
        return follow(optimizer, scheduler, 90, first=10)

    theirs = outcome(lambda: run(torch.optim.lr_scheduler, build_torch(torch), [torch.nn.Parameter(torch.ones(()))]))
    if "each group" in case or case == "plateau abs":  # there is no value for the new one
        with pytest.raises((ValueError, RuntimeError), match=r"(added|with) .*(add its own|modify the `min_lrs`)"):
            run(optim.lr_scheduler, build(), [jnp.ones(())])
        return
    ours = run(optim.lr_scheduler, build(), [jnp.ones(())])
    if isinstance(theirs, list):
        assert ours == theirs
    else:
        assert [rates[:3] for rates in ours] == run(optim.lr_scheduler, build(), [], added=False)
        assert ours[0][3] == 0.25
        assert len({rates[3] for rates in ours}) > 1


@every_case
def test_the_other_groups_do_not_notice_one_that_is_added(case: str) -> None:
    """Every value of theirs, momentum too, is what it would have been; the momentum of the new one cycles with them."""
    if "each group" in case or case == "plateau abs":  # there is no value for the new one
        return

    def run(added: bool) -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        trace = follow(optimizer, scheduler, 7, groups_of)
        if added:
            optimizer.add_param_group({"params": [jnp.ones(())], "lr": RATES[0]})
        return trace + follow(optimizer, scheduler, EPOCHS - 7, groups_of, first=7)

    alone, together = run(added=False), run(added=True)
    assert [groups[:3] for groups in together] == alone
    assert all(groups[3]["momentum"] == groups[0]["momentum"] for groups in together[8:])


def test_the_rates_of_a_group_added_mid_run() -> None:
    def run(case: str | Case) -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        follow(optimizer, scheduler, 10)
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        follow(optimizer, scheduler, 1)
        return [rates[3] for rates in follow(optimizer, scheduler, 60)], optimizer.param_groups

    assert run("lambda")[0] == [0.25 * warm_up(epoch) for epoch in range(11, 71)]
    restarts = optim.schedules.cosine_annealing_warm_restarts(0.25, 9)
    assert run("warm restarts")[0] == [restarts(epoch) for epoch in range(11, 71)]
    rates, groups = run("one cycle")
    assert rates == run("one cycle")[0]
    assert groups[3]["lr"] == groups[0]["lr"]
    assert groups[3]["momentum"] == groups[0]["momentum"] != 0.9
    assert run(sequence(["exponential", "lambda"], 20))[0][9:] == [0.25 * warm_up(epoch) for epoch in range(51)]
    assert run(sequence(["exponential", "plateau"], 11))[0][0] == 0.25


COSINE = "CosineAnnealingLR", dict(T_max=5, eta_min=0.01)


@pytest.mark.parametrize(
    ("case", "begin"),
    [(COSINE, 0), (chain([COSINE]), 0), (sequence([COSINE, "step"], 40), 0), (sequence(["step", COSINE], 3), 3)],
    ids=["alone", "in a chain", "first of a sequence", "second of a sequence"],
)
@pytest.mark.parametrize("epoch", range(1, 12))
def test_a_group_added_anywhere_to_a_cosine(case: Case, begin: int, epoch: int, torch: Any) -> None:
    def run(module: Any, optimizer: Any, param: Any, **rates: float) -> list[Any]:
        scheduler = make(module, case)(optimizer)
        follow(optimizer, scheduler, begin + epoch)
        optimizer.add_param_group({"params": [param], "lr": 0.25, **rates})
        trace: list[Any] = []
        with contextlib.suppress(ValueError):  # of PyTorch, at the bottom
            for _ in range(24):
                trace += follow(optimizer, scheduler, 1)
        return trace

    theirs = run(torch.optim.lr_scheduler, build_torch(torch), torch.nn.Parameter(torch.ones(())))
    ours = run(optim.lr_scheduler, build(), jnp.ones(()))
    assert ours[: len(theirs)] == theirs
    assert len(theirs) < len(ours) == 24
    added = np.array(ours)[:, 3]
    if 5 < epoch < 10:  # on the way up, where PyTorch has values: far above, until the next bottom
        assert np.max(added) > 0.25
        added = added[16 - epoch :]
    np.testing.assert_array_less(added, 0.25 + 1e-9)
    np.testing.assert_array_less(0.01 - 1e-9, added)
    if epoch == 5:
        own = optim.schedules.cosine_annealing(0.25, 5, 0.01)
        np.testing.assert_allclose(added[1:], [own(at) for at in range(6, 29)], rtol=1e-9)
    like = {"lr": ours[0][0], "initial_lr": RATES[0]}
    both = np.array(run(optim.lr_scheduler, build(), jnp.ones(()), **like))
    np.testing.assert_allclose(both[:, 3], both[:, 0], rtol=1e-9)


@pytest.mark.parametrize("case", ["cyclic", "one cycle", "lambda", "plateau", "sequence of cycles"])
@pytest.mark.parametrize("through", THROUGH[1:], ids=["pickle", "JSON"])
def test_a_group_added_after_resuming(case: str, through: Any) -> None:
    def run(resume: bool) -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        follow(optimizer, scheduler, 10)
        if resume:
            saved = through([optimizer.state_dict(), scheduler.state_dict()])
            optimizer = build()
            scheduler = make(optim.lr_scheduler, case)(optimizer)
            optimizer.load_state_dict(saved[0] | {"state": {}})
            scheduler.load_state_dict(saved[1])
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        return follow(optimizer, scheduler, 90, groups_of, first=10)

    assert run(resume=True) == run(resume=False)


def test_a_group_added_beside_a_list_of_lambdas() -> None:
    """There is no function for it: the error says where to give one, and no epoch is lost."""
    optimizer = build()
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, [Decay(0.9), Decay(0.8), Decay(0.7)])
    follow(optimizer, scheduler, 2)
    optimizer.add_param_group({"params": [jnp.ones(())], "lr": 1.0})
    before = rates_of(optimizer)
    with pytest.raises(ValueError, match=r"Expected 4 scheduler\.lr_lambdas, but got 3: .* add its own"):
        scheduler.step()
    assert rates_of(optimizer) == before
    assert scheduler.last_epoch == 2
    scheduler.lr_lambdas.append(Decay(0.6))
    scheduler.step()
    assert scheduler.last_epoch == 3
    assert rates_of(optimizer) == [
        rate * factor**3 for rate, factor in zip((*RATES, 1.0), (0.9, 0.8, 0.7, 0.6), strict=True)
    ]


@every_case
def test_a_run_with_an_added_group_resumes(case: str) -> None:
    def start() -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        follow(optimizer, scheduler, 5)
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        follow(optimizer, scheduler, 5, first=5)
        return optimizer, scheduler

    if "each group" in case or case == "plateau abs":
        return
    optimizer, scheduler = start()
    for order in ORDERS:
        other = build((*RATES, 0.25))
        saved = [optimizer.state_dict(), [scheduler.state_dict()]]
        built = order(other, [make(optim.lr_scheduler, case)], saved)
        assert follow(other, built, 30, first=10) == follow(*start(), 30, first=10)


def test_optimizer_and_scheduler_copied_together_stay_together() -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, "sequence of a chain")(optimizer)
    follow(optimizer, scheduler, 2)
    for twins in (copy.deepcopy((optimizer, scheduler)), pickle.loads(pickle.dumps((optimizer, scheduler)))):
        assert twins[1].optimizer is twins[0]
        expected = follow(*copy.deepcopy((optimizer, scheduler)), 60)
        assert follow(*twins, 60) == expected


# --- Preview --------------------------------------------------------------------------------------------------------


@every_case
def test_a_preview_is_what_comes_and_changes_nothing(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 3)
    before = groups_of(optimizer), scheduler.state_dict()
    metrics = METRICS[3:] if takes_metric(scheduler) else None
    rates = optim.lr_scheduler.preview(scheduler, 60, metrics)
    assert rates.shape == (60, 3)
    assert rates.dtype == np.float64
    assert (groups_of(optimizer), scheduler.state_dict()) == before
    assert rates.tolist() == follow(optimizer, scheduler, 60, first=3)


def test_preview_of_another_number_and_of_arrays() -> None:
    optimizer = build([jnp.full((1,), 0.5)])
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    np.testing.assert_array_equal(optim.lr_scheduler.preview(scheduler, 3), [[0.5], [0.25], [0.125]])
    optimizer.param_groups[0]["weight_decay"] = 1.0
    decay = optim.lr_scheduler.ChainedScheduler([optim.lr_scheduler.ExponentialLR(optimizer, 0.1, key="weight_decay")])
    np.testing.assert_allclose(optim.lr_scheduler.preview(decay, 2), [[1.0], [0.1]])
    assert optim.lr_scheduler.preview(scheduler, 0).shape == (0, 1)


def test_preview_where_it_cannot_be() -> None:
    optimizer = build()
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    chained = optim.lr_scheduler.ChainedScheduler([optim.lr_scheduler.StepLR(optimizer, 3), plateau])
    for scheduler in (plateau, chained):
        before = scheduler.state_dict()
        with pytest.raises(TypeError, match="ReduceLROnPlateau needs the metric of the epoch"):
            optim.lr_scheduler.preview(scheduler, 3)
        with pytest.raises(ValueError, match="expected a metric for each of 4 steps, got 3"):
            optim.lr_scheduler.preview(scheduler, 5, [1.0, 2.0, 3.0])
        assert scheduler.state_dict() == before
    with pytest.raises(ValueError, match="Tried to step 6 times"):
        optim.lr_scheduler.preview(optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5), 8)
    # One that looks at no metric does not take it for an epoch.
    step = optim.lr_scheduler.StepLR(build([1.0]), 1, gamma=0.5)
    assert optim.lr_scheduler.preview(step, 3, [7.0, 7.0]).ravel().tolist() == [1.0, 0.5, 0.25]


# --- Showing --------------------------------------------------------------------------------------------------------


SHOWN = {
    "lambda": "LambdaLR(lr_lambda=warm_up) at epoch 2: lr [0.0428571, 0.0158571, 0.000428571]",
    "lambda of each group": "LambdaLR(lr_lambda=[Decay, <lambda>, warm_up]) at epoch 2: lr [",
    "multi-step": "MultiStepLR(milestones=[3, 50, 50, 120], gamma=0.3) at epoch 2: lr [0.1, 0.037, 0.001]",
    "cosine": "CosineAnnealingLR(T_max=30, eta_min=0) at epoch 2: lr [0.0989074, 0.0365957, 0.000989074]",
    "constant": "ConstantLR(factor=0.333333, total_iters=5) at epoch 2: lr [",
    "cyclic of each group": (
        "CyclicLR(base_lr=[0.01, 0.02, 0], max_lr=[0.3, 0.1, 0.2], step_size_up=9, step_size_down=9, "
        "mode='triangular2', gamma=1, scale_mode='cycle', cycle_momentum=True, base_momentum=[0.7, 0.75, 0.8], "
        "max_momentum=[0.9, 0.95, 0.85]) at epoch 2: lr ["
    ),
    "cyclic scale_fn": "scale_fn=Decay, scale_mode='iterations'",
    "one cycle": "OneCycleLR(max_lr=0.4, total_steps=200, anneal_strategy='cos', cycle_momentum=True) at epoch 2: lr [",
    "plateau abs": (
        "ReduceLROnPlateau(mode='min', factor=0.5, patience=2, threshold=0.01, threshold_mode='abs', cooldown=2, "
        "min_lr=[0.001, 0.0001, 0], eps=1e-08) at epoch 2: lr ["
    ),
    "sequence of a chain": """SequentialLR(
    ChainedScheduler(
        ConstantLR(factor=0.15, total_iters=31),
        ExponentialLR(gamma=0.977),
        StepLR(step_size=7, gamma=0.1),
    ),
    CosineAnnealingWarmRestarts(T_0=9, T_mult=1, eta_min=0),
    milestones=[40],
) at epoch 2: lr [""",
    "chain of one": """ChainedScheduler(
    CosineAnnealingLR(T_max=30, eta_min=0),
): lr [0.0989074, 0.0365957, 0.000989074]""",
}


@every_case
def test_a_scheduler_shows_its_arguments_its_epoch_and_its_rates(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 2)
    before = contents(optimizer, scheduler)
    shown = repr(scheduler)
    assert SHOWN.get(case, f"{type(scheduler).__name__}(") in shown
    assert f": lr [{scheduler.get_last_lr()[0]:g}, " in shown
    assert "object at" not in shown
    assert contents(optimizer, scheduler) == before


def test_showing_another_number_and_arrays() -> None:
    optimizer = build([jnp.asarray(0.25), jnp.full((1,), 0.5)])
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert repr(scheduler) == "ExponentialLR(gamma=0.5) at epoch 0: lr [0.25, 0.5]"
    decay = optim.lr_scheduler.StepLR(optimizer, 3, key="weight_decay")
    assert repr(decay) == "StepLR(step_size=3, gamma=0.1, key='weight_decay') at epoch 0: weight_decay [0, 0]"
    scheduler.get_last_lr()[0].delete()
    assert repr(scheduler) == "ExponentialLR(gamma=0.5) at epoch 0: lr [<ArrayImpl>, 0.5]"
    assert repr(optim.swa_utils.SWALR(build(), [0.1, 0.1, 0.1])) == (
        "SWALR(swa_lr=0.1, anneal_epochs=10, anneal_strategy='cos') at epoch 0: lr [0.1, 0.037, 0.001]"
    )


def test_showing_what_is_half_built_or_odd() -> None:
    for name in sorted(set(optim.lr_scheduler.__all__) - {"find_lr", "preview"}):
        cls = getattr(optim.lr_scheduler, name)
        assert repr(cls.__new__(cls)) == f"{name}()"

    class Odd(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, *args: Any, width: Any = 3, other: int = 4, **kwargs: Any):
            self.width, self._other, self._last_lr = width, other, None
            self.last_epoch = self.args = object()

        def _arguments_elsewhere(self) -> Any:
            raise RuntimeError("not yet")

    class Hidden:
        def __repr__(self) -> str:
            raise RuntimeError("not shown")

    assert repr(Odd(None)).startswith("Odd(width=3, other=4) at epoch <object obj")
    assert repr(Odd(None, width=Hidden())).startswith("Odd(width=<Hidden instance at 0x")
    assert repr(Warm(build(), 7)) == "Warm(warm_up=7) at epoch 0: lr [0.05, 0.0148, 0.0003]"
