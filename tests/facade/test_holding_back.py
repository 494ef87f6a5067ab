"""``max_grad_norm`` and ``skip_nonfinite``: values, counts, what waits, what compiles, copies, refusals."""

import copy
import math
import pickle
import re
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case

import optimjax as optim
from optimjax import functional as F
from optimjax._engine.watch import AHEAD, Tally

GOOD = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0, 12.0]])}  # of norm 13
BAD = {"a": jnp.array([3.0, math.nan]), "b": jnp.array([[0.0, 12.0]])}
START = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([[0.5, 2.0]])}


def product(params: Any, grads: Any) -> Any:
    return sum(jnp.sum(p * g) for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True))


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.takes_loss], ids=str)
def test_what_is_held_back_by_nothing_is_the_same(case: Case) -> None:
    """To each bit, except where XLA, given another program, contracts a product and a sum into one operation."""
    start, grads = case.fit(START), case.fit(GOOD)
    options = case.ours({**case.base, **case.full})
    plain, held = case.optimizer(start, **options), case.optimizer(start, **options)
    held.max_grad_norm, held.skip_nonfinite = math.inf, True
    for step in range(12):  # more than may be ahead
        scaled = jax.tree.map(lambda g, step=step: g * (1 + step), grads)
        plain.step(scaled)
        held.step(scaled)
        np.testing.assert_allclose(held.grad_norm, 13 * (1 + step), rtol=1e-6)
    last_bit = 8 * np.finfo(np.float32).eps
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=last_bit, atol=last_bit)  # noqa: E731
    jax.tree.map(close, held.params, plain.params)
    jax.tree.map(close, held.state_dict()["state"], plain.state_dict()["state"])


def test_the_norm_before_clipping() -> None:
    optimizer = optim.SGD(START, lr=1.0, max_grad_norm=1.3)
    assert optimizer.grad_norm is None
    optimizer.step(GOOD)
    assert optimizer.grad_norm == 13
    np.testing.assert_allclose(optimizer.params["a"], START["a"] - GOOD["a"] / 10, rtol=1e-6)
    optimizer.max_grad_norm = None
    optimizer.step(GOOD)
    assert optimizer.grad_norm is None
    equal(optimizer.skipped, 0)


def test_gradients_that_are_finite_and_have_no_finite_norm_count() -> None:
    large = {"a": jnp.array([1e30, 1.0]), "b": GOOD["b"]}
    optimizer = optim.SGD(START, lr=1e-30, skip_nonfinite=True)
    optimizer.step(large)
    assert optimizer.grad_norm == math.inf
    assert optimizer.skipped == 0
    np.testing.assert_allclose(optimizer.params["a"], [0.0, -1.0], atol=1e-6)


