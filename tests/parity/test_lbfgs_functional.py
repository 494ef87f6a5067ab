"""The functional LBFGS is the class, runs under vmap, and can be differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lbfgs_problems import FIXED, WOLFE, problem, rosenbrock, state_of

import optimjax as optim
from optimjax import functional as F

# --- The functional face --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FIXED, WOLFE], ids=["fixed", "wolfe"])
def test_functional_is_the_facade(options: dict[str, Any], compilations: Any) -> None:
    setting = problem("rosenbrock2")
    optimizer = optim.LBFGS([jnp.asarray(setting.start)], max_iter=3, **options)
    algorithm = F.lbfgs(max_iter=3, **options)

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            return algorithm.update(*carry[:1], None, *carry[1:], loss_fn=setting.ours), None

        return jax.lax.scan(step, (params, state), length=4)[0]

    params = [jnp.asarray(setting.start)]
    params, state = run(params, algorithm.init(params))
    for _ in range(4):
        optimizer.step(setting.ours)
    np.testing.assert_array_equal(params[0], optimizer.params[0])
    assert state.step == 4
    assert state.func_evals == state_of(optimizer)["func_evals"]
    np.testing.assert_array_equal(state.d, state_of(optimizer)["d"])
    before = compilations()
    run(params, state)
    assert compilations() == before


@pytest.mark.parametrize("options", [FIXED, WOLFE], ids=["fixed", "wolfe"])
def test_vmap_is_each_run_alone(options: dict[str, Any]) -> None:
    algorithm = F.lbfgs(max_iter=6, **options)
    loss_fn = problem("rosenbrock2").ours

    def run(x: Any) -> Any:
        params, state = [x], algorithm.init([x])
        for _ in range(2):
            params, state = algorithm.update(params, None, state, loss_fn=loss_fn)
        return params[0], state.func_evals

    starts = jnp.array([[-1.2, 1.0], [0.5, 2.0], [1.0, 1.0], [3.0, -1.0]])
    together, evaluations = jax.jit(jax.vmap(run))(starts)
    alone = [jax.jit(run)(start) for start in starts]
    np.testing.assert_allclose(together, [x for x, _ in alone], rtol=2e-4)
    assert evaluations.tolist() == [count for _, count in alone]
    assert len(set(evaluations.tolist())) > 1


def test_given_gradients_are_those_of_the_first_evaluation() -> None:
    algorithm = F.lbfgs(**WOLFE)
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    loss_fn = lambda p: (p["a"] ** 2).sum() + (p["b"] - 1) ** 4  # noqa: E731
    computed = algorithm.update(params, None, algorithm.init(params), loss_fn=loss_fn)
    given = algorithm.update(params, jax.grad(loss_fn)(params), algorithm.init(params), loss_fn=loss_fn)
    for a, b in zip(jax.tree.leaves(computed), jax.tree.leaves(given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    partly, _ = algorithm.update(
        params, {"a": None, "b": jax.grad(loss_fn)(params)["b"]}, algorithm.init(params), loss_fn=loss_fn, max_iter=1
    )
    assert partly["a"].tolist() == [1, 2]
    assert partly["b"] != 3
    with pytest.raises(ValueError, match=r"missing \['b'\]"):
        algorithm.update(params, {"a": None}, algorithm.init(params), loss_fn=loss_fn)
    with pytest.raises(ValueError, match="gradient of 'a' has shape"):
        algorithm.update(params, {"a": jnp.ones(3), "b": None}, algorithm.init(params), loss_fn=loss_fn)


def test_hyperparameters_may_be_arrays_schedules_and_overrides(compilations: Any) -> None:
    algorithm = F.lbfgs(lr=lambda count: 0.1 * 0.5 ** count.astype(jnp.float32), max_iter=1)
    params = jnp.array([100.0])
    state = algorithm.init(params)
    loss_fn = lambda p: (p**2).sum() / 2  # noqa: E731
    update = jax.jit(lambda p, s, **over: algorithm.update(p, None, s, loss_fn=loss_fn, **over))
    params, state = update(params, state)
    np.testing.assert_allclose(params, 100 - 0.1, rtol=1e-6)  # the very first step is no longer than lr
    second, _ = update(params, state)
    np.testing.assert_allclose(second, params * 0.95, rtol=1e-4)  # then Newton's, times 0.05
    over, _ = update(params, state, lr=jnp.array(0.5))
    np.testing.assert_allclose(over, params * 0.5, rtol=1e-4)
    before = compilations()
    update(params, state, lr=jnp.array(0.25))
    assert compilations() == before
    with pytest.raises(TypeError, match="only numeric hyperparameters can be overridden"):
        algorithm.update(params, None, state, loss_fn=loss_fn, history_size=3)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        algorithm.update(params, None, state, loss_fn=loss_fn, lr=-1)
    by_schedule = F.lbfgs(max_iter=lambda count: count + 1)
    _, state = by_schedule.update(params, None, by_schedule.init(params), loss_fn=loss_fn)
    assert (state.n_iter, state.func_evals) == (1, 1)


def test_a_state_of_another_kind_is_refused() -> None:
    algorithm, params = F.lbfgs(), jnp.ones(3)
    for state in (F.lbfgs(history_size=3).init(params), algorithm.init(jnp.ones(4)), F.adam().init(params)):
        with pytest.raises(TypeError, match="state must be the LBFGSState that init returns"):
            algorithm.update(params, None, state, loss_fn=jnp.sum)
    with pytest.raises(TypeError, match="loss_fn"):
        algorithm.update(params, None, algorithm.init(params))


# --- Derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_derivatives_are_taken_in_forward_mode(line_search_fn: str | None) -> None:
    """Of the path that it took; its loops end when they are done, which reverse mode cannot follow."""

    def final_loss(at: Any) -> Any:
        lr, distance = at
        lbfgs = F.lbfgs(lr=lr, max_iter=3, line_search_fn=line_search_fn)
        x = jnp.array([-1.2, 1.0]) + distance * jnp.array([0.6, -0.8])
        state = lbfgs.init(x)
        for _ in range(2):
            x, state = lbfgs.update(x, None, state, loss_fn=lambda x: rosenbrock(jnp, x))
        return rosenbrock(jnp, x)

    at, h = jnp.array([0.3, 0.0]), 1e-6
    values = jax.jit(jax.vmap(final_loss))(at[None] + h * jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    numeric = (values[::2] - values[1::2]) / (2 * h)
    assert jnp.all(jnp.abs(numeric) > 1e-3)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(final_loss))(at), numeric, rtol=1e-4)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(final_loss))(at)
