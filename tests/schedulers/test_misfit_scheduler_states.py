"""A state dict that does not fit a scheduler raises an error that names the entry, and changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from interrupts import interrupted_everywhere
from scheduler_cases import RATES, Decay, Warm, build, contents, every_case, follow, make, rates_of, takes_metric

import optimjax as optim
from optimjax.lr_scheduler import base as base_module


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
