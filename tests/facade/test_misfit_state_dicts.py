"""A state dict that does not fit changes nothing; of a changed model, the part that fits can be loaded."""

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from saved_runs import (
    assert_equal,
    boxes_of,
    build,
    momentum,
    named,
    plain,
    run,
    run_adam,
    step_by_name,
    stepped,
    values,
)

import optimjax as optim

# --- Misfits --------------------------------------------------------------------------------------------------------


def edit(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A misfit made by editing a state dict."""

    def edited(saved: Any) -> Any:
        change(saved)
        return saved

    return edited


MISFITS = {
    "no state": (lambda s: {"param_groups": s["param_groups"]}, r"'state' and 'param_groups', got \['param_groups'\]"),
    "no groups": (lambda s: {"state": s["state"]}, r"got \['state'\]"),
    "a checkpoint around it": (lambda s: {"optimizer": s}, r"got \['optimizer'\]"),
    "empty": (lambda s: {}, r"got \[\]"),
    "a list": (lambda s: [s], "list"),
    "nothing": (lambda s: None, "None"),
    "fewer groups": (
        edit(lambda s: s["param_groups"].pop()),
        "different number of parameter groups: 1, the optimizer has 2",
    ),
    "more groups": (edit(lambda s: s["param_groups"].append(s["param_groups"][0])), "parameter groups: 3"),
    "fewer parameters": (edit(lambda s: s["param_groups"][0]["params"].pop()), "match the size of optimizer's group"),
    "more parameters": (
        edit(lambda s: s["param_groups"][1]["params"].append(3)),
        "match the size of optimizer's group",
    ),
    "a group without params": (edit(lambda s: s["param_groups"][1].pop("params")), "params"),
    "unknown id": (edit(lambda s: s["state"].update({7: s["state"][0]})), r"none of its groups: \[7\]"),
    "a shape": (
        edit(lambda s: s["state"][2].update(exp_avg=np.ones(3))),
        r"'exp_avg' has shape \(3,\), expected \(3, 2\)",
    ),
    "a transposed shape": (edit(lambda s: s["state"][0].update(exp_avg=np.ones((2, 3)))), r"has shape \(2, 3\)"),
    "an unknown slot": (
        edit(lambda s: s["state"][2].update(momentum_buffer=np.ones((3, 2)))),
        "'momentum_buffer', which Adam",
    ),
    "a missing slot": (edit(lambda s: s["state"][2].pop("exp_avg_sq")), r"lacks \['exp_avg_sq'\]"),
    "a slot of a flag": (edit(lambda s: s["state"][2].pop("max_exp_avg_sq")), r"lacks \['max_exp_avg_sq'\]"),
    "a missing step": (edit(lambda s: s["state"][2].pop("step")), r"lacks \['step'\]"),
    "only a step": (edit(lambda s: s["state"].update({2: {"step": 3}})), "lacks"),
    "an illegal value": (edit(lambda s: s["param_groups"][1].update(lr="fast")), r"lr of param_groups\[1\] is 'fast'"),
    "a slot that is not an array": (edit(lambda s: s["state"][2].update(exp_avg="mean")), "exp_avg"),
    "a step that is not a number": (edit(lambda s: s["state"][2].update(step=np.ones(2))), "step"),
    "a step in between": (edit(lambda s: s["state"][2].update(step=1.5)), "'step' is 1.5, which is not a whole number"),
    "a step below zero": (edit(lambda s: s["state"][2].update(step=-3)), "'step' is -3, which is not a whole number"),
    "an infinite step": (
        edit(lambda s: s["state"][2].update(step=np.inf)),
        "'step' is inf, which is not a whole number",
    ),
    "a step in text": (edit(lambda s: s["state"][2].update(step="3")), "'step' is '3', which is not a whole number"),
    "a ragged slot": (edit(lambda s: s["state"][2].update(exp_avg=[[1.0], [2.0, 3.0]])), "'exp_avg' is .* loaded"),
    "an unknown id in text": (edit(lambda s: s["state"].update({"7": {}})), r"none of its groups: \['7'\]"),
    "an id twice": (edit(lambda s: s["param_groups"][0].update(params=[0, 0])), "more than once in its groups: 0"),
    "an id in two groups": (edit(lambda s: s["param_groups"][1].update(params=[1])), "more than once in its groups: 1"),
    "a state twice": (edit(lambda s: s["state"].update({"2": s["state"][2]})), "state of parameter 2 twice"),
    "one beta": (edit(lambda s: s["param_groups"][1].update(betas=0.9)), "0.9, .* must be a tuple of 2 numbers$"),
} | {
    f"a slot of kind {dtype.__name__}": (
        edit(lambda s, dtype=dtype: s["state"][2].update(exp_avg=np.ones((3, 2), dtype))),
        rf"'exp_avg' is .* its dtype {np.dtype(dtype)} is of another kind than float32",
    )
    for dtype in (int, bool, complex)
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_raises_and_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    saved = copy.deepcopy(run_adam(steps=3, lr=0.3).state_dict())
    misfit = change(saved)
    optimizer = run_adam()
    before = plain(optimizer.state_dict())
    twin = run_adam()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(misfit)
    assert plain(optimizer.state_dict()) == before
    assert_equal(run(optimizer, 2, 4), run(twin, 2, 4))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("base.kernel", "base.bias", "tail.kernel"), r"missing \['head.kernel'\], unexpected \['tail.kernel'\]"),
        (("base.kernel", "base.bias", "base.bias"), r"missing \['head.kernel'\]"),
        (("base.kernel", "base.bias"), "names"),
    ],
)
def test_names_that_disagree(names: Any, message: str) -> None:
    source = named((0, 1, 2))
    step_by_name(source, 0, 2)
    saved = source.state_dict()
    saved["param_groups"][0]["param_names"] = list(names)
    optimizer = named((0, 1, 2))
    before = plain(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert plain(optimizer.state_dict()) == before


# --- A changed model ------------------------------------------------------------------------------------------------


def momenta(optimizer: Any) -> list[Any]:
    states = (optimizer.state.get(box, {}) for box in boxes_of(optimizer))
    return [float(state["momentum_buffer"].ravel()[0]) if state else None for state in states]


@pytest.mark.parametrize(
    ("saved", "present", "loaded", "missing", "unexpected"),
    [
        ({"a": (2,), "b": (3,)}, {"b": (3,), "a": (2,)}, [6, 5], [], []),
        ({"a": (2,), "b": (3,)}, {"a": (2,), "new": (3,), "b": (3,)}, [5, None, 6], ["new"], []),
        ({"a": (2,), "b": (3,)}, {"b": (3,)}, [6], [], ["a"]),
        ({"a": (2,), "b": (3,)}, {"a": (2,), "b": (4,)}, [5, None], ["b"], ["b"]),
        ({"a": (2,)}, {"b": (2,)}, [None], ["b"], ["a"]),
        # A parameter that has moved to another group, and a group that has gone.
        ([{"a": (2,)}, {"b": (3,)}], {"a": (2,), "b": (3,)}, [5, 6], [], []),
        ([{"a": (2,), "b": (3,)}], [{"b": (3,)}, {"a": (2,)}], [6, 5], [], []),
        # Names that are unique only in their groups.
        ([{"w": (2,)}, {"w": (3,)}], [{"w": (2,)}, {"w": (3,)}], [5, 6], [], []),
        ([{"w": (2,)}], [{"w": (2,)}, {"w": (2,)}], [5, None], ["w"], []),
        ([{"w": (2,)}, {"w": (2,)}], [{"v": (2,)}, {"w": (2,)}], [None, 6], ["v"], ["w"]),
    ],
)
def test_partial_loading(saved: Any, present: Any, loaded: Any, missing: Any, unexpected: Any) -> None:
    optimizer = momentum(present)
    keys = optimizer.load_state_dict(stepped(momentum(saved), 5.0).state_dict(), strict=False)
    assert momenta(optimizer) == loaded
    assert keys == (missing, unexpected)
    assert (keys.missing_keys, keys.unexpected_keys) == (missing, unexpected)
    stepped(optimizer, 1.0)
    assert momenta(optimizer) == [pytest.approx(1 + i + 0.9 * (m or 0)) for i, m in enumerate(loaded)]


def test_what_has_no_match_stays_as_it_is() -> None:
    optimizer = stepped(momentum([{"a": (2,)}, {"b": (3,)}], lr=0.1), 1.0)
    optimizer.param_groups[1]["lr"] = 0.7
    assert optimizer.load_state_dict(momentum({"a": (2,)}, lr=0.5).state_dict(), strict=False) == (["b"], [])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.7]
    assert momenta(optimizer) == [None, 2]  # the saved run had done no step


def test_partial_loading_reads_as_in_pytorch(torch: Any) -> None:
    module = torch.nn.Linear(2, 3)
    theirs = [module.load_state_dict(d, strict=False) for d in (module.state_dict(), {"weight": torch.ones(3, 2)})]
    ours = []
    for names in ({"weight": (3, 2), "bias": (3,)}, {"weight": (3, 2)}):
        optimizer = momentum({"weight": (3, 2), "bias": (3,)})
        ours.append(optimizer.load_state_dict(momentum(names).state_dict(), strict=False))
    assert [repr(keys).lstrip("_") for keys in theirs] == [repr(keys) for keys in ours]


def test_partial_loading_needs_names_and_whole_entries() -> None:
    optimizer = momentum({"a": (2,), "b": (2,)})
    unnamed = optim.SGD([optim.Parameter(jnp.ones(2))], lr=0.1, momentum=0.9).state_dict()
    with pytest.raises(
        ValueError, match=r"size of optimizer's group: 1 parameters.*; strict=False needs names on both sides"
    ):
        optimizer.load_state_dict(unnamed, strict=False)
    corrupt = copy.deepcopy(stepped(momentum({"a": (2,)}), 5.0).state_dict())
    corrupt["state"][0]["momentum_buffer"] = "mean"
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(corrupt, strict=False)
    assert momenta(optimizer) == [None, None]


def test_state_of_another_algorithm() -> None:
    with pytest.raises(ValueError, match="which SGD does not keep"):
        build(CASES[0]).load_state_dict(build_and_run(CASES[1]))


def build_and_run(case: Case) -> Any:
    optimizer = build(case, 1, values(dtype=np.float32))
    run(optimizer, 0, 1)
    return optimizer.state_dict()
