"""The numbers are PyTorch's, for every combination of flags, through both faces."""

from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from reference import Result, assert_same, facade, functional, pytorch, random_gradients, random_parameters

STEPS = 100
SHAPES = [
    ((), np.float64),
    ((0, 3), np.float64),
    ((5,), np.float64),
    ((3, 4), np.float64),
    ((3, 4), np.float64),  # of one shape with another: both in one program, with counts of their own
    ((2, 1, 2, 2), np.float64),
    ((3,), np.complex128),
    ((), np.float64),
]


def combinations(*marks: pytest.MarkDecorator) -> Any:
    """Every combination of flags; ``marks`` are on those between the first, all of them off, and the last."""
    return pytest.mark.parametrize(
        ("case", "options"),
        [
            pytest.param(
                case,
                options,
                id="-".join([str(case), *(f"{name}={options[name]}" for name in case.grid)]),
                marks=() if options in (every[0], every[-1]) else marks,
            )
            for case in CASES
            for every in [list(case.combinations())]
            for options in every
        ],
    )


def missing(grads: list[list[Any]]) -> list[list[Any]]:
    """Some parameters lack the first two gradients and every third, one lacks all of them."""
    return [
        [None if i == 7 or (i in (2, 3, 6) and (t < 2 or t % 3 == 1)) else g for i, g in enumerate(step)]
        for t, step in enumerate(grads)
    ]


@combinations()
def test_facade_float64(torch: Any, x64: None, case: Case, options: dict[str, Any]) -> None:
    params = random_parameters(case.shapes(SHAPES))
    grads = missing(random_gradients(params, STEPS))
    assert_same(facade(case, options, params, grads), pytorch(torch, case, options, params, grads))


@combinations(pytest.mark.thorough)
def test_functional_float64(torch: Any, x64: None, case: Case, options: dict[str, Any]) -> None:
    params = random_parameters(case.shapes(SHAPES))
    grads = random_gradients(params, STEPS)
    ours = functional(case, options, params, grads)
    assert ours.state[0]["step"] == STEPS
    theirs = pytorch(torch, case, options, params, grads)
    for state in theirs.state:
        assert state.get("step", STEPS) == STEPS
    assert_same(ours, theirs, with_step=False)


@combinations(pytest.mark.thorough)
def test_float32_is_as_near_the_truth_as_pytorch(torch: Any, case: Case, options: dict[str, Any]) -> None:
    params = random_parameters([((16, 16), np.float32)] * 8)
    grads = random_gradients(params, STEPS, spread=1)
    double = [[g.astype(np.float64) for g in step] for step in grads]
    truth = pytorch(torch, case, options, [p.astype(np.float64) for p in params], double).params

    def error(result: Result) -> float:
        """The largest error of each parameter, summed: one alone would be a matter of luck."""
        return sum(np.abs(np.asarray(p, np.float64) - t).max() for p, t in zip(result.params, truth, strict=True))

    allowed = 1.5 * error(pytorch(torch, case, options, params, grads))
    assert error(facade(case, options, params, grads)) <= allowed
    assert error(functional(case, options, params, grads)) <= allowed
