"""Schedulers: PyTorch's values float for float, resuming in any order, warnings, groups added later."""

import contextlib
import copy
import functools
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

import optimjax as optim

EPOCHS = 200
RATES = (0.1, 0.037, 1e-3)


def warm_up(epoch: int) -> float:
    return (epoch + 1) / 7 if epoch < 7 else 0.97 ** (epoch // 3)


CASES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "lambda": lambda m: functools.partial(m.LambdaLR, lr_lambda=warm_up),
    "lambda of numpy numbers": lambda m: functools.partial(m.LambdaLR, lr_lambda=lambda e: np.float64(0.97) ** e),
    "step": lambda m: functools.partial(m.StepLR, step_size=7),
    "step gamma": lambda m: functools.partial(m.StepLR, step_size=1, gamma=0.993),
    "multi-step": lambda m: functools.partial(m.MultiStepLR, milestones=[3, 50, 50, 120], gamma=0.3),
    "multi-step generator": lambda m: functools.partial(m.MultiStepLR, milestones=(m for m in (2, 5, 9))),
    "exponential": lambda m: functools.partial(m.ExponentialLR, gamma=0.977),
    "cosine": lambda m: functools.partial(m.CosineAnnealingLR, T_max=30),
    "cosine eta_min": lambda m: functools.partial(m.CosineAnnealingLR, T_max=17, eta_min=2e-3),
    "cosine once": lambda m: functools.partial(m.CosineAnnealingLR, T_max=EPOCHS),
    "cosine of one epoch": lambda m: functools.partial(m.CosineAnnealingLR, T_max=1),
}


def build(rates: Sequence[Any] = RATES) -> Any:
    return optim.SGD([{"params": [jnp.ones(())], "lr": rate} for rate in rates], lr=0.5, momentum=0.9)


def build_torch(torch: Any, rates: Sequence[Any] = RATES) -> Any:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(()))], "lr": rate} for rate in rates], lr=0.5)


def rates_of(optimizer: Any) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def follow(optimizer: Any, schedulers: Any, epochs: int) -> list[list[Any]]:
    """The rates of each epoch, the optimizer stepped without gradients."""
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    trace = []
    for _ in range(epochs):
        trace.append(rates_of(optimizer))
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return trace


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_are_pytorchs(case: Any, torch: Any) -> None:
    ours, theirs = build(), build_torch(torch)
    our, their = case(optim.lr_scheduler)(ours), case(torch.optim.lr_scheduler)(theirs)
    assert follow(ours, our, EPOCHS) == follow(theirs, their, EPOCHS)
    assert our.get_last_lr() == their.get_last_lr() == rates_of(ours)
    assert [group["initial_lr"] for group in ours.param_groups] == list(RATES)
    assert our.last_epoch == EPOCHS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_state_dict_is_pytorchs(case: Any, torch: Any) -> None:
    ours, theirs = build(), build_torch(torch)
    our, their = case(optim.lr_scheduler)(ours), case(torch.optim.lr_scheduler)(theirs)
    follow(ours, our, 5)
    follow(theirs, their, 5)
    assert our.state_dict() == their.state_dict()


