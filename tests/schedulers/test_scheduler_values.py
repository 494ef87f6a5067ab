"""The stepped schedulers set PyTorch's values, float for float, alone, stacked, in sequences and in chains."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_cases import (
    CASES,
    EPOCHS,
    RATES,
    WITHOUT_METRIC,
    build,
    build_torch,
    chain,
    collect,
    every_case,
    follow,
    groups_of,
    make,
    outcome,
    rates_of,
    sequence,
)

import optimjax as optim


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
    """The other way round, too, because the state dicts are equal."""
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
def test_a_plateau_in_a_chain_is_one_alongside_the_others(cases: Any, torch: Any) -> None:
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
