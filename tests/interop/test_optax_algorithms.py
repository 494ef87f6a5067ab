"""Our algorithms as optax transformations: the same numbers, in every wrapper, with numbers that can be set."""

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case
from flax import nnx
from flax.training.train_state import TrainState
from functional_runs import PARAMS, loss

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules
from optimjax.interop.optax import from_optax, to_optax

STEPS = 4
gradient = jax.grad(loss)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def standard_promotion(strict: None) -> Iterator[None]:
    """optax's own arithmetic relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def by_optax(tx: Any, params: Any, steps: int = STEPS, **extra: Any) -> Any:
    """A training loop as users of optax write it."""

    @jax.jit
    def one(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = one(params, state)
    return params, state


def by_ours(algorithm: F.Algorithm, params: Any, steps: int = STEPS, gradient: Any = gradient) -> Any:
    @jax.jit
    def one(params: Any, state: Any) -> Any:
        return algorithm.update(params, gradient(params), state)

    state = algorithm.init(params)
    for _ in range(steps):
        params, state = one(params, state)
    return params, state


def assert_close(ours: Any, theirs: Any, rtol: float = 2e-5) -> None:
    chex.assert_trees_all_close(ours, theirs, rtol=rtol, atol=1e-7)


# --- The same numbers -----------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("full", [False, True])
def test_the_numbers_are_ours(case: Case, full: bool, x64: None) -> None:
    algorithm = case.factory(**case.variants()[full])
    params = jax.tree.map(lambda x: x.astype(float), case.fit(PARAMS))
    theirs, state = by_optax(to_optax(algorithm), params, 2 * case.steps)
    ours, own = by_ours(algorithm, params, 2 * case.steps)
    chex.assert_trees_all_close((theirs, state.inner_state), (ours, own), rtol=1e-10, atol=1e-13)
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, params)


@every_case
def test_in_single_precision(case: Case) -> None:
    """The numbers are float32 arrays in the state, where the algorithm alone compiles them in from double precision."""
    algorithm = case.factory(**case.variants()[1])
    params = case.fit(PARAMS)
    assert_close(by_optax(to_optax(algorithm), params)[0], by_ours(algorithm, params)[0])


WRAPPERS = ["chain", "partition", "masked", "multi_steps", "apply_if_finite"]
MORE = ["named_chain", "flatten", "conditionally_transform"]


@every_case
@pytest.mark.parametrize("wrapper", [*WRAPPERS, *(pytest.param(each, marks=pytest.mark.thorough) for each in MORE)])
def test_in_wrappers(case: Case, wrapper: str) -> None:
    algorithm = case.factory(**case.variants()[1])
    tx, params = to_optax(algorithm), case.fit({"w": PARAMS["base"]["kernel"], "b": PARAMS["base"]["kernel"][0]})
    ours = by_ours(algorithm, params)[0]
    only = {"w": params["w"]}
    if wrapper == "chain":
        clipped = lambda params: optim.clip_grad_norm(jax.grad(loss)(params), 0.5)[0]  # noqa: E731
        theirs = by_optax(optax.chain(optax.clip_by_global_norm(0.5), tx), params)[0]
        ours = by_ours(algorithm, params, gradient=clipped)[0]
    elif wrapper == "named_chain":
        theirs = by_optax(optax.named_chain(("ours", tx), ("nothing", optax.identity())), params)[0]
    elif wrapper == "partition":
        both = getattr(optax, "partition", optax.multi_transform)
        theirs = by_optax(both({"ours": tx, "none": optax.set_to_zero()}, {"w": "ours", "b": "none"}), params)[0]
        ours = {**params, **by_ours(algorithm, only)[0]}
    elif wrapper == "masked":
        theirs = by_optax(optax.masked(tx, {"w": True, "b": False}), params)[0]
        theirs, ours = theirs["w"], by_ours(algorithm, only)[0]["w"]
    elif wrapper == "multi_steps":
        multi = optax.MultiSteps(tx, every_k_schedule=2)
        theirs = by_optax(multi, params, 2 * STEPS)[0]
    elif wrapper == "apply_if_finite":
        theirs = by_optax(optax.apply_if_finite(tx, 3), params)[0]
    elif wrapper == "flatten":
        if case.matrices or case.reduced_slots:
            pytest.skip("whose updates depend on the shape")
        theirs = by_optax(optax.flatten(tx), params)[0]
    else:
        theirs = by_optax(optax.conditionally_transform(tx, lambda step: step >= 0), params)[0]
    assert_close(theirs, ours, 2e-4)


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    tx = optax.apply_if_finite(to_optax(F.adam(lr=0.1)), 3)
    params, state = {"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)})
    updates, state = jax.jit(tx.update)({"w": jnp.array([1.0, jnp.nan])}, state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert state.inner_state.inner_state.step == 0


@pytest.mark.parametrize("make", [F.adamw, F.muon], ids=["adamw", "muon"])
def test_it_drives_an_nnx_optimizer(make: Any) -> None:
    def built() -> Any:
        return nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))

    x = jnp.array([[1.0, -2.0, 0.5]])

    def loss_fn(model: Any) -> Any:
        return jnp.sum((model(x) - 1.0) ** 2)

    @nnx.jit
    def train_step(model: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return value

    rtol = 1e-2 if make is F.muon else 1e-5  # products in bfloat16
    model, twin = built(), built()
    optimizer = nnx.Optimizer(model, to_optax(make(lr=0.1)), wrt=nnx.Param)
    ours = {"adamw": optim.AdamW, "muon": optim.Muon}[make.__name__](twin, lr=0.1)
    for _ in range(STEPS):
        value = train_step(model, optimizer)
        np.testing.assert_allclose(value, ours.step(loss_fn), rtol=rtol)
    assert_close(model.kernel[...], twin.kernel[...], rtol)
    optimizer.opt_state.hyperparams["lr"].set_value(jnp.array(0.0))
    optimizer.opt_state.hyperparams["weight_decay"].set_value(jnp.array(0.0))
    before = model.kernel[...]
    train_step(model, optimizer)
    np.testing.assert_array_equal(model.kernel[...], before)


def test_it_drives_a_train_state() -> None:
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=to_optax(F.adamw(lr=0.1)))

    @jax.jit
    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    assert_close(state.params, by_ours(F.adamw(lr=0.1), PARAMS)[0])
    halved = state.opt_state._replace(hyperparams={**state.opt_state.hyperparams, "lr": jnp.array(0.0)})
    halved.hyperparams["weight_decay"] = jnp.array(0.0)
    still = step(state.replace(opt_state=halved))
    chex.assert_trees_all_equal(still.params, state.params)


# --- Numbers in the state -------------------------------------------------------------------------------------------


def test_what_is_in_the_state() -> None:
    state = to_optax(F.adamw(lr=0.1)).init(PARAMS)
    assert sorted(state.hyperparams) == ["betas", "eps", "lr", "weight_decay"]
    for leaf in jax.tree.leaves(state.hyperparams):
        assert (leaf.dtype, leaf.shape, leaf.weak_type) == (jnp.float32, (), False)
    np.testing.assert_allclose(state.hyperparams["betas"], (0.9, 0.999))
    # A momentum of zero has no buffer, so it is compiled in; a decay of zero can be set.
    assert sorted(to_optax(F.sgd(lr=0.1)).init(PARAMS).hyperparams) == ["dampening", "lr", "weight_decay"]
    assert "momentum" in to_optax(F.sgd(lr=0.1, momentum=0.9)).init(PARAMS).hyperparams
    matrices = {"w": jnp.eye(2)}
    assert "ns_coefficients" in to_optax(F.muon()).init(matrices).hyperparams
    assert "ns_coefficients" not in to_optax(F.muon(ns_coefficients="quintic")).init(matrices).hyperparams


@every_case
def test_each_number_can_be_set_and_compiles_nothing(case: Case, compilations: Any) -> None:
    """As if the algorithm had been made with it."""
    options = case.variants()[1]
    tx, params = to_optax(case.factory(**options)), case.fit(PARAMS)
    update = jax.jit(tx.update)
    state = tx.init(params)
    _, state = update(params, state, params)
    grads = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    update(grads, state, params)
    for name in set(case.numeric) & state.hyperparams.keys():
        if case.refused(case.optimizer.definition.defaults(**{**options, name: case.other[name]})):
            continue
        value = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), case.other[name])
        replaced = state._replace(hyperparams={**state.hyperparams, name: value})
        before = compilations()
        updates, after = update(grads, replaced, params)
        assert compilations() == before, name
        chex.assert_trees_all_equal(after.hyperparams, replaced.hyperparams)
        ours = case.factory(**{**options, name: value})
        new, _ = jax.jit(ours.update)(params, grads, state.inner_state)
        assert_close(optax.apply_updates(params, updates), new, 1e-4)


def test_setting_a_number_in_a_chain() -> None:
    tx = optax.chain(optax.clip(1.0), to_optax(F.sgd(lr=0.5)))
    state = tx.init(PARAMS)
    assert optax.tree_utils.tree_get(state, "lr") == 0.5
    state = optax.tree_utils.tree_set(state, lr=0.0)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    chex.assert_trees_all_equal(optax.apply_updates(PARAMS, updates), PARAMS)


def test_schedules_stay_schedules() -> None:
    rate = schedules.linear(0.4, total_iters=4, start_factor=0.25)
    params, state = by_optax(to_optax(F.sgd(lr=rate)), PARAMS)
    assert_close(params, by_ours(F.sgd(lr=rate), PARAMS)[0])
    np.testing.assert_allclose(state.hyperparams["lr"], rate(STEPS - 1))  # of the last update, as in inject_hyperparams
    injected = optax.inject_hyperparams(optax.sgd)(rate)
    np.testing.assert_allclose(by_optax(injected, PARAMS)[1].hyperparams["learning_rate"], state.hyperparams["lr"])
    np.testing.assert_allclose(to_optax(F.sgd(lr=rate)).init(PARAMS).hyperparams["lr"], rate(0))
    twice = state._replace(hyperparams={**state.hyperparams, "lr": jnp.array(7.0)})
    tx = to_optax(F.sgd(lr=rate))
    chex.assert_trees_all_equal(tx.update(PARAMS, twice, PARAMS)[0], tx.update(PARAMS, state, PARAMS)[0])


def test_trees_of_numbers() -> None:
    algorithm = F.adam(lr={"base": 0.1, "head": lambda count: 0.2}, betas=(0.8, 0.9))
    tx = to_optax(algorithm)
    state = tx.init(PARAMS)
    np.testing.assert_allclose([state.hyperparams["lr"]["base"], state.hyperparams["lr"]["head"]], [0.1, 0.2])
    assert_close(by_optax(tx, PARAMS)[0], by_ours(algorithm, PARAMS)[0])
    state.hyperparams["lr"]["base"] = 0.0
    updates, state = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(updates["base"]["kernel"], 0)
    assert float(jnp.abs(updates["head"])) > 0.1
    assert state.hyperparams["lr"]["base"].dtype == jnp.float32


def test_numbers_of_another_structure_are_refused() -> None:
    tx = to_optax(F.sgd(lr=0.1))
    state = tx.init(PARAMS)
    for hyperparams in ({"lr": 0.1}, {**state.hyperparams, "rate": 1.0}, None):
        with pytest.raises(ValueError, match=r"hyperparams of the state must have the keys \['dampening', 'lr'"):
            tx.update(PARAMS, state._replace(hyperparams=hyperparams), PARAMS)
    tree = to_optax(F.sgd(lr={"base": 0.1, "head": 0.2}))
    state = tree.init(PARAMS)
    with pytest.raises(ValueError, match=r"hyperparams\['lr'\] of the state has another structure"):
        tree.update(PARAMS, state._replace(hyperparams={**state.hyperparams, "lr": {"base": 0.1}}), PARAMS)


def test_a_partition() -> None:
    algorithm = F.partition(
        {"muon": F.muon(lr=0.02, ns_dtype=None), "adamw": F.adamw(lr=0.1)},
        lambda name, value: "muon" if value.ndim == 2 else "adamw",
    )
    tx = to_optax(algorithm)
    params, state = by_optax(tx, PARAMS)
    assert_close(params, by_ours(algorithm, PARAMS)[0], 1e-4)
    np.testing.assert_allclose(state.hyperparams["muon"]["lr"], 0.02)
    state.hyperparams["muon"]["lr"] = jnp.array(0.0)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(updates["base"]["kernel"], 0)
    assert float(jnp.abs(updates["head"])) > 0
    updates, _ = tx.update(PARAMS, state, PARAMS, adamw={"lr": 0.0})
    np.testing.assert_array_equal(updates["head"], 0)


def test_lbfgs() -> None:
    algorithm = F.lbfgs(line_search_fn="strong_wolfe", max_iter=3)
    params, state = by_optax(to_optax(algorithm), PARAMS, 2, value_fn=loss)
    ours, own = PARAMS, algorithm.init(PARAMS)
    for _ in range(2):
        ours, own = algorithm.update(ours, None, own, loss_fn=loss)
    assert_close(params, ours, 1e-4)
    assert state.inner_state.n_iter == own.n_iter
    with pytest.raises(TypeError, match=r"LBFGS evaluates the loss itself.*value_fn=loss_fn"):
        by_optax(to_optax(algorithm), PARAMS, 1)


def test_lbfgs_in_an_nnx_optimizer() -> None:
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    x, y = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jnp.array([[1.0], [2.0], [3.5]])
    optimizer = nnx.Optimizer(model, to_optax(F.lbfgs(line_search_fn="strong_wolfe")), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any) -> Any:
        graphdef, state = nnx.split(model)
        loss_fn = lambda state: jnp.mean((nnx.merge(graphdef, state)(x) - y) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss_fn)(state)
        optimizer.update(model, grads, value_fn=loss_fn)
        return value

    for _ in range(2):
        train_step(model, optimizer)
    assert train_step(model, optimizer) < 1e-8


# --- Updates --------------------------------------------------------------------------------------------------------


def old_new_and_sum(dtype: str, grad_dtype: str) -> tuple[Any, Any, Any]:
    """A parameter, what ours makes of it, and what has been added up; of one program, or rounding differs."""
    algorithm = F.adamw(lr=0.05)
    tx = to_optax(algorithm)
    old = jnp.asarray(np.random.default_rng(0).normal(size=20_000), dtype)
    grads = jnp.asarray(np.random.default_rng(1).normal(size=20_000), grad_dtype)

    @jax.jit
    def both(old: Any, grads: Any, state: Any) -> Any:
        new, _ = algorithm.update(old, grads, state.inner_state, **state.hyperparams)
        return new, tx.update(grads, state, old)[0]

    new, updates = both(old, grads, tx.init(old))
    assert updates.dtype == grad_dtype
    return old, new, optax.apply_updates(old, updates)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_add_up_to_our_parameters(dtype: str) -> None:
    """Exactly, where an element does not change by more than a factor of two; else to one unit in the last place."""
    old, new, got = (np.asarray(x, float) for x in old_new_and_sum(dtype, dtype))
    near = (old / new >= 0.5) & (old / new <= 2)
    np.testing.assert_array_equal(got[near], new[near])
    assert 0 < np.mean(got != new) < 0.02
    assert np.all(np.abs(got - new) <= np.maximum(np.abs(old), np.abs(new)) * float(jnp.finfo(dtype).eps))


def test_updates_of_wider_gradients_are_exact() -> None:
    """bfloat16 parameters with float32 gradients have float32 updates, which hold all digits."""
    _, new, got = old_new_and_sum("bfloat16", "float32")
    np.testing.assert_array_equal(got, new)


def test_what_does_not_change_stays_to_the_bit() -> None:
    old = {"w": jnp.array([jnp.inf, -jnp.inf, 0.0, -0.0, 1.0]), "frozen": jnp.ones(2)}
    tx = to_optax(F.sgd(lr=0.1))
    updates, _ = tx.update({"w": jnp.zeros(5), "frozen": None}, tx.init(old), old)
    new = optax.apply_updates(old, updates)
    assert np.asarray(new["w"]).tobytes() == np.asarray(old["w"]).tobytes()
    np.testing.assert_array_equal(new["frozen"], old["frozen"])


def test_complex_gradients_are_those_of_optax() -> None:
    """Which wants the conjugate of what ``jax.grad`` returns."""
    params = {"w": jnp.array([1.0 + 2.0j, -0.5j])}

    def squares(params: Any) -> Any:
        return jnp.sum(jnp.abs(params["w"] - 1j) ** 2)

    raw = jax.grad(squares)(params)
    conjugate = jax.tree.map(jnp.conj, raw)
    for ours, theirs in ((F.sgd(lr=0.1), optax.sgd(0.1)),):
        updates, _ = to_optax(ours).update(conjugate, to_optax(ours).init(params), params)
        expected, _ = theirs.update(conjugate, theirs.init(params), params)
        assert_close(updates, expected)
        new, _ = from_optax(theirs).update(params, raw, from_optax(theirs).init(params))
        assert_close(new, ours.update(params, raw, ours.init(params))[0])
    optimizer = optim.FromOptax(params, optax.sgd(0.1))
    first = optimizer.step(squares)
    assert squares(optimizer.params) < first


# --- Arguments, errors, data ----------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    tx = to_optax(F.adam())
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"Adam needs the parameters.*update\(grads, state, params\)"):
        tx.update(PARAMS, state)
    with pytest.raises(TypeError, match="state must be the ToOptaxState that init returns, got AdamState"):
        tx.update(PARAMS, state.inner_state, PARAMS)
    with pytest.raises(TypeError, match=r"takes an algorithm of optim\.functional.*got <class"):
        to_optax(optim.Adam)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gradients do not have the structure of the parameters"):
        tx.update({"other": jnp.ones(1)}, state, PARAMS)
    with pytest.raises(TypeError, match=r"tx must be an optax transformation.*call it, as in adam\(1e-3\)"):
        from_optax(optax.adam)
    with pytest.raises(TypeError, match=r"tx must be an optax transformation, with init and update, got 0\.1"):
        from_optax(0.1)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        from_optax(optax.adam(0.1), lr=-1)


def test_without_optax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is needed until one of these is called, and then it says what to install."""
    monkeypatch.setitem(sys.modules, "optax", None)
    for call in (
        lambda: to_optax(F.adam()),
        lambda: from_optax(optax.adam(0.1)).update(PARAMS, PARAMS, from_optax(optax.adam(0.1)).init(PARAMS)),
        lambda: optim.FromOptax(PARAMS, optax.adam(0.1)).step(loss),
    ):
        with pytest.raises(ImportError, match=r"optax, which is not installed: pip install 'optimjax\[interop\]'"):
            call()


