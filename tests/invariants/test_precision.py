"""Nothing is promoted by accident, whatever the dtypes of parameters, hyperparameters and counts are.

The suite runs under JAX's strict promotion of dtypes and ranks (conftest.py); tracing is enough to see an error of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case

from optimjax import functional as F
from optimjax import schedules
from optimjax.algorithms.parts.vector import Layout

DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "complex64", "complex128")
FORMS: dict[str, Callable[[Any], Any]] = {  # of a number
    "number": lambda value: value,
    "array": jnp.asarray,
    "half": lambda value: jnp.asarray(value, jnp.float16),
    "numpy": np.float32,
    "schedule": lambda value: lambda count: value * 0.5 ** count.astype(jnp.bfloat16),
    "constant schedule": lambda value: lambda count: value,
}


def params_of(case: Case, dtype: str) -> Any:
    return {name: jnp.ones(case.shape(shape), dtype) for name, shape in (("a", (2, 3)), ("b", (3,)), ("c", ()))}


def kind_of(array: Any) -> Any:
    return array.shape, array.dtype


def test_the_suite_is_strict() -> None:
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert jax.config.jax_numpy_rank_promotion == "raise"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_functional(request: pytest.FixtureRequest, case: Case, dtype: str) -> None:
    if dtype in ("float64", "complex128"):
        request.getfixturevalue("x64")
    if dtype.startswith("complex") and case.complex_message:
        pytest.skip("refused")
    params = params_of(case, dtype)
    kinds = case.optimizer.definition.hyperparameters.kinds
    for options in case.variants():
        values = {
            name: options.get(name, case.other[name])
            for name in case.numeric
            if name in options or not (kinds[name].switch or kinds[name].skip)  # what is off stays off
        }
        for form, of in FORMS.items():
            numbers = {name: jax.tree.map(of, value) for name, value in values.items()}
            algorithm = case.factory(**{**options, **numbers})

            def run(params: Any, algorithm: Any = algorithm) -> Any:
                state = algorithm.init(params)
                for _ in range(2):
                    params, state = algorithm.update(params, params, state)
                return params, state

            new, state = jax.eval_shape(run, params)
            start = jax.eval_shape(algorithm.init, params)
            assert jax.tree.map(kind_of, (new, state)) == jax.tree.map(kind_of, (params, start)), (form, options)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if "64" in dtype or "32" in dtype] + ["bfloat16"])
@pytest.mark.parametrize("make", [F.ema, F.swa, lambda: F.ema(lambda count: 1 - 1 / (2.0 + count.astype(float)))])
def test_averages(request: pytest.FixtureRequest, make: Callable[[], F.Averaging], dtype: str) -> None:
    if dtype in ("float64", "complex128"):
        request.getfixturevalue("x64")
    average = make()
    params = {"w": jnp.ones(3, dtype)}
    state = average.init(params)
    for _ in range(2):
        state = average.update(params, state)
    assert average.params(state)["w"].dtype == dtype
    np.testing.assert_allclose(np.asarray(average.params(state)["w"], complex), 1, rtol=1e-6)


MADE: dict[str, Callable[[Any], Any]] = {
    "constant": lambda value: schedules.constant(value, total_iters=2),
    "linear": lambda value: schedules.linear(value, total_iters=3),
    "step": lambda value: schedules.step(value, 2),
    "multi_step": lambda value: schedules.multi_step(value, [1, 3]),
    "exponential": lambda value: schedules.exponential(value, 0.5),
    "polynomial": lambda value: schedules.polynomial(value, 3, 2.0),
    "cosine_annealing": lambda value: schedules.cosine_annealing(value, 3, 0.01),
    "warm restarts": lambda value: schedules.cosine_annealing_warm_restarts(value, 2),
    "longer warm restarts": lambda value: schedules.cosine_annealing_warm_restarts(value, 2, 2),
    "cyclic": lambda value: schedules.cyclic(value, 1.0, 2),
    "cyclic triangular2": lambda value: schedules.cyclic(value, 1.0, 2, mode="triangular2"),
    "cyclic exp_range": lambda value: schedules.cyclic(value, 1.0, 2, mode="exp_range", gamma=0.9),
    "one_cycle": lambda value: schedules.one_cycle(value, 5),
    "one_cycle linear": lambda value: schedules.one_cycle(value, 9, anneal_strategy="linear", three_phase=True),
    "multiplicative": lambda value: schedules.multiplicative(value, lambda count: 0.9),
    "lambda": lambda value: schedules.lambda_(value, lambda count: jnp.float32(0.5) ** jnp.float32(count)),
    "sequential": lambda value: schedules.sequential(
        [schedules.linear(value, total_iters=2), schedules.exponential(value, 0.5)], [2]
    ),
    "product": lambda value: schedules.product(schedules.step(value, 2), schedules.exponential(1.0, 0.5)),
    "warmup": lambda value: schedules.warmup(schedules.cosine_annealing(value, 3), 2),
    "warmup alongside": lambda value: schedules.warmup(schedules.cosine_annealing(value, 3), 2, delay=False),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_schedules(make: Callable[[Any], Any]) -> None:
    for base in (0.1, jnp.float32(0.1), np.float32(0.1), np.float64(0.1), 1):
        schedule = make(base)
        for count in (3, np.arange(5), jnp.int32(3), jnp.arange(5)):
            value = schedule(count)
            assert np.shape(value) == np.shape(count)
        assert jax.eval_shape(schedule, jnp.int32(0)).dtype == jnp.float32
        assert jax.eval_shape(jax.vmap(schedule), jnp.arange(3)).dtype == jnp.float32


@pytest.mark.parametrize(
    "make", [MADE[name] for name in MADE if name != "lambda"], ids=[name for name in MADE if name != "lambda"]
)
def test_schedules_in_double_precision(make: Callable[[Any], Any], x64: None) -> None:
    for base in (0.1, jnp.float64(0.1), 1):
        for count in (jnp.int32(3), jnp.arange(5), jnp.arange(5, dtype="int32")):
            value = make(base)(count)
            assert value.shape == count.shape
            assert value.dtype == jnp.float64


def test_reduce_on_plateau() -> None:
    plateau = schedules.reduce_on_plateau(1.0, patience=0)
    state = plateau.init()
    for metric in (1.0, jnp.float32(2.0), jnp.bfloat16(3.0), np.float64(4.0), 5):
        value, state = jax.jit(plateau.update)(metric, state)
    np.testing.assert_allclose(value, 1e-4, rtol=1e-6)


def test_float8_parameters_move() -> None:
    """They are updated in float32, and rounded once."""
    params = {"w": jnp.full((2, 2), 1.0, jnp.float8_e4m3fn)}
    for case in CASES:
        algorithm = case.factory(**{**case.base, "lr": 20 * case.base["lr"]})
        state, update = algorithm.init(params), jax.jit(algorithm.update)
        new = params
        for _ in range(8):
            new, state = update(new, params, state)
        assert new["w"].dtype == jnp.float8_e4m3fn
        assert np.all(np.asarray(new["w"], float) < 1), case
        assert all(np.all(np.isfinite(np.asarray(leaf, float))) for leaf in jax.tree.leaves(state)), case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_class(case: Case, dtype: str) -> None:
    if dtype.startswith("complex") and case.complex_message:
        pytest.skip("refused")
    params = params_of(case, dtype)
    optimizer = case.optimizer(params, **case.variants()[1])
    for _ in range(2):
        optimizer.step(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(optimizer.params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("float64", "float64"),
        ("complex128", "float64"),
        ("float32", "float32"),
        ("complex64", "float32"),
        ("bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("case", [case for case in CASES if case.scalar_slots], ids=str)
def test_the_state_of_one_number_is_as_exact_as_its_parameter(x64: None, case: Case, dtype: str, wide: str) -> None:
    algorithm = case.factory(**case.base)
    params = params_of(case, dtype)
    state = jax.eval_shape(algorithm.init, params)
    for each in (state, jax.eval_shape(algorithm.update, params, params, state)[1]):
        for name in case.scalar_slots:
            assert {slot.dtype for slot in getattr(each, name).values()} == {jnp.dtype(wide)}


def test_pytorch_with_double_precision_as_its_default(torch: Any, x64: None) -> None:
    """There, too, the numbers kept for a parameter are then double."""
    assert torch.get_default_dtype() == torch.float64
    for case in CASES:
        if not case.scalar_slots:
            continue
        options = {**case.base, **case.full}
        tensor = torch.nn.Parameter(torch.full((3,), 0.7))
        reference = case.reference(torch)([tensor], **options)
        params = jnp.full(3, 0.7)
        algorithm = case.factory(**options)
        state, update = algorithm.init(params), jax.jit(algorithm.update)
        optimizer = case.optimizer([params], **options)
        for step in range(50):
            grad = np.sin(np.arange(3.0) + step)
            tensor.grad = torch.tensor(grad)
            reference.step()
            params, state = update(params, jnp.asarray(grad), state)
            optimizer.step([jnp.asarray(grad)])
        kept = optimizer.state[optimizer.param_groups[0]["params"][0]]
        for name, theirs in reference.state[tensor].items():
            np.testing.assert_allclose(getattr(state, name), theirs, rtol=1e-13, atol=1e-15, err_msg=name)
            np.testing.assert_allclose(kept[name], theirs, rtol=1e-13, atol=1e-15, err_msg=name)
        for ours in (params, optimizer.params[0]):
            np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=1e-13)


def test_lbfgs_in_half_precision() -> None:
    """The vector of parameters is float32 at least, whatever is side by side in it."""
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "c": jnp.ones(2)}
    layout = Layout.of(list(params.values()))
    assert layout.dtype == jnp.float32
    assert layout.flatten(list(params.values())).dtype == jnp.float32
