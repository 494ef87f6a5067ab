"""LBFGS takes PyTorch's iterates and evaluations, searches along the same lines, and is one program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lbfgs_problems import FIXED, WOLFE, Trace, our_run, problem, state_of, torch_optimizer, torch_run, torch_step

import optimjax as optim
from optimjax.algorithms.parts.line_search import Point, strong_wolfe

# --- The same run in both libraries ---------------------------------------------------------------------------------


def distances(a: Trace, b: Trace) -> np.ndarray:
    return np.array([np.abs(x - y).max() for x, y in zip(a.params, b.params, strict=True)])


PROBLEMS = ["rosenbrock2", "rosenbrock20", "quadratic", "digits"]
OPTIONS = {
    "fixed": {},
    "fixed-short": {"max_iter": 5, "history_size": 2, "tolerance_change": 1e-5},
    "wolfe": WOLFE,
    "wolfe-short": {**WOLFE, "max_iter": 7, "max_eval": 9, "history_size": 3},
    "wolfe-small": {**WOLFE, "lr": 0.05, "max_eval": 6, "tolerance_grad": 1e-3},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name,
            options,
            id=f"{name}-{label}",
            marks=() if name == "rosenbrock2" or label == "wolfe" else pytest.mark.thorough,
        )
        for name in PROBLEMS
        for label, options in OPTIONS.items()
    ],
)
def test_iterates_and_evaluations_are_pytorchs(torch: Any, name: str, options: dict[str, Any]) -> None:
    if "line_search_fn" not in options:
        options = {"lr": problem(name).lr, **options}
    ours, theirs = our_run(problem(name), options, 12), torch_run(torch, problem(name), options, 12)
    # Quasi-Newton steps amplify rounding: PyTorch's own run drifts away from itself where the start is moved by a few
    # units in the last place. As far as that drift stays small, our run must stay near it.
    moved = [torch_run(torch, problem(name), options, 12, ulps) for ulps in (-3, 3)]
    drift = np.maximum.accumulate(np.maximum(*(distances(run, theirs) for run in moved)))
    reproducible = drift < 1e-7
    assert theirs.counts[reproducible.sum() - 1][0] >= 40
    for step in np.flatnonzero(reproducible):
        assert ours.counts[step] == theirs.counts[step]
        np.testing.assert_allclose(ours.params[step], theirs.params[step], rtol=0, atol=1e-12 + 100 * drift[step])
        np.testing.assert_allclose(ours.losses[step], theirs.losses[step], rtol=1e-12, atol=1e-12 + 1e4 * drift[step])
    assert ours.losses[-1] < ours.losses[0]


# --- The line search ------------------------------------------------------------------------------------------------


def polynomial(coefficients: Any, t: Any) -> Any:
    """Value and derivative."""
    value, slope = 0.0, 0.0
    for c in coefficients:
        value, slope = value * t + c, slope * t + value
    return value, slope


@jax.jit
def our_search(coefficients: Any, t: Any, max_ls: Any) -> Any:
    def evaluate(t: Any, count: Any) -> Any:
        value, slope = polynomial(coefficients, t)
        return Point(t, value, slope, slope[None]), count + 1

    start, _ = evaluate(jnp.zeros(()), 0)
    return strong_wolfe(evaluate, start, t, jnp.ones(()), 0, max_ls, jnp.asarray(1e-9), skip=jnp.array(False))


def torch_search(torch: Any, coefficients: Any, t: float, max_ls: int) -> Any:
    from torch.optim.lbfgs import _strong_wolfe

    def objective(x: Any, t: Any, d: Any) -> Any:
        value, slope = polynomial(coefficients, float(t))
        return value, torch.tensor([slope], dtype=torch.float64)

    d = torch.ones(1, dtype=torch.float64)
    f, g = objective(None, 0.0, d)
    return _strong_wolfe(objective, None, t, d, f, g, g.dot(d), max_ls=max_ls)


@pytest.mark.usefixtures("x64")
def test_searches_along_a_line_are_pytorchs(torch: Any) -> None:
    rng = np.random.default_rng(0)
    seen, compared = set(), 0
    for _ in range(300):
        coefficients = rng.standard_normal(7) * 2.0 ** rng.integers(-4, 3, 7)
        coefficients[0] = abs(coefficients[0])
        coefficients[-2] = -abs(coefficients[-2])  # the slope at 0
        first, max_ls = float(2.0 ** rng.integers(-6, 4)), int(rng.integers(0, 26))

        def search(ulps: int, coefficients: Any = coefficients, first: float = first, max_ls: int = max_ls) -> Any:
            return torch_search(torch, coefficients * (1 + ulps * 2.0**-52), first, max_ls)

        theirs = search(0)
        if any(abs(float(theirs[2]) - float(search(ulps)[2])) > 1e-9 for ulps in (-2, 1, 3)):
            continue  # a matter of rounding
        compared += 1
        point, evaluations, count = our_search(jnp.asarray(coefficients), first, max_ls)
        assert evaluations == count == theirs[3]
        np.testing.assert_allclose(point.t, float(theirs[2]), rtol=1e-9)
        np.testing.assert_allclose(point.loss, float(theirs[0]), rtol=1e-9, atol=1e-9)
        slope = polynomial(coefficients, np.asarray(point.t))[1]
        np.testing.assert_allclose([point.slope, *point.grad], [slope, slope], rtol=1e-9, atol=1e-6)
        seen.add(int(evaluations))
    assert compared >= 270
    assert len(seen) >= 10  # short searches and long ones


@pytest.mark.usefixtures("x64")
def test_a_search_whose_loss_is_too_large_to_change(torch: Any) -> None:
    """The first trial may equal the start; only later ones must be below the trial before them."""
    coefficients = np.array([-1.0, 2.0**60])
    theirs = torch_search(torch, coefficients, 0.5, 25)
    point, evaluations, _ = our_search(jnp.asarray(coefficients), 0.5, 25)
    assert (evaluations, point.t) == (theirs[3], theirs[2])


# --- One program ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FIXED, WOLFE], ids=["fixed", "wolfe"])
def test_editing_numbers_compiles_nothing(options: dict[str, Any], compilations: Any) -> None:
    optimizer = optim.LBFGS([jnp.asarray(problem("rosenbrock2").start)], **options)
    optimizer.step(problem("rosenbrock2").ours)
    before = compilations()
    group = optimizer.param_groups[0]
    for name, value in {
        "lr": 0.5, "max_iter": 3, "max_eval": 7, "tolerance_grad": 1e-3, "tolerance_change": jnp.float32(1e-4)
    }.items():  # fmt: skip
        group[name] = value
        optimizer.step(problem("rosenbrock2").ours)
    assert compilations() == before


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [FIXED, WOLFE], ids=["fixed", "wolfe"])
def test_edited_numbers_have_pytorchs_effect(torch: Any, options: dict[str, Any]) -> None:
    edits = [
        {},
        {"max_iter": 2},
        {"lr": 5e-4},
        {"max_eval": 2, "max_iter": 20},
        {"max_eval": 1},
        {"tolerance_change": 1e3, "max_eval": 25},
        {"tolerance_change": 1e-9, "max_iter": 1},
        {"max_iter": 0},
        {"max_iter": 2.5},
        {"tolerance_grad": 1e6},
        {"tolerance_grad": 1e-7, "tolerance_change": -1e9, "max_iter": 4},
    ]
    setting = problem("rosenbrock20")
    ours, theirs = optim.LBFGS([jnp.asarray(setting.start)], **options), torch_optimizer(torch, setting.start, options)
    (tensor,) = theirs.param_groups[0]["params"]
    for edit in edits:
        ours.param_groups[0].update(edit)
        theirs.param_groups[0].update(edit)
        np.testing.assert_allclose(ours.step(setting.ours), torch_step(torch, theirs, setting), rtol=1e-9)
        np.testing.assert_allclose(ours.params[0], tensor.detach().numpy(), rtol=1e-9, err_msg=str(edit))
        assert state_of(ours)["func_evals"] == theirs.state[tensor]["func_evals"], edit
        assert state_of(ours)["n_iter"] == theirs.state[tensor]["n_iter"], edit


def test_first_step_with_a_small_gradient_evaluates_once() -> None:
    optimizer = optim.LBFGS([jnp.ones(3)])
    assert optimizer.step(lambda params: 1e-9 * params[0].sum()) == pytest.approx(3e-9)
    assert dict(state_of(optimizer)) == {"func_evals": 1, "n_iter": 0}
    assert optimizer.params[0].tolist() == [1, 1, 1]


def test_defaults_are_pytorchs(torch: Any) -> None:
    for options in ({}, {"max_iter": 7}, {"max_iter": 7, "max_eval": 3}):
        ours = optim.LBFGS([jnp.ones(1)], **options)
        assert ours.defaults == torch.optim.LBFGS([torch.ones(1)], **options).defaults
        assert ours.param_groups[0]["max_eval"] == ours.defaults["max_eval"]