def test_extra_arguments() -> None:
    """Those that are ours count for a call; others are for other members of a chain."""
    tx = to_optax(F.sgd(lr=0.5))
    state = tx.init(PARAMS)
    updates, after = tx.update(PARAMS, state, PARAMS, lr=0.0, value=jnp.array(3.0), other="x")
    chex.assert_trees_all_equal(optax.apply_updates(PARAMS, updates), PARAMS)
    assert after.hyperparams["lr"] == 0.5


def test_arguments_of_a_transformation() -> None:
    sgd = from_optax(optax.trace(0.9))
    with pytest.raises(TypeError, match="does not take the arguments 'learning_rate', 'value'"):
        sgd.update(PARAMS, PARAMS, sgd.init(PARAMS), value=1.0, learning_rate=0.1)
    half = from_optax(optax.sgd(1.0), lr={"base": 0.5, "head": lambda count: 0.1 * (count + 1)})
    params, _ = half.update(PARAMS, PARAMS, half.init(PARAMS))
    np.testing.assert_allclose(params["base"]["bias"], 0.5 * PARAMS["base"]["bias"])
    np.testing.assert_allclose(params["head"], 0.9 * PARAMS["head"])
    params, _ = half.update(PARAMS, PARAMS, half.init(PARAMS), lr=1.0)
    np.testing.assert_allclose(params["head"], 0)


