"""A sweep's runs are those that one would make separately; what diverges stays alone, and bad values are refused."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules, sweeps
from optimjax.sweeps import Sweep

STEPS = 30
RATES = [1e-3, 1e-2, 1e-1]
TARGETS = np.random.default_rng(0).normal(size=(STEPS, 16, 3))


def regression(algorithm: Callable[..., Any]) -> Callable[..., Any]:
    """The losses of a small network that `algorithm(**numbers)` trains, on a batch of its own for each step."""

    def train(seed: Any = 0, **numbers: Any) -> Any:
        rule = algorithm(**numbers)
        first, second, third = jax.random.split(jax.random.key(seed), 3)
        inputs = jax.random.normal(first, (16, 4))
        params = {"a": jax.random.normal(second, (4, 8)), "b": jax.random.normal(third, (8, 3))}

        def loss_fn(params: Any, targets: Any) -> Any:
            return jnp.mean((jnp.tanh(inputs @ params["a"]) @ params["b"] - targets) ** 2)

        def step(carry: Any, targets: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(carry[0], targets)
            return rule.update(carry[0], grads, carry[1]), loss

        return jax.lax.scan(step, (params, rule.init(params)), jnp.asarray(TARGETS, inputs.dtype))[1]

    return train


@pytest.mark.parametrize(
    ("algorithm", "axes"),
    [
        (F.adamw, {"lr": RATES, "weight_decay": [0.0, 0.1]}),
        (F.sgd, {"lr": RATES, "momentum": [0.0, 0.9], "seed": [0, 1]}),
        (lambda lr: F.adam(lr=schedules.cosine_annealing(lr, T_max=STEPS)), {"lr": RATES}),
    ],
    ids=["adamw", "sgd", "schedule"],
)
def test_runs_are_the_separate_ones(x64: None, algorithm: Callable[..., Any], axes: dict[str, Any]) -> None:
    train = regression(algorithm)
    result = optim.sweep(train, **axes)
    assert result.shape == tuple(map(len, axes.values()))
    assert result.values.shape == (*result.shape, STEPS)
    one = jax.jit(train)
    for places in np.ndindex(result.shape):
        numbers = {name: axes[name][place] for name, place in zip(axes, places, strict=True)}
        np.testing.assert_allclose(result.values[places], one(**numbers), rtol=1e-11)


def test_runs_in_single_precision_are_the_separate_ones_within_rounding() -> None:
    train = regression(F.adamw)
    result = optim.sweep(train, lr=RATES)
    for losses, lr in zip(result.values, RATES, strict=True):
        np.testing.assert_allclose(losses, jax.jit(train)(lr=lr), rtol=2e-5)


@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("at_once", [None, 1, 4, 5, 6, 100])
def test_in_parts_and_threads_it_is_the_same(monkeypatch: Any, at_once: int | None, cores: int) -> None:
    monkeypatch.setattr(sweeps, "usable_cores", lambda: cores)
    runs = []

    def seen(a: Any) -> Any:
        runs.append(float(a))
        return np.asarray(a)

    def weigh(a: Any, b: Any) -> Any:
        seen_a = jax.pure_callback(seen, jax.ShapeDtypeStruct((), a.dtype), a, vmap_method="sequential")
        return {"sum": seen_a + b, "both": jnp.stack([a, b])}

    result = optim.sweep(weigh, at_once=at_once, a=[1.0, 2.0, 3.0], b=[10.0, 20.0])
    np.testing.assert_array_equal(result.values["sum"], [[11, 21], [12, 22], [13, 23]])
    np.testing.assert_array_equal(result.values["both"][..., 0], [[1, 1], [2, 2], [3, 3]])
    assert result.values["both"].shape == (3, 2, 2)
    each = min(at_once or 6, 6)
    size = -(-each // min(cores, each))
    assert len(runs) == -(-6 // size) * size  # some runs are made twice, so that there is one program


def test_it_is_compiled_once_for_each_function(compilations: Callable[[], int]) -> None:
    train = regression(F.adamw)
    optim.sweep(train, lr=RATES)
    before = compilations()
    optim.sweep(train, lr=[0.2, 0.3, 0.4])
    assert compilations() == before
    optim.sweep(train, lr=[0.2, 0.3])
    assert compilations() > before


def test_what_a_function_holds_goes_with_it() -> None:
    class Data:
        value = 3.0

    data = Data()
    seen = weakref.ref(data)
    assert optim.sweep(lambda x, data=data: data.value * x, x=[1.0]).values == 3.0
    del data
    jax.clear_caches()
    gc.collect()
    assert seen() is None


def test_callables_that_cannot_be_remembered() -> None:
    class Scaled:
        __slots__ = ()
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, x: Any) -> Any:
            return 2 * x

    assert optim.sweep(Scaled(), x=[1.0, 2.0]).values.tolist() == [2.0, 4.0]


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    train = regression(F.sgd)
    losses = optim.sweep(train, lr=[0.01, 1e30, 0.1])
    assert not np.isfinite(losses.values[1, -1])
    np.testing.assert_allclose(losses.values[::2], optim.sweep(train, lr=[0.01, 0.1]).values, rtol=2e-5)
    assert losses.best(lambda values: values[:, -1]) == {"lr": 0.1}


def test_the_best() -> None:
    axes = {"lr": np.array([0.1, 0.2]), "decay": np.array([0, 1, 2])}
    values = jnp.array([[3.0, jnp.nan, 2.0], [2.0, -jnp.inf, jnp.inf]])
    assert Sweep(axes, values).best() == {"lr": 0.1, "decay": 2}  # the first of equal ones
    assert Sweep(axes, values).best(largest=True) == {"lr": 0.1, "decay": 0}
    assert Sweep(axes, {"loss": values}).best(lambda values: -values["loss"]) == {"lr": 0.1, "decay": 0}
    assert isinstance(Sweep(axes, values).best()["decay"], int)


def test_the_mean_over_seeds() -> None:
    result = optim.sweep(
        lambda lr, seed: jnp.where((lr > 0.15) & (seed == 1), jnp.nan, lr + seed.astype(lr.dtype)),
        lr=[0.1, 0.2],
        seed=range(3),
    )
    mean = result.mean("seed")
    assert list(mean.axes) == ["lr"]
    np.testing.assert_allclose(mean.values, [1.1, np.nan], rtol=1e-6)
    assert mean.best(largest=True) == {"lr": 0.1}  # the larger rate has diverged for one seed
    assert result.best(largest=True) == {"lr": 0.2, "seed": 2}
    assert result.mean("lr", "seed").values.shape == ()
    with pytest.raises(ValueError, match="there is no axis 'sede', only 'lr', 'seed'"):
        result.mean("sede")


def test_values_are_returned_as_they_were_given() -> None:
    assert optim.sweep(lambda lr: lr, lr=[0.1]).best() == {"lr": 0.1}  # and not the nearest float32
    result = optim.sweep(
        lambda n, flag, x: jnp.where(flag, n.astype(x.dtype), x), n=range(2), flag=[False, True], x=jnp.ones(2)
    )
    assert {name: type(value) for name, value in result.best().items()} == {"n": int, "flag": bool, "x": float}
    assert optim.sweep(lambda lr: lr, lr=(x for x in [1.0, 2.0])).shape == (2,)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({}, ValueError, "needs the values of at least one number"),
        ({"lr": 0.1}, ValueError, "lr must be a sequence of values, got 0.1: what is fixed belongs in the function"),
        ({"lr": "0.1"}, ValueError, "lr must be a sequence of values, got '0.1'"),
        ({"lr": []}, ValueError, r"lr must be a sequence of at least one value, got an array of shape \(0,\)"),
        ({"lr": [[0.1]]}, ValueError, r"got an array of shape \(1, 1\)"),
        ({"lr": ["a"]}, TypeError, "the values of lr must be real numbers, got .*make a sweep for each"),
        ({"lr": [1j]}, TypeError, "the values of lr must be real numbers"),
        ({"lr": [None, 0.1]}, TypeError, "the values of lr must be real numbers"),
        ({"lr": [0.1, [0.2]]}, TypeError, "the values of lr must be real numbers"),
        ({"lr": [0.1], "at_once": 0}, ValueError, "at_once must be at least 1, got 0"),
        ({"rate": [0.1]}, TypeError, r"<lambda> is called as <lambda>\(rate=...\): missing a required argument: 'lr'"),
        ({"lr": [0.1], "rate": [1]}, TypeError, "got an unexpected keyword argument 'rate'"),
    ],
)
def test_what_is_refused(axes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim.sweep(lambda lr: lr, **axes)


def test_keys_are_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"jax\.random\.key\(seed\)"):
        optim.sweep(lambda key: key, key=jax.random.split(jax.random.key(0), 2))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="sweep needs a function, got 3"):
        optim.sweep(3, lr=[0.1])  # pyright: ignore[reportArgumentType]


def test_under_a_transformation_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"there, use jax\.vmap"):
        jax.jit(lambda y: optim.sweep(lambda x: x * y, x=[1.0, 2.0]).values)(3.0)


def test_flags_that_decide_what_is_compiled_say_so() -> None:
    with pytest.raises(TypeError, match="nesterov decides what is compiled"):
        optim.sweep(regression(lambda nesterov: F.sgd(momentum=0.9, nesterov=nesterov)), nesterov=[False, True])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (jnp.ones((2, 5)), r"one number is needed for each run, an array of shape \(2,\), got \(2, 5\): let select"),
        ({"loss": jnp.ones(2)}, "one array is needed, got dict: let select choose it"),
        (jnp.array([jnp.nan, jnp.inf]), "all 2 runs have diverged"),
    ],
)
def test_a_best_that_there_is_not(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep({"lr": np.array([0.1, 0.2])}, values).best()