def test_a_loss_that_is_not_finite_changes_no_parameter_and_still_returns() -> None:
    optimizer = optim.Adam(START, lr=0.1, skip_nonfinite=True)
    loss, aux = optimizer.step(lambda p, g: (product(p, g), "aux" if False else 1.0), BAD, has_aux=True)
    assert math.isnan(loss)
    assert aux == 1
    equal(optimizer.params, START)
    assert optimizer.step(product, GOOD, micro_batches=1) == product(START, GOOD)
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_missing_and_frozen_gradients() -> None:
    optimizer = optim.Adam(START, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step({"a": GOOD["a"], "b": None})
    assert optimizer.grad_norm == 5
    optimizer.param_groups[0]["params"][0].requires_grad = False
    optimizer.step(GOOD)
    assert optimizer.grad_norm == 12
    optimizer.step({"a": None, "b": None})
    assert optimizer.grad_norm == 0
    assert [entry["step"] for entry in optimizer.state_dict()["state"].values()] == [1, 1]


@pytest.mark.parametrize("donate", [False, True], ids=["copying", "in place"])
def test_patterns_of_gradients_with_skipped_steps_between(donate: bool) -> None:
    """Each parameter counts its own updates, whichever steps were skipped while it was among those updated."""
    rng = np.random.default_rng(0)
    params = [jnp.full(2, float(i)) for i in range(4)]
    held, plain = optim.Adam(params, lr=0.1, skip_nonfinite=True), optim.Adam(params, lr=0.1)
    held.donate = plain.donate = donate
    for parameter in (*held.param_groups[0]["params"], *plain.param_groups[0]["params"]):
        parameter.value = jnp.copy(parameter.value)
    counts, skipped = [0] * 4, 0
    for _ in range(40):
        present, bad = rng.integers(0, 2, 4), rng.random() < 0.3
        grads = [jnp.asarray(rng.normal(size=2), jnp.float32) if one else None for one in present]
        if bad and any(present):
            held.step([None if g is None else g.at[0].set(math.inf) for g in grads])
            skipped += 1
        else:
            held.step(grads)
            plain.step(grads)
            counts = [count + one for count, one in zip(counts, present, strict=True)]
    equal(held.params, plain.params)
    state = held.state_dict()["state"]
    assert [state[i]["step"] for i in range(4)] == counts
    assert held.skipped == skipped > 5


def test_the_first_update_may_come_after_skipped_steps() -> None:
    """SGD keeps no count: whether there is a buffer says whether there was an update."""
    options = dict(lr=0.1, momentum=0.9, dampening=0.5)
    held, plain = optim.SGD(START, **options, skip_nonfinite=True), optim.SGD(START, **options)
    held.step(BAD)
    assert all(not entry for entry in held.state_dict()["state"].values())
    again = optim.SGD(START, **options)
    again.load_state_dict(held.state_dict())
    for _ in range(3):
        for optimizer in (held, plain, again):
            optimizer.step(GOOD)
    equal(held.params, plain.params)
    equal(again.params, plain.params)


def test_modules() -> None:
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    optimizer = optim.AdamW(model, lr=0.1, skip_nonfinite=True, max_grad_norm=1.0)
    optimizer.step(lambda model, x: jnp.sum(model(x)[:, 0] ** 4), jnp.array([[1.0, math.nan], [2.0, 1.0]]))
    assert optimizer.skipped == 1
    equal(model.scale[...], jnp.ones(2))
    assert not np.array_equal(model.mean[...], jnp.zeros(2))  # what the loss did, as in PyTorch


class Halved(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.array([3.0, 4.0]))

    def __call__(self, x: Any) -> Any:
        self.kernel[...] = self.kernel / 2
        return jnp.sum(self.kernel * x)


def test_what_a_loss_writes_into_a_parameter_is_undone_with_the_step() -> None:
    model = Halved()
    optimizer = optim.SGD(model, lr=1.0, skip_nonfinite=True)
    optimizer.step(lambda model, x: model(x), jnp.array([1.0, math.inf]))
    equal(model.kernel[...], jnp.array([3.0, 4.0]))
    optimizer.step(lambda model, x: model(x), jnp.ones(2))
    equal(model.kernel[...], jnp.array([1.0, 1.5]))


@pytest.mark.parametrize("form", ["loss", "gradients"])
def test_several_algorithms_are_held_back_together(form: str) -> None:
    def make(**options: Any) -> Any:
        groups = [{"params": {"a": START["a"]}}, {"params": {"b": START["b"]}, "algorithm": optim.Muon, "lr": 0.1}]
        return optim.AdamW(groups, lr=0.1, **options)

    held, plain = make(max_grad_norm=1.0, skip_nonfinite=True), make()
    for given in (BAD, GOOD, GOOD, BAD, GOOD):
        grads = [{"a": given["a"]}, {"b": given["b"]}]
        held.step(grads) if form == "gradients" else held.step(product, grads)
        if given is GOOD:
            plain.step(jax.tree.map(lambda g: g / 13, grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), held.params, plain.params)
    assert held.skipped == 2
    params, state = held.functional_state()
    assert (state.step, state.skipped, state.adamw.step) == (3, 2, 3)
    algorithm = held.algorithm
    new, after = jax.jit(algorithm.update)(params, [{"a": BAD["a"]}, {"b": BAD["b"]}], state)
    equal((new, after._replace(skipped=2)), (params, state))
    assert after.skipped == 3


# --- Nothing waits, nothing compiles ---------------------------------------------------------------------------------


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of an array is read while fewer steps are on their way than the device may be ahead."""
    grads = [GOOD, BAD] * 3
    optimizer = optim.Adam(START, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    twin = optim.Adam(START, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step(product, GOOD)
    optimizer.step(GOOD)  # of which a plan is made, which may wait
    array = type(jnp.ones(()))
    monkeypatch.setattr("optimjax._engine.watch._has_run", lambda counts: False)

    def refuse(self: Any) -> Any:
        raise AssertionError("a value was read")

    with monkeypatch.context() as patch:
        patch.setattr(array, "_value", property(refuse))
        with pytest.raises(AssertionError, match="a value was read"):
            float(jnp.ones(()) + 1)
        for given in grads:
            optimizer.step(given)
            assert isinstance(optimizer.skipped, jax.Array)
            assert isinstance(optimizer.grad_norm, jax.Array)
    assert len(grads) < AHEAD
    for given in (GOOD, GOOD, *grads):  # as many steps of either form
        twin.step(given)
    equal(optimizer.params, twin.params)
    assert optimizer.skipped == 3
    assert optimizer.state_dict()["state"][0]["step"] == 5


def test_no_more_steps_than_the_device_may_be_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimjax._engine.watch._has_run", lambda counts: False)
    held, plain = optim.Adam(START, lr=0.1, skip_nonfinite=True), optim.Adam(START, lr=0.1)
    for step in range(3 * AHEAD):
        held.step(BAD if step % 3 == 1 else GOOD)
        if step % 3 != 1:
            plain.step(GOOD)
    assert len(held._watch.tally.pending) <= AHEAD + 1
    equal(held.params, plain.params)


def test_a_tally_never_forgets() -> None:
    tally = Tally()
    for step in range(30):
        tally = tally.settled().after(jnp.array(step % 4 != 0))
        assert tally.total == tally.array == step // 4 + 1


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("form", ["loss", "gradients"])
def test_values_compile_nothing(form: str, committed: bool, compilations: Any) -> None:
    start = jax.device_put(START, jax.devices()[0]) if committed else START
    optimizer = optim.Adam(start, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    step = (lambda g: optimizer.step(product, g)) if form == "loss" else optimizer.step
    for given in (GOOD, BAD, GOOD):
        step(given)
    optimizer._watch.tally.settled(0)
    step(GOOD)
    before = compilations()
    for limit in (0.5, 2, np.float32(3.0), math.inf, 0):
        optimizer.max_grad_norm = limit
        for given in (GOOD, BAD, GOOD):
            step(given)
    assert compilations() == before
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
    step(GOOD)
    assert optimizer.grad_norm is None


# --- Copies, saving, crossing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_alike(twin: Any) -> None:
    optimizer = optim.Adam(START, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    for given in (GOOD, BAD):
        optimizer.step(given)
    other = twin(optimizer)
    assert (other.max_grad_norm, other.skip_nonfinite, other.skipped) == (1.0, True, 1)
    for one in (optimizer, other):
        for given in (BAD, GOOD):
            one.step(given)
    equal(other.params, optimizer.params)
    assert other.skipped == optimizer.skipped == 2


def test_resuming_from_a_state_dict() -> None:
    def make(params: Any) -> Any:
        return optim.NAdam(params, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)

    optimizer = make(START)
    for given in (BAD, GOOD, BAD):
        optimizer.step(given)
    other = make(optimizer.params)
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        for given in (GOOD, BAD, GOOD):
            one.step(given)
    equal(other.params, optimizer.params)
    equal(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_crossing_takes_the_counts_along() -> None:
    optimizer = optim.Adam(START, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    for given in (GOOD, BAD, GOOD):
        optimizer.step(given)
    algorithm = optimizer.algorithm
    assert repr(algorithm) == "adam(lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)"
    params, state = optimizer.functional_state()
    assert (state.step, state.skipped) == (2, 1)
    for given in (BAD, GOOD):
        params, state = jax.jit(algorithm.update)(params, given, state)
    optimizer.load_functional_state(params, state)
    assert optimizer.skipped == 2
    optimizer.step(BAD)
    optimizer.step(GOOD)
    twin = optim.Adam(START, lr=0.1, max_grad_norm=1.0)
    for _ in range(4):
        twin.step(GOOD)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), optimizer.params, twin.params)
    assert optimizer.skipped == 3
    assert optimizer.state_dict()["state"][0]["step"] == 4


def test_in_a_trace_of_your_own() -> None:
    def train(params: Any, grads: Any) -> Any:
        optimizer = optim.Adam(params, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
        for given in grads:
            optimizer.step(given)
        return optimizer.params, optimizer.skipped, optimizer.state_dict()["state"][0]["step"]

    params, skipped, step = jax.jit(train)(START, [GOOD, BAD, GOOD])
    optimizer = optim.Adam(START, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    for given in (GOOD, BAD, GOOD):
        optimizer.step(given)
    assert (skipped, step) == (1, 2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, optimizer.params)


def test_in_a_trace_of_your_own_steps_after_a_skipped_one_must_be_alike() -> None:
    def train(params: Any, grads: Any) -> Any:
        optimizer = optim.Adam(params, lr=0.1, skip_nonfinite=True)
        optimizer.step(grads)
        optimizer.step({**grads, "b": None})
        return optimizer.params

    with pytest.raises(RuntimeError, match=r"must be of the same kind.* take optimizer.algorithm"):
        jax.jit(train)(START, GOOD)


# --- The functional core ----------------------------------------------------------------------------------------------


def test_functional_algorithms_with_options_are_values() -> None:
    one, other = F.adam(lr=0.1, max_grad_norm=1.0), F.adam(lr=0.1, max_grad_norm=1.0)
    assert one == other
    assert hash(one) == hash(other)
    assert one != F.adam(lr=0.1)
    assert one != F.adam(lr=0.1, max_grad_norm=2.0)
    assert pickle.loads(pickle.dumps(one)) == one
    assert repr(one) == "adam(lr=0.1, max_grad_norm=1.0)"


def test_functional_updates_under_transformations() -> None:
    algorithm = F.adam(lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), GOOD, BAD)
    state = algorithm.init(START)
    params, after = jax.vmap(algorithm.update, in_axes=(None, 0, None))(START, batch, state)
    assert after.skipped.tolist() == [0, 1]
    equal(jax.tree.map(lambda p: p[1], params), START)
    alone, _ = algorithm.update(START, GOOD, state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-6), params, alone)

    def after_one(limit: Any) -> Any:
        algorithm = F.sgd(lr=1.0, max_grad_norm=limit, skip_nonfinite=True)
        return algorithm.update(START, GOOD, algorithm.init(START))[0]["a"][0]

    np.testing.assert_allclose(jax.grad(after_one)(1.3), -3 / 13, rtol=1e-5)


def test_a_partition_takes_the_options_for_all_its_parameters() -> None:
    def label(name: str, value: Any) -> str:
        return "muon" if value.ndim == 2 else "adamw"

    parts = {"muon": F.muon(lr=0.1), "adamw": F.adamw(lr=0.1)}
    both = F.partition(parts, label, max_grad_norm=1.0, skip_nonfinite=True)
    state = both.init(START)
    assert state._fields == ("step", "skipped", "muon", "adamw")
    params, state = both.update(START, GOOD, state)
    plain = F.partition(parts, label)
    expected, _ = plain.update(START, jax.tree.map(lambda g: g / 13, GOOD), plain.init(START))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), params, expected)
    again, after = both.update(params, BAD, state)
    equal((again, after._replace(skipped=0)), (params, state))
    assert repr(both).endswith(", max_grad_norm=1.0, skip_nonfinite=True)")
    with pytest.raises(ValueError, match="max_grad_norm of label 'muon' is an option of the whole step"):
        F.partition({"muon": F.muon(lr=0.1, max_grad_norm=1.0)}, label)


def test_as_an_optax_transformation() -> None:
    tx = optim.interop.optax.to_optax(F.adam(lr=0.1, max_grad_norm=1.0, skip_nonfinite=True))
    state = tx.init(START)
    updates, after = tx.update(BAD, state, START)
    equal(updates, jax.tree.map(jnp.zeros_like, START))
    updates, _ = tx.update(GOOD, after, START)
    algorithm = F.adam(lr=0.1, max_grad_norm=1.0)
    expected, _ = algorithm.update(START, GOOD, algorithm.init(START))
    jax.tree.map(lambda u, p, e: np.testing.assert_allclose(p + u, e, rtol=1e-6), updates, START, expected)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "Invalid max_grad_norm: -1.0: it must be at least 0"),
        ({"max_grad_norm": math.nan}, ValueError, "Invalid max_grad_norm: nan"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number or a scalar array, and real, got '1'"),
        ({"max_grad_norm": jnp.ones(2)}, TypeError, "max_grad_norm must be a number or a scalar array"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite must be True or False, got 1"),
        ({"max_norm": 1.0}, TypeError, "unexpected keyword argument 'max_norm': did you mean 'max_grad_norm'?"),
        ({"momentun": 1.0}, TypeError, "unexpected keyword argument 'momentun'"),
    ],
)
def test_illegal_options(options: Any, error: type[Exception], message: str) -> None:
    for make in (lambda **given: optim.Adam(START, **given), F.adam):
        with pytest.raises(error, match=re.escape(message)):
            make(**options)
    (name,) = options
    if hasattr(optim.Adam, name):
        optimizer = optim.Adam(START, max_grad_norm=2.0)
        with pytest.raises(error, match=re.escape(message)):
            setattr(optimizer, name, options[name])
        assert (optimizer.max_grad_norm, optimizer.skip_nonfinite) == (2.0, False)


def test_what_adamw_sets_itself_is_no_argument_of_it() -> None:
    with pytest.raises(TypeError, match="AdamW got an unexpected keyword argument 'decoupled_weight_decay'"):
        optim.AdamW(START, decoupled_weight_decay=True)  # pyright: ignore[reportCallIssue]


def test_options_of_the_whole_optimizer_are_not_those_of_a_group() -> None:
    with pytest.raises(TypeError, match=r"'max_grad_norm' of param_groups\[0\] is an option of the whole optimizer"):
        optim.SGD([{"params": START, "max_grad_norm": 1.0}], lr=0.1)
    optimizer = optim.SGD({"a": START["a"]}, lr=0.1)
    group = {"params": {"b": START["b"]}, "skip_nonfinite": True, "algorithm": optim.Adam}
    with pytest.raises(TypeError, match=r"'skip_nonfinite' of param_groups\[1\] is an option of the whole optimizer"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_optimizers_that_cannot_be_held_back() -> None:
    optimizer = optim.LBFGS(START)
    with pytest.raises(ValueError, match="LBFGS takes no max_grad_norm: its line search needs the gradient"):
        optimizer.max_grad_norm = 1.0
    optimizer = optim.FromOptax(START, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"FromOptax takes no skip_nonfinite: .* optax.apply_if_finite"):
        optimizer.skip_nonfinite = True
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_grad_norm'"):
        F.lbfgs(max_grad_norm=1.0)  # pyright: ignore[reportCallIssue]


def test_a_class_of_ones_own_has_them_as_attributes() -> None:
    class Plain(optim.SGD):
        def __init__(self, params: Any):
            super().__init__(params, lr=1.0)

    optimizer = Plain(START)
    optimizer.max_grad_norm = 1.3
    optimizer.step(GOOD)
    np.testing.assert_allclose(optimizer.params["b"], START["b"] - GOOD["b"] / 10, rtol=1e-6)