def test_gradients_that_do_not_fit_a_transformation() -> None:
    adam = from_optax(optax.adam(0.1))
    state = adam.init(PARAMS)
    missing = {**PARAMS, "head": None}
    with pytest.raises(ValueError, match=r"'head': no gradient.*requires_grad=False"):
        adam.update(PARAMS, missing, state)
    with pytest.raises(TypeError, match=r"the order is update\(params, grads, state\)"):
        adam.update(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match=r"state must be the FromOptaxState\('step', 'tx'\)"):
        adam.update(PARAMS, PARAMS, state.tx)
    with pytest.raises(ValueError, match=r"gradient of 'head' has shape \(2,\)"):
        adam.update(PARAMS, {**PARAMS, "head": jnp.ones(2)}, state)


def test_as_values() -> None:
    tx = optax.adam(0.1)
    assert from_optax(tx) == from_optax(tx)
    assert hash(from_optax(tx)) == hash(from_optax(tx))
    assert from_optax(tx) != from_optax(tx, lr=0.5)
    assert from_optax(tx) != from_optax(optax.adam(0.1))
    assert repr(from_optax(tx)) == f"from_optax({tx!r})"
    assert repr(from_optax(tx, lr=0.5)) == f"from_optax({tx!r}, lr=0.5)"
    algorithm = F.adamw(lr=0.1)
    assert from_optax(to_optax(algorithm)) is algorithm


def test_states_are_data() -> None:
    for one in (to_optax(F.adam()), from_optax(optax.adam(0.1))):
        state = one.init(PARAMS)
        again = pickle.loads(pickle.dumps(state))
        assert type(again) is type(state)
        chex.assert_trees_all_equal(again, state)


def test_a_compiled_update_can_be_exported() -> None:
    tx, params = to_optax(F.adam(lr=0.1)), {"w": jnp.ones(2)}
    state = tx.init(params)
    written = jax.export.export(jax.jit(tx.update))(params, state, params).serialize()
    updates, after = jax.export.deserialize(written).call(params, state, params)
    chex.assert_trees_all_close((updates, after), tx.update(params, state, params), rtol=1e-6)
    assert type(after) is type(state)


def test_in_scan_vmap_and_grad() -> None:
    tx = to_optax(F.adam(lr=0.1))

    def run(scale: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: scale * p, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (PARAMS, tx.init(PARAMS)), length=3)[0][0]["head"]

    values = jax.vmap(run)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(values[0], jax.jit(run)(1.0), rtol=1e-6)
    assert jnp.isfinite(jax.grad(run)(1.0))
