"""LBFGS refuses bad inputs, and ends a step with the best point where a loss is not finite."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lbfgs_problems import WOLFE, Problem, our_run, state_of, torch_run

import optimjax as optim
from optimjax import functional as F


class CallableTree(dict):
    """A tree of gradients that can be called, as an Equinox module is."""

    def __call__(self) -> None:
        raise AssertionError


jax.tree_util.register_pytree_node(
    CallableTree,
    lambda tree: (list(tree.values()), tuple(tree)),
    lambda keys, v: CallableTree(zip(keys, v, strict=True)),
)


# --- Bad inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda **options: optim.LBFGS([jnp.ones(2)], **options), F.lbfgs], ids=["class", "F"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "^Invalid learning rate: -1$"),
        ({"lr": math.nan}, ValueError, "^Invalid learning rate: nan$"),
        ({"lr": jnp.ones(2)}, ValueError, "^Tensor lr must be 1-element"),
        ({"lr": "fast"}, TypeError, "^lr must be a number"),
        ({"max_iter": "many"}, TypeError, "^max_iter must be a number"),
        ({"max_eval": "many"}, TypeError, "^max_eval must be a number"),
        ({"tolerance_grad": None}, TypeError, "^tolerance_grad must be a number"),
        ({"line_search_fn": "armijo"}, RuntimeError, "^only 'strong_wolfe' is supported, got 'armijo'$"),
        ({"line_search_fn": jnp.ones(1)}, TypeError, "^line_search_fn decides what is compiled"),
        ({"history_size": 0}, ValueError, "^Invalid history_size: 0$"),
        ({"history_size": 2.0}, ValueError, r"^Invalid history_size: 2\.0$"),
        ({"history_size": jnp.array(3)}, TypeError, "^history_size decides what is compiled"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bad_options(make: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_values_for_parts_of_the_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^lr must be a number"):
        F.lbfgs(lr={"a": 1.0, "b": 2.0})
    with pytest.raises(TypeError, match=r"schedules belong to optim\.functional"):
        optim.LBFGS([jnp.ones(2)], lr=lambda count: 1.0)


def test_one_group_only(torch: Any) -> None:
    message = r"^LBFGS doesn't support per-parameter options \(parameter groups\)$"
    with pytest.raises(ValueError, match=message):
        torch.optim.LBFGS([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}])
    with pytest.raises(ValueError, match=message):
        optim.LBFGS([{"params": [jnp.ones(1)]}, {"params": [jnp.ones(1)]}])
    optimizer = optim.LBFGS([{"params": [jnp.ones(1)], "lr": 0.5}])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [jnp.ones(2)]})
    assert len(optimizer.param_groups) == 1
    optimizer.step(lambda params: (params[0][0] ** 2).sum())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_only_a_loss_function_will_do() -> None:
    params = CallableTree(x=jnp.array([-1.2, 1.0]))
    optimizer = optim.LBFGS(params)
    for arguments in ({"closure": lambda: 0.0}, {"loss_fn": lambda: 0.0}):
        with pytest.raises(TypeError, match=r"<lambda>\(\) must not call backward.*def <lambda>\(model, x, y\)"):
            optimizer.step(**arguments)
    for given in ((), (None,), ({"x": jnp.ones(2)},), (jnp.ones(2),), (CallableTree(x=jnp.ones(2)),)):
        with pytest.raises(TypeError, match=r"step\(loss_fn, \*args\), neither step\(\) nor step\(grads\)"):
            optimizer.step(*given)
    assert optimizer.state_dict()["state"] == {}
    np.testing.assert_array_equal(optimizer.params["x"], params["x"])


def test_groups_edited_to_nonsense_raise_at_the_step_and_change_nothing() -> None:
    optimizer = optim.LBFGS([jnp.ones(2)])
    for edit, error in (
        ({"line_search_fn": "armijo"}, RuntimeError),
        ({"line_search_fn": None, "history_size": -1}, ValueError),
        ({"history_size": 3, "lr": "fast"}, ValueError),
    ):
        optimizer.param_groups[0].update(edit)
        with pytest.raises(error):
            optimizer.step(lambda params: (params[0] ** 2).sum())
        assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 1
    with pytest.raises(TypeError, match="scalar"):
        optimizer.step(lambda params: params[0])
    assert not optimizer.state
    optimizer.step(lambda params: (params[0] ** 2).sum())
    assert np.abs(optimizer.params[0]).max() < 1e-3


# --- Losses that are not finite -------------------------------------------------------------------------------------


def beside_a_cliff(params: Any, beyond: Any) -> Any:
    """Falls towards 0.1; beyond 0.05 it is not finite any more."""
    x = params[0][0]
    return jnp.where(x > 0.05, (x - 0.1) ** 2 * (1 + x), beyond)


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
def test_a_search_that_meets_no_number_ends_with_its_best_point(beyond: float) -> None:
    for start in (0.2, 1.0, 3.0, 50.0):
        optimizer = optim.LBFGS([jnp.array([start])], lr=30.0, **WOLFE)
        before = beside_a_cliff(optimizer.params, beyond)
        for _ in range(3):
            optimizer.step(beside_a_cliff, beyond)
            after = beside_a_cliff(optimizer.params, beyond)
            assert np.isfinite(optimizer.params[0]).all()
            assert after <= before
            before = after
        leaves = jax.tree.leaves(optimizer.state_dict()["state"])
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert state_of(optimizer)["func_evals"] <= 75


@pytest.mark.usefixtures("x64")
def test_pytorch_loses_its_parameters_there(torch: Any) -> None:
    setting, options = Problem(lambda lib, x: (x - lib.log(x)).sum(), np.array([3.0])), {"lr": 30.0, **WOLFE}
    assert not torch_run(torch, setting, options, 1).params[0] > 0  # the logarithm is not a number
    assert our_run(setting, options, 1).params[0].tolist() == [3.0]


def test_the_best_point_so_far_is_kept() -> None:
    """The first trial is good, the second, ten times as far, is not a number."""
    evaluated = []

    def loss_fn(params: Any) -> Any:
        x = params[0][0]
        jax.debug.callback(lambda x: evaluated.append(float(x)), x, ordered=True)
        return jnp.where(x < 3, -x, math.nan)

    optimizer = optim.LBFGS([jnp.array([0.0])], max_iter=1, max_eval=20, **WOLFE)
    optimizer.step(loss_fn)
    jax.effects_barrier()
    assert evaluated == [0.0, 1.0, 10.0]
    assert optimizer.params[0].tolist() == [1.0]
    assert state_of(optimizer)["t"] == 1.0
    assert state_of(optimizer)["func_evals"] == 3


def test_zooming_that_meets_no_number_keeps_the_low_end() -> None:
    """The minimum of the cubic lies in a gap of the loss."""

    def loss_fn(params: Any) -> Any:
        x = params[0][0]
        return jnp.where((x > 0.2) & (x < 0.9), math.nan, (x - 0.5) ** 2 + jnp.where(x > 0.9, 0.1, 0.0))

    optimizer = optim.LBFGS([jnp.array([0.0])], max_iter=1, max_eval=20, **WOLFE)
    optimizer.step(loss_fn)
    assert optimizer.params[0].tolist() == [0.0]
    assert state_of(optimizer)["func_evals"] == 3


def test_a_start_that_is_no_number_is_kept_and_can_be_left() -> None:
    optimizer = optim.LBFGS([jnp.array([1.0, 2.0])], **WOLFE)
    loss_fn = lambda params, scale: (params[0] ** 2).sum() * scale  # noqa: E731
    for scale in (1.0, math.nan, math.inf):
        before = optimizer.params[0]
        evaluations = state_of(optimizer).get("func_evals", 0)
        assert not optimizer.step(loss_fn, scale) < math.inf or scale == 1
        if scale != 1:
            np.testing.assert_array_equal(optimizer.params[0], before)
            assert state_of(optimizer)["func_evals"] == evaluations + 2
        optimizer.param_groups[0]["params"][0].value = jnp.array([1.0, 2.0])
    optimizer.step(loss_fn, 1.0)
    assert np.abs(optimizer.params[0]).max() < 1e-3


def test_without_a_line_search_it_goes_where_pytorch_goes(torch: Any) -> None:
    setting = Problem(lambda lib, x: lib.log(x).sum(), np.array([0.5]))
    ours, theirs = our_run(setting, {"max_iter": 4}, 2), torch_run(torch, setting, {"max_iter": 4}, 2)
    assert np.isnan(ours.params[-1]).all()
    assert np.isnan(theirs.params[-1]).all()
    assert ours.counts == theirs.counts
