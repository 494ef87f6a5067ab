"""A run with schedulers resumes bit for bit from state dicts, in whatever order they are built and loaded."""

import contextlib
import copy
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import (
    CASES,
    OPTIONS,
    ORDERS,
    RATES,
    SINGLE,
    THROUGH,
    Decay,
    build,
    build_torch,
    chain,
    every_case,
    follow,
    groups_of,
    make,
    rates_of,
    sequence,
    warm_up,
)

import optimjax as optim

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
