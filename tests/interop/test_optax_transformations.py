"""Every transformation of optax, as an algorithm and as an optimizer, gives the numbers that it gives by itself."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_cases
import pytest
from optax_cases import EXTRA, PARAMS, X, loss

import optimjax as optim
from optimjax.interop.optax import from_optax, to_optax

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Specifying a key:UserWarning")
NAMES = [name for name in optax_cases.transformations() if name not in optax_cases.EXCEPTIONS]
every_one = pytest.mark.parametrize(
    "name", [name if optax_cases.is_alias(name) else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]
)


@pytest.fixture(autouse=True)
def standard_promotion(strict: None) -> Any:
    """optax's own arithmetic relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def arguments(tx: Any, params: Any) -> tuple[Any, dict[str, Any]]:
    """Gradients, and what else the transformation may want to know."""
    value, grads = jax.value_and_grad(loss)(params)
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return grads, {}
    for name, extra in EXTRA.items():
        if tx is optax_cases.made(name):
            return grads, dict(extra)
    return grads, {"value": value, "grad": grads, "value_fn": loss}


def run(tx: Any, update: Any, state: Any) -> Any:
    """Some steps, one compiled program each."""

    @jax.jit
    def one(params: Any, state: Any) -> Any:
        grads, extra = arguments(tx, params)
        return update(params, grads, state, **extra)

    params = PARAMS
    for _ in range(STEPS):
        params, state = one(params, state)
    return params, state


@functools.cache
def expected(name: str) -> Any:
    """What optax does by itself."""
    tx = optax_cases.made(name)

    def update(params: Any, grads: Any, state: Any, **extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return run(tx, update, tx.init(PARAMS))


def assert_same(ours: Any, theirs: Any) -> None:
    """But for the rounding of another program; keys as their data."""

    def one(a: Any, b: Any) -> None:
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype

    jax.tree.map(one, ours, theirs)


@every_one
def test_as_an_algorithm(name: str) -> None:
    algorithm = from_optax(optax_cases.made(name))
    params, state = run(algorithm.tx, algorithm.update, algorithm.init(PARAMS))
    assert_same((params, state.tx), expected(name))
    assert state.step == STEPS


@every_one
def test_as_an_optimizer(name: str) -> None:
    optimizer = optim.FromOptax(PARAMS, optax_cases.made(name))
    for _ in range(STEPS):
        if name in EXTRA:
            optimizer.step(jax.grad(loss)(optimizer.params), **EXTRA[name])
        else:
            optimizer.step(loss, X)
    params, state = optimizer.functional_state()
    assert_same((params, state.tx), expected(name))


@every_one
def test_there_and_back(name: str) -> None:
    """What was made from optax is the transformation itself again; at a rate of its own it goes through both."""
    tx = optax_cases.made(name)
    again = to_optax(from_optax(tx))
    assert again.init is tx.init
    assert isinstance(again, optax.GradientTransformationExtraArgs)
    there = to_optax(from_optax(tx, lr=jnp.array(1.0)))  # which is not known to be 1

    def update(params: Any, grads: Any, state: Any, **extra: Any) -> Any:
        updates, state = there.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = run(tx, update, there.init(PARAMS))
    assert_same((params, state.inner_state.tx), expected(name))


def test_a_new_function_of_optax_is_noticed() -> None:
    """Each that this version has can be made, or is an exception with a reason; and there are as many as there were."""
    found = optax_cases.transformations()
    assert len(found) > 90
    assert {"adam", "adamw", "lbfgs", "sgd", "chain", "muon", "prodigy", "partition", "masked"} <= set(found)
    for name in NAMES:
        optax_cases.made(name)


@pytest.mark.parametrize("form", ["functional", "class"])
def test_accumulation(form: str) -> None:
    """``MultiSteps`` is no transformation, but has the methods of one."""
    multi = optax.MultiSteps(optax.adam(0.05), every_k_schedule=2)
    params, state = PARAMS, multi.init(PARAMS)
    ours, algorithm = PARAMS, from_optax(multi)
    own, optimizer = algorithm.init(PARAMS), optim.FromOptax(PARAMS, multi)
    for _ in range(4):
        updates, state = multi.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        ours, own = algorithm.update(ours, jax.grad(loss)(ours), own)
        optimizer.step(loss, X)
    assert own.tx.gradient_step == 2
    chex.assert_trees_all_close(ours if form == "functional" else optimizer.params, params, rtol=1e-5, atol=1e-7)


def test_lookahead_is_refused() -> None:
    """Its parameters are a pair of trees, and its gradients only one."""
    pair = optax.LookaheadParams(PARAMS, PARAMS)
    algorithm = from_optax(optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5))
    with pytest.raises(ValueError, match="gradients do not have the structure of the parameters"):
        algorithm.update(pair, jax.grad(loss)(pair.fast), algorithm.init(pair))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype: str) -> None:
    """Parameters and state keep the dtypes that they have in optax."""
    tx = optax.adamw(0.05, mu_dtype=jnp.float32)
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    theirs, state = params, tx.init(params)
    optimizer = optim.FromOptax(params, tx)
    for _ in range(STEPS):
        grads = jax.tree.map(lambda p: p * jnp.asarray(0.3, dtype), theirs)
        updates, state = tx.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        optimizer.step(grads)
    _, own = optimizer.functional_state()
    for a, b in zip(jax.tree.leaves((optimizer.params, own.tx)), jax.tree.leaves((theirs, state)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2)
