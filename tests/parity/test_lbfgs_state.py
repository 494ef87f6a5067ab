"""State dicts of LBFGS have PyTorch's layout, resume exactly, can be edited, and change nothing if they do not fit."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lbfgs_problems import WOLFE, problem, rosenbrock_of_x, state_of, torch_optimizer, torch_run, torch_step

import optimjax as optim


def to_torch(torch: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)) if isinstance(x, jax.Array) else x, tree)


RESUMED = [
    pytest.param({**WOLFE, "max_iter": 4}, id="wolfe"),
    pytest.param({**WOLFE, "max_iter": 4, "history_size": 3}, id="wolfe-full-history"),
    pytest.param({"lr": 1e-3, "max_iter": 4, "history_size": 5}, id="fixed"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", RESUMED)
def test_layout_is_pytorchs(torch: Any, options: dict[str, Any]) -> None:
    setting = problem("rosenbrock20")
    ours = optim.LBFGS([optim.Parameter(setting.start)], **options)
    theirs = torch_optimizer(torch, setting.start, options)
    assert ours.state_dict() == theirs.state_dict()
    for _ in range(3):
        ours.step(setting.ours)
        torch_step(torch, theirs, setting)
        saved, expected = ours.state_dict(), theirs.state_dict()
        assert saved["param_groups"] == expected["param_groups"]
        assert list(saved["state"]) == [0]
        entries, wanted = saved["state"][0], expected["state"][0]
        wanted.pop("al", None)
        assert list(entries) == list(wanted)
        for name, value in wanted.items():
            assert isinstance(entries[name], list) == isinstance(value, list), name
            np.testing.assert_allclose(
                np.array(jax.tree.leaves(entries[name])), np.array(jax.tree.leaves(value)), rtol=1e-9, err_msg=name
            )
    leaves = jax.tree.leaves(saved)
    assert all(isinstance(leaf, (jax.Array, int, float, str)) for leaf in leaves)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", RESUMED)
def test_continues_what_pytorch_began_and_the_other_way_round(torch: Any, options: dict[str, Any]) -> None:
    setting = problem("rosenbrock20")
    whole = torch_run(torch, setting, options, 6)

    theirs = torch_optimizer(torch, setting.start, options)
    for _ in range(3):
        torch_step(torch, theirs, setting)
    (tensor,) = theirs.param_groups[0]["params"]
    ours = optim.LBFGS([jnp.asarray(tensor.detach().numpy())], **options)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        ours.step(setting.ours)
    np.testing.assert_allclose(ours.params[0], whole.params[-1], rtol=1e-9)
    assert (state_of(ours)["func_evals"], state_of(ours)["n_iter"]) == whole.counts[-1]

    ours = optim.LBFGS([jnp.asarray(setting.start)], **options)
    for _ in range(3):
        ours.step(setting.ours)
    theirs = torch_optimizer(torch, np.array(ours.params[0]), options)
    theirs.load_state_dict(to_torch(torch, ours.state_dict()))
    for _ in range(3):
        torch_step(torch, theirs, setting)
    (tensor,) = theirs.param_groups[0]["params"]
    np.testing.assert_allclose(tensor.detach().numpy(), whole.params[-1], rtol=1e-9)
    assert theirs.state[tensor]["func_evals"] == whole.counts[-1][0]


@pytest.mark.parametrize("options", RESUMED)
@pytest.mark.parametrize("through", [lambda x: x, lambda x: pickle.loads(pickle.dumps(x))], ids=["", "pickle"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resuming_is_exact(options: dict[str, Any], through: Any, stop: int) -> None:
    setting = problem("rosenbrock20")

    def run(optimizer: Any, steps: int) -> Any:
        for _ in range(steps):
            optimizer.step(setting.ours)
        return optimizer

    whole = run(optim.LBFGS([jnp.asarray(setting.start)], **options), 7)
    first = run(optim.LBFGS([jnp.asarray(setting.start)], **options), stop)
    saved = through(first.state_dict())
    second = optim.LBFGS(first.params)
    second.load_state_dict(saved)
    run(first, 7 - stop)  # a snapshot does not change with later steps
    run(second, 7 - stop)
    np.testing.assert_array_equal(second.params[0], whole.params[0])
    np.testing.assert_array_equal(first.params[0], whole.params[0])
    for a, b in zip(jax.tree.leaves(second.state_dict()), jax.tree.leaves(whole.state_dict()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_once_read_stay_valid() -> None:
    setting = problem("rosenbrock2")
    optimizer = optim.LBFGS([jnp.asarray(setting.start)], **WOLFE, max_iter=3)
    optimizer.step(setting.ours)
    state = state_of(optimizer)
    held = {name: state[name] for name in ("d", "prev_flat_grad", "H_diag")}, *state["old_dirs"], *state["ro"]
    before, iterations = jax.tree.map(np.array, held), state["n_iter"]
    optimizer.step(setting.ours)
    for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state_of(optimizer) is state  # the same mapping, with what is new
    assert state["n_iter"] > iterations


def test_state_can_be_edited() -> None:
    setting = problem("rosenbrock2")
    optimizer = optim.LBFGS([jnp.asarray(setting.start)], lr=1e-3, max_iter=3)
    optimizer.step(setting.ours)
    fresh = optim.LBFGS(optimizer.params, lr=1e-3, max_iter=3)
    state_of(optimizer)["n_iter"] = 0  # as in PyTorch: begin again
    state_of(optimizer)["note"] = "mine"
    optimizer.step(setting.ours)
    fresh.step(setting.ours)
    np.testing.assert_array_equal(optimizer.params[0], fresh.params[0])
    assert len(state_of(optimizer)["old_dirs"]) == len(state_of(fresh)["old_dirs"])
    assert state_of(optimizer)["note"] == "mine"


def test_another_history_size_keeps_the_newest_pairs() -> None:
    setting = problem("rosenbrock20")
    optimizer = optim.LBFGS([jnp.asarray(setting.start)], **WOLFE, history_size=6)
    optimizer.step(setting.ours)
    before = state_of(optimizer)["old_stps"]
    assert len(before) == 6
    optimizer.param_groups[0].update(history_size=2, max_iter=1)
    optimizer.step(setting.ours)
    after = state_of(optimizer)["old_stps"]
    assert len(after) == 2
    np.testing.assert_array_equal(after[0], before[-1])
    optimizer.param_groups[0].update(history_size=4, max_iter=5)
    optimizer.step(setting.ours)
    assert len(state_of(optimizer)["old_stps"]) == 4
    assert np.isfinite(optimizer.params[0]).all()


def misfits(entries: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "unknown": ({**entries, "exp_avg": jnp.ones(2)}, "has 'exp_avg', which LBFGS does not keep"),
        "absent": ({k: v for k, v in entries.items() if k not in ("ro", "t")}, r"lacks \['t', 'ro'\]"),
        "shape": ({**entries, "d": jnp.ones(3)}, r"'d' has shape \(3,\), expected \(2,\)"),
        "row": ({**entries, "old_dirs": [jnp.ones(3), *entries["old_dirs"][1:]]}, r"'old_dirs' has shape \(3,\)"),
        "no list": ({**entries, "ro": jnp.ones(3)}, "'ro' must be a list of arrays"),
        "lengths": ({**entries, "ro": entries["ro"][1:]}, "must be of one length"),
    }


@pytest.mark.parametrize("kind", ["unknown", "absent", "shape", "row", "no list", "lengths"])
def test_a_state_that_does_not_fit_changes_nothing(kind: str) -> None:
    setting = problem("rosenbrock2")
    optimizer = optim.LBFGS([jnp.asarray(setting.start)], **WOLFE)
    optimizer.step(setting.ours)
    saved = optimizer.state_dict()
    bad, message = misfits(saved["state"][0])[kind]
    other = optim.LBFGS([jnp.asarray(setting.start)], lr=0.5)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict({**saved, "state": {0: bad}})
    assert other.state_dict()["state"] == {}
    assert other.param_groups[0]["lr"] == 0.5


def test_the_order_of_parameters_must_be_the_saved_one() -> None:
    def build(names: str) -> Any:
        return optim.LBFGS([(name, optim.Parameter(jnp.ones(ord(name) - 96))) for name in names], **WOLFE)

    first = build("abc")
    first.step(lambda params: sum((p**2).sum() for p in params.values()))
    with pytest.raises(ValueError, match="whose order must be that of the loaded state dict"):
        build("acb").load_state_dict(first.state_dict())
    build("abc").load_state_dict(first.state_dict())
    saved = first.state_dict()
    with pytest.raises(ValueError, match="keeps the state of all parameters with the first one"):
        build("abc").load_state_dict({**saved, "state": {1: saved["state"][0]}})


def test_optimizers_copy_and_pickle() -> None:
    optimizer = optim.LBFGS({"x": jnp.array([-1.2, 1.0])}, **WOLFE, max_iter=3)
    optimizer.step(rosenbrock_of_x)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), optimizer]
    for one in copies:
        one.step(rosenbrock_of_x)
    for one in copies:
        np.testing.assert_array_equal(one.params["x"], optimizer.params["x"])