def test_a_list_of_lambdas_one_for_each_group(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = module.LambdaLR(optimizer, [lambda e: 0.95**e, lambda e: 1 / (1 + e), warm_up])
        return follow(optimizer, scheduler, EPOCHS)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


def test_schedulers_may_be_stacked(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        return follow(optimizer, [module.ExponentialLR(optimizer, 0.99), module.StepLR(optimizer, 9, 0.5)], EPOCHS)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hand_edits_carry_on(case: Any, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = case(module)(optimizer)
        trace = follow(optimizer, scheduler, 4)
        optimizer.param_groups[1]["lr"] = 0.5
        return trace + follow(optimizer, scheduler, 60)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@pytest.mark.parametrize("last_epoch", [0, 1, 6, 29, 31])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_resuming_by_last_epoch(case: Any, last_epoch: int, torch: Any) -> None:
    """As in PyTorch, where the groups carry `initial_lr` and the present rate."""

    def run(module: Any, optimizer: Any) -> Any:
        for group in optimizer.param_groups:
            group["initial_lr"], group["lr"] = group["lr"], group["lr"] * 0.9
        return follow(optimizer, case(module)(optimizer, last_epoch=last_epoch), 70)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_jumping_to_an_epoch_is_deprecated_and_pytorchs(case: Any, torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        scheduler = case(module)(optimizer)
        optimizer.step()
        trace = []
        for epoch in (5, 2, 40, 0):
            with pytest.warns(UserWarning, match=r"epoch parameter in `scheduler.step\(\)`"):
                scheduler.step(epoch)
            trace.append((scheduler.last_epoch, rates_of(optimizer), scheduler.get_last_lr()))
            scheduler.step()
            trace.append((scheduler.last_epoch, rates_of(optimizer), scheduler.get_last_lr()))
        return trace

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


def test_a_scheduler_of_ones_own_needs_only_get_lr(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> Any:
        class Inverse(module.LRScheduler):
            def get_lr(self) -> list[float]:
                return [base / (1 + self.last_epoch) for base in self.base_lrs]

        return follow(optimizer, Inverse(optimizer), 20)

    assert run(optim.lr_scheduler, build()) == run(torch.optim.lr_scheduler, build_torch(torch))


def test_get_last_lr_is_what_the_last_step_set() -> None:
    optimizer = build()
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert scheduler.get_last_lr() == list(RATES)
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 9.0
    assert scheduler.get_last_lr() == [rate * 0.5 for rate in RATES]


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


ORDERS = [
    load_after_building,
    load_schedulers_first,
    load_before_building,
    load_before_building_last_scheduler_first,
]
THROUGH = [
    lambda saved: saved,
    lambda saved: pickle.loads(pickle.dumps(saved)),
    lambda saved: json.loads(json.dumps(saved)),
]
RESUMED: dict[str, Any] = {name: [case] for name, case in CASES.items() if "generator" not in name}
RESUMED["stacked"] = [CASES["lambda"], CASES["exponential"]]
RESUMED["stacked cosine"] = [CASES["cosine"], CASES["step gamma"]]


@pytest.mark.parametrize("schedulers", RESUMED.values(), ids=RESUMED)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    stops=st.lists(st.integers(0, 25), min_size=1, max_size=2),
    order=st.sampled_from(ORDERS),
    through=st.sampled_from(THROUGH),
    same_rate=st.booleans(),
    edit=st.sampled_from([None, 0.2, RATES[0]]),
)
def test_resuming_is_bit_for_bit(
    schedulers: Any, stops: list[int], order: Any, through: Any, same_rate: bool, edit: float | None
) -> None:
    """Stopped at any epochs, perhaps after an edit by hand, and loaded in any order."""
    schedulers = [scheduler(optim.lr_scheduler) for scheduler in schedulers]

    def segments(resume: bool) -> Any:
        optimizer = build()
        built = [scheduler(optimizer) for scheduler in schedulers]
        trace = []
        for stop in stops:
            trace += follow(optimizer, built, stop)
            if edit is not None:
                optimizer.param_groups[0]["lr"] = edit
            if resume:
                saved = through([optimizer.state_dict(), [scheduler.state_dict() for scheduler in built]])
                saved[0]["state"] = {}
                optimizer = build(RATES if same_rate else (0.7, 0.7, 0.7))
                built = order(optimizer, schedulers, saved)
        trace += follow(optimizer, built, 30)
        return trace, [scheduler.get_last_lr() for scheduler in built]

    assert segments(resume=True) == segments(resume=False)


def test_a_run_with_a_model_resumes_bit_for_bit() -> None:
    """Parameters too: the rate enters the arithmetic."""

    def build_run(value: Any) -> Any:
        optimizer = optim.Adam({"w": value}, lr=0.1)
        return optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def train(optimizer: Any, scheduler: Any, epochs: int) -> None:
        for _ in range(epochs):
            optimizer.step(lambda params: jnp.sum(params["w"] ** 4))
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


def test_a_state_dict_is_a_snapshot() -> None:
    optimizer = build()
    scheduler = optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    follow(optimizer, scheduler, 1)
    saved = scheduler.state_dict()
    before = copy.deepcopy(saved)
    follow(optimizer, scheduler, 5)
    optimizer.add_param_group({"params": [jnp.ones(())]})
    follow(optimizer, scheduler, 1)
    assert saved == before


def test_loading_leaves_the_state_dict_alone() -> None:
    optimizer = build()
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    follow(optimizer, scheduler, 3)
    saved = scheduler.state_dict()
    before = copy.deepcopy(saved)
    other = build()
    loaded = optim.lr_scheduler.LambdaLR(other, warm_up)
    loaded.load_state_dict(saved)
    follow(other, loaded, 3)
    assert saved == before


class Decay:
    """A callable object: PyTorch saves its attributes."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, epoch: int) -> float:
        return self.factor**epoch


def test_callable_objects_are_saved_with_their_attributes(torch: Any) -> None:
    def run(module: Any, optimizer: Any, other: Any) -> Any:
        scheduler = module.LambdaLR(optimizer, [Decay(0.9), warm_up, Decay(0.5)])
        follow(optimizer, scheduler, 3)
        saved = scheduler.state_dict()
        loaded = module.LambdaLR(other, [Decay(0.1), warm_up, Decay(0.1)])
        loaded.load_state_dict(saved)
        return saved["lr_lambdas"], follow(other, loaded, 4)[1:]

    ours = run(optim.lr_scheduler, build(), build())
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch), build_torch(torch))
    assert ours[0] == [{"factor": 0.9}, None, {"factor": 0.5}]


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


def test_get_lr_outside_of_step_warns(torch: Any) -> None:
    def run(module: Any, optimizer: Any) -> list[Any]:
        schedulers = [
            module.StepLR(optimizer, 2),
            module.ExponentialLR(optimizer, 0.9),
            module.CosineAnnealingLR(optimizer, 9),
            module.LambdaLR(optimizer, warm_up),
            module.MultiStepLR(optimizer, [1]),
        ]
        return [collect(scheduler.get_lr) for scheduler in schedulers]

    ours = run(optim.lr_scheduler, build())
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch))
    assert all(ours)


ERRORS = {
    "too few lambdas": lambda m, o: m.LambdaLR(o, [warm_up]),
    "too many lambdas": lambda m, o: m.LambdaLR(o, [warm_up] * 4),
    "no initial_lr": lambda m, o: m.StepLR(o, 3, last_epoch=4),
    "abstract": lambda m, o: m.LRScheduler(o),
    "not an optimizer": lambda m, o: m.StepLR("sgd", 3),
    "the groups": lambda m, o: m.ExponentialLR(o.param_groups, 0.9),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors_are_pytorchs(call: Any, torch: Any) -> None:
    def error(module: Any, optimizer: Any) -> tuple[type, str]:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call(module, optimizer)
        return caught.type, str(caught.value)[:35]

    optimizer = build()
    ours, theirs = error(optim.lr_scheduler, optimizer), error(torch.optim.lr_scheduler, build_torch(torch))
    assert ours[0] is theirs[0]
    assert ours[1] == theirs[1] or ours[0] is NotImplementedError
    assert rates_of(optimizer) == list(RATES)


@pytest.mark.parametrize("name", sorted(ERRORS.keys() - {"abstract"}))  # which is noticed when the first step is taken
def test_an_error_leaves_the_optimizer_as_it_was(name: str) -> None:
    optimizer, call = build(), ERRORS[name]
    before = copy.deepcopy(optimizer.state_dict())
    with contextlib.suppress(Exception):
        call(optim.lr_scheduler, optimizer)
    assert optimizer.state_dict() == before


# --- Arrays, compilation, groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_rate_in_an_array_stays_an_array_of_its_dtype(case: Any, dtype: Any) -> None:
    optimizer, plain = build([jnp.asarray(rate, dtype) for rate in RATES]), build()
    scheduler, reference = case(optim.lr_scheduler)(optimizer), case(optim.lr_scheduler)(plain)
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 0.2}[dtype]
    for ours, wanted in zip(follow(optimizer, scheduler, 12), follow(plain, reference, 12), strict=True):
        assert all(isinstance(rate, jax.Array) and rate.dtype == dtype and rate.shape == () for rate in ours)
        np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=tolerance, atol=1e-9)
    assert all(isinstance(rate, jax.Array) and rate.dtype == dtype for rate in scheduler.get_last_lr())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scheduling_never_recompiles_the_step(case: Any, compilations: Any) -> None:
    optimizer = optim.Adam([jnp.ones(3)], lr=0.1)
    scheduler = case(optim.lr_scheduler)(optimizer)

    def epoch() -> None:
        optimizer.step([jnp.ones(3)])
        optimizer.step(lambda_loss)
        scheduler.step()

    for _ in range(2):
        epoch()
    before = compilations()
    for _ in range(20):
        epoch()
    assert compilations() == before


def lambda_loss(params: Any) -> Any:
    return jnp.sum(params[0] ** 2)


@pytest.mark.parametrize("name", ["step", "step gamma", "multi-step", "exponential"])
def test_a_group_added_mid_run_is_scheduled_as_in_pytorch(name: str, torch: Any) -> None:
    def run(module: Any, optimizer: Any, params: Any) -> Any:
        scheduler = CASES[name](module)(optimizer)
        follow(optimizer, scheduler, 10)
        optimizer.add_param_group({"params": params, "lr": 0.25})
        return follow(optimizer, scheduler, 60)

    ours = run(optim.lr_scheduler, build(), [jnp.ones(())])
    assert ours == run(torch.optim.lr_scheduler, build_torch(torch), [torch.nn.Parameter(torch.ones(()))])


@pytest.mark.parametrize("name", ["lambda", "cosine eta_min", "cosine"])
def test_a_group_added_mid_run_is_scheduled_where_pytorch_raises(name: str) -> None:
    optimizer, untouched = build(), build()
    scheduler = CASES[name](optim.lr_scheduler)(optimizer)
    reference = CASES[name](optim.lr_scheduler)(untouched)
    follow(optimizer, scheduler, 10)
    follow(untouched, reference, 10)
    optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
    trace = follow(optimizer, scheduler, 70)
    assert [rates[:3] for rates in trace] == follow(untouched, reference, 70)
    assert trace[0][3] == optimizer.param_groups[3]["initial_lr"] == 0.25
    added = [rates[3] for rates in trace[1:]]
    if name == "lambda":
        assert added == [0.25 * warm_up(epoch) for epoch in range(11, 80)]
    else:
        assert len(set(added)) > 20


def test_a_group_added_beside_a_list_of_lambdas() -> None:
    """There is no function for it: the error says how to give one, and no epoch is lost."""
    optimizer = build()
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, [Decay(0.9), Decay(0.8), Decay(0.7)])
    follow(optimizer, scheduler, 2)
    optimizer.add_param_group({"params": [jnp.ones(())], "lr": 1.0})
    before = rates_of(optimizer)
    with pytest.raises(ValueError, match=r"append its value to scheduler\.lr_lambdas"):
        scheduler.step()
    assert rates_of(optimizer) == before
    assert scheduler.last_epoch == 2
    scheduler.lr_lambdas.append(Decay(0.6))
    scheduler.step()
    assert scheduler.last_epoch == 3
    assert rates_of(optimizer) == [
        rate * factor**3 for rate, factor in zip((*RATES, 1.0), (0.9, 0.8, 0.7, 0.6), strict=True)
    ]


def test_a_run_with_an_added_group_resumes() -> None:
    def start() -> Any:
        optimizer = build()
        scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        follow(optimizer, scheduler, 5)
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        follow(optimizer, scheduler, 5)
        return optimizer, scheduler

    optimizer, scheduler = start()
    for order in ORDERS:
        other = build((*RATES, 0.25))
        saved = [optimizer.state_dict(), [scheduler.state_dict()]]
        built = order(other, [functools.partial(optim.lr_scheduler.CosineAnnealingLR, T_max=20)], saved)
        assert follow(other, built, 30) == follow(*start(), 30)


def test_optimizer_and_scheduler_copied_together_stay_together() -> None:
    optimizer = build()
    scheduler = optim.lr_scheduler.StepLR(optimizer, 3)
    follow(optimizer, scheduler, 2)
    other, twin = copy.deepcopy((optimizer, scheduler))
    assert twin.optimizer is other
    expected = follow(optimizer, scheduler, 9)
    assert follow(other, twin, 9) == expected
