"""``optim.FromOptax``: a transformation of optax behind groups, schedulers, hooks and state dicts."""

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_cases
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optax_cases import PARAMS, X, loss

import optimjax as optim
from optimjax.interop.optax import from_optax, to_optax

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))


@pytest.fixture(autouse=True)
def standard_promotion(strict: None) -> Iterator[None]:
    """optax's own arithmetic relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def by_optax(tx: Any, params: Any, steps: int, loss: Any = loss, scale: Any = lambda updates, step: updates) -> Any:
    """The same loop by optax alone."""
    state = tx.init(params)

    @jax.jit
    def one(params: Any, state: Any, step: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, scale(updates, step)), state

    for step in range(steps):
        params, state = one(params, state, step)
    return params


def assert_close(ours: Any, theirs: Any) -> None:
    chex.assert_trees_all_close(ours, theirs, rtol=2e-6, atol=1e-7)


def plain(optimizer: Any) -> Any:
    """All that the optimizer has, as values."""
    return jax.tree.map(np.asarray, (optimizer.params, optimizer.state_dict()))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Forms of step --------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Any], Any]] = {
    "step(loss)": lambda optimizer: optimizer.step(loss, X),
    "step(grads)": lambda optimizer: optimizer.step(jax.grad(loss)(optimizer.params)),
    "backward": lambda optimizer: (optimizer.zero_grad(), optimizer.backward(loss, X), optimizer.step()),
    "closure": lambda optimizer: optimizer.step(lambda: (optimizer.zero_grad(), optimizer.backward(loss, X))[1]),
    "closure=": lambda optimizer: optimizer.step(
        closure=lambda: (optimizer.zero_grad(), optimizer.backward(loss, X))[1]
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("donate", [False, True])
def test_all_forms_of_step(form: str, donate: bool) -> None:
    optimizer = optim.FromOptax(jax.tree.map(jnp.copy, PARAMS), TX)
    optimizer.donate = donate
    for _ in range(4):
        FORMS[form](optimizer)
    assert_close(optimizer.params, by_optax(TX, PARAMS, 4))
    assert optimizer.state["optax"]["step"] == 4


def test_a_step_without_any_gradient_does_nothing() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step()
    assert_equal(optimizer.params, PARAMS)
    assert not optimizer.state


def test_a_new_rate_compiles_nothing(compilations: Any) -> None:
    for form in FORMS:
        optimizer = optim.FromOptax(PARAMS, TX)
        for _ in range(2):
            FORMS[form](optimizer)
        before = compilations()
        optimizer.param_groups[0]["lr"] = 0.3
        optimizer.state["optax"]["tx.1.0.count"] = jnp.int32(7)
        FORMS[form](optimizer)
        assert compilations() == before, form


KEEPING = ["schedule_free_adamw", "mechanize", "lbfgs", "snapshot", "apply_if_finite", "prodigy", "momo"]


@pytest.mark.parametrize("name", [name for name in KEEPING if name in optax_cases.transformations()])
@pytest.mark.parametrize("donate", [False, True])
def test_arrays_that_users_hold_stay(name: str, donate: bool) -> None:
    """Some transformations keep the parameters themselves in their state, which a step updates in place."""
    given = jax.tree.map(jnp.copy, PARAMS)
    optimizer = optim.FromOptax(given, optax_cases.made(name))
    optimizer.donate = donate
    held = []
    for _ in range(4):
        optimizer.step(loss, X)
        if not donate:
            held.append((optimizer.params, jax.tree.map(np.array, optimizer.params)))
        held.append((optimizer.functional_state()[1], jax.tree.map(np.array, optimizer.functional_state()[1])))
    for arrays, values in held:
        assert_equal(arrays, values)


@pytest.mark.parametrize("form", ["step(loss)", "step(grads)"])
def test_a_state_that_is_the_parameters(form: str) -> None:
    """It begins with them, and is then those before the step: the very arrays that users hold."""
    tx = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, params))
    given = jax.tree.map(jnp.copy, PARAMS)
    optimizer = optim.FromOptax(given, tx)
    held = [given]
    for _ in range(4):
        FORMS[form](optimizer)
        held.append(optimizer.params)
    assert len({float(params["b"][0]) for params in held}) == 5
    assert_equal(optimizer.functional_state()[1].tx, held[-2])


# --- Groups and schedulers ------------------------------------------------------------------------------------------


def test_the_rate_of_a_group_multiplies_its_updates() -> None:
    rules = [{"params": "base.*", "lr": 0.5}, {"params": "b", "lr": 2.0}]
    optimizer = optim.FromOptax(optim.group_parameters(PARAMS, rules), TX)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0]
    for _ in range(3):
        optimizer.step(loss, X)

    def scaled(updates: Any, _: Any) -> Any:
        return {"base": {"w": 0.5 * updates["base"]["w"]}, "b": 2 * updates["b"]}

    assert_close(optimizer.params, by_optax(TX, PARAMS, 3, scale=scaled))
    algorithm = optimizer.algorithm
    params, state = optimizer.functional_state()
    ours, _ = algorithm.update(params, jax.grad(loss)(params), state)
    optimizer.step(loss, X)
    assert_close(optimizer.params, ours)


def test_a_scheduler() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(4):
        optimizer.step(loss, X)
        scheduler.step()
    rate = optim.schedules.cosine_annealing(1.0, T_max=10)
    expected = by_optax(TX, PARAMS, 4, scale=lambda u, step: jax.tree.map(lambda x: rate(step) * x, u))
    assert_close(optimizer.params, expected)


def test_groups_in_a_list_are_a_list_for_optax() -> None:
    parts = [PARAMS["base"], [PARAMS["b"]]]
    seen = []

    def label(params: Any) -> Any:
        seen.append(jax.tree.structure(params))
        return [{"w": "fast"}, ["slow"]]

    tx = optax.multi_transform({"fast": optax.adam(0.1), "slow": optax.sgd(0.01)}, label)
    optimizer = optim.FromOptax([{"params": part} for part in parts], tx)

    def of_parts(parts: Any, x: Any = X) -> Any:
        return loss({"base": parts[0], "b": parts[1][0]}, x)

    for _ in range(3):
        optimizer.step(of_parts, X)
    assert set(seen) == {jax.tree.structure(parts)}
    assert_close(optimizer.params, by_optax(tx, parts, 3, of_parts))


@pytest.mark.parametrize("named", [False, True])
def test_parameters_are_a_list_or_a_dict_for_optax(named: bool) -> None:
    """Whatever the order of their names."""
    boxes = [optim.Parameter(PARAMS["base"]["w"]), optim.Parameter(PARAMS["b"])]
    optimizer = optim.FromOptax([("z", boxes[0]), ("a", boxes[1])] if named else boxes, TX)

    def of_boxes(params: Any, x: Any) -> Any:
        w, b = (params["z"], params["a"]) if named else params
        return loss({"base": {"w": w.value if hasattr(w, "value") else w}, "b": jnp.asarray(b)}, x)

    for _ in range(3):
        optimizer.step(of_boxes, X)
    expected = by_optax(TX, PARAMS, 3)
    assert_close([box.value for box in boxes], [expected["base"]["w"], expected["b"]])
    assert ("tx.1.0.mu.z" if named else "tx.1.0.mu.0") in optimizer.state["optax"]


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)  # first, or the gradient of a bias before it would be rounding alone
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(nnx.tanh(self.base(self.norm(x))))


def net_loss(net: Any, x: Any) -> Any:
    return jnp.mean((net(x) - 1.0) ** 2)


@pytest.mark.parametrize("how", ["module", "parameters", "backward"])
def test_a_module(how: str) -> None:
    """As ``nnx.Optimizer`` does it, statistics included."""
    ours, theirs = Net(), Net()
    reference = nnx.Optimizer(theirs, TX, wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(net_loss)(model, X))

    optimizer = optim.FromOptax(optim.parameters(ours) if how == "parameters" else ours, TX)
    for _ in range(3):
        train_step(theirs, reference)
        if how == "module":
            optimizer.step(net_loss, X)
        elif how == "parameters":
            optimizer.step(net_loss, ours, X)
        else:
            optimizer.zero_grad()
            optimizer.backward(net_loss, X)
            optimizer.step()
    assert_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    if how == "module":
        assert "tx.1.0.mu.base.kernel" in optimizer.state["optax"]


def test_parameters_in_groups_in_another_order_than_the_module() -> None:
    """Each by the rate of its own group, whichever way it is found."""
    model = Net()
    boxes = dict(optim.named_parameters(model))
    names = list(boxes)
    order = [*names[1::2], *names[::2]]
    groups = [{"params": [boxes[name]], "lr": 0.5 + index} for index, name in enumerate(order)]
    optimizer = optim.FromOptax(groups, optax.sgd(0.1))
    before = {name: box.value for name, box in boxes.items()}
    optimizer.backward(net_loss, model, X)
    grads = {name: box.grad for name, box in boxes.items()}
    optimizer.step(net_loss, model, X)
    expected = {name: before[name] - (0.5 + index) * 0.1 * grads[name] for index, name in enumerate(order)}
    assert_close({name: box.value for name, box in boxes.items()}, expected)


def test_what_a_loss_writes_into_a_parameter_is_kept() -> None:
    def writing(net: Any, x: Any) -> Any:
        loss = net_loss(net, x)
        net.head.bias.set_value(net.head.bias[...] + 1.0)
        return loss

    ours, theirs = Net(), Net()
    one, other = optim.FromOptax(ours, optax.sgd(0.1)), optim.SGD(theirs, lr=0.1)
    for optimizer in (one, other):
        for _ in range(2):
            optimizer.step(writing, X)
    assert_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    assert ours.head.bias[0] > 1.9


def test_frozen_parameters_are_none_for_optax() -> None:
    rules = [{"params": "b", "requires_grad": False}]
    optimizer = optim.FromOptax(optim.group_parameters(PARAMS, rules), TX)
    for _ in range(3):
        optimizer.step(loss, X)
    expected = by_optax(TX, {"base": PARAMS["base"], "b": None}, 3, lambda p: loss({**p, "b": PARAMS["b"]}))
    assert_close(optimizer.params, {**expected, "b": PARAMS["b"]})


def test_parameters_cannot_be_frozen_or_unfrozen_once_there_is_a_state() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    first = optimizer.param_groups[0]["params"][0]  # b
    first.requires_grad = False
    optimizer.step(loss, X)
    before = plain(optimizer)
    first.requires_grad = True
    with pytest.raises(ValueError, match=r"missing \['tx.1.0.mu.b', 'tx.1.0.nu.b'\].*trained when it was made"):
        optimizer.step(loss, X)
    first.requires_grad = False
    assert_equal(plain(optimizer), before)
    optimizer.step(loss, X)


def test_parameters_that_cannot_be_trained_are_refused() -> None:
    optimizer = optim.FromOptax([optim.Parameter(jnp.ones(2))], TX)
    own = optimizer.param_groups[0]["params"][0]
    own.requires_grad = False
    own.grad = jnp.ones(2)
    for call in (optimizer.step, optimizer.functional_state):
        with pytest.raises(ValueError, match="requires_grad=False: nothing would be trained"):
            call()
    tree = optim.FromOptax(PARAMS, TX)
    tree.param_groups[0]["params"].append(optim.Parameter(jnp.ones(2), name="more"))
    with pytest.raises(ValueError, match="'more' was put into param_groups by hand"):
        tree.step(jax.tree.map(jnp.ones_like, PARAMS))


def test_masks_and_labels_are_those_of_the_users_structure() -> None:
    tx = optax.chain(optax.masked(optax.add_decayed_weights(0.5), optax_cases.MASK), optax.sgd(0.1))
    optimizer = optim.FromOptax(PARAMS, tx)
    optimizer.step(jax.tree.map(jnp.zeros_like, PARAMS))
    assert_close(optimizer.params["base"]["w"], 0.95 * PARAMS["base"]["w"])
    assert_equal(optimizer.params["b"], PARAMS["b"])


# --- Arguments of the transformation --------------------------------------------------------------------------------


def test_extra_arguments() -> None:
    """A loss function gives them by itself; with gradients they are given."""
    tx = optax.polyak_sgd(max_learning_rate=0.5)
    by_loss, by_grads = (optim.FromOptax(PARAMS, tx) for _ in range(2))
    for _ in range(3):
        by_loss.step(loss, X)
        value, grads = jax.value_and_grad(loss)(by_grads.params)
        by_grads.step(grads, value=value)
    assert_close(by_loss.params, by_grads.params)
    value = by_grads.backward(loss, X)
    by_grads.step(value=value)
    by_loss.step(loss, X)
    assert_close(by_loss.params, by_grads.params)


def far(params: Any) -> Any:
    return jnp.sum((params["b"] - 3.0) ** 2) + loss(params)


@pytest.mark.parametrize(
    "tx",
    [optax.lbfgs(), to_optax(optim.functional.lbfgs(line_search_fn="strong_wolfe", max_iter=3))],
    ids=["optax", "ours"],
)
def test_a_line_search_evaluates_the_loss(tx: Any) -> None:
    optimizer = optim.FromOptax(PARAMS, tx)
    losses = [float(optimizer.step(far)) for _ in range(8)]
    assert losses[-1] < losses[0] / 50


def test_ours_in_a_chain() -> None:
    """As the class with clipping before it."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), to_optax(optim.functional.adamw(lr=0.05)))
    optimizer, ours = optim.FromOptax(PARAMS, tx), optim.AdamW(PARAMS, lr=0.05)
    for _ in range(3):
        optimizer.step(loss, X)
        grads, _ = optim.clip_grad_norm(jax.grad(loss)(ours.params), 0.1)
        ours.step(grads)
    chex.assert_trees_all_close(optimizer.params, ours.params, rtol=1e-4)
    optimizer.state["optax"]["tx.1.hyperparams.lr"] = 0.0
    before = optimizer.params
    optimizer.step(loss, X)
    assert_equal(optimizer.params, before)


def test_wrong_arguments() -> None:
    optimizer = optim.FromOptax(PARAMS, optax.trace(0.9))
    with pytest.raises(TypeError, match="does not take the arguments 'value'"):
        optimizer.step(PARAMS, value=1.0)
    optimizer = optim.FromOptax(PARAMS, optax.polyak_sgd())
    with pytest.raises(TypeError, match=r"\*args, value=\.\.\.\) and cannot be.*unexpected keyword argument 'value'"):
        optimizer.step(loss, X, value=1.0)
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        optim.FromOptax(PARAMS, optax.adam)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optim.FromOptax(PARAMS, TX, lr=-1)
    with pytest.raises(TypeError, match="unknown option 'Lr'"):
        optim.FromOptax([{"params": PARAMS, "Lr": 1.0}], TX)
    with pytest.raises(ValueError, match="FromOptax has a step of its own, so it cannot share"):
        optim.FromOptax([{"params": PARAMS, "algorithm": optim.SGD}], TX)
    with pytest.raises(ValueError, match="FromOptax has a step of its own, so it cannot share"):
        optim.SGD([{"params": PARAMS, "algorithm": optim.FromOptax}])


def test_a_missing_gradient_changes_nothing() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)
    before = plain(optimizer)
    with pytest.raises(ValueError, match="'b': no gradient"):
        optimizer.step({"base": PARAMS["base"], "b": None})
    optimizer.param_groups[0]["params"][0].grad = jnp.ones(2)
    with pytest.raises(ValueError, match=r"'base\.w': no gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match="gradients do not have the structure"):
        optimizer.step({"base": PARAMS["base"]})
    with pytest.raises(ValueError, match=r"gradient of 'b' has shape \(3,\)"):
        optimizer.step({"base": PARAMS["base"], "b": jnp.ones(3)})
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda params: 1 / 0)
    assert_equal(plain(optimizer), before)


def test_parameters_cannot_be_added_once_there_is_a_state() -> None:
    optimizer = optim.FromOptax([{"params": PARAMS}], TX)
    optimizer.add_param_group({"params": [jnp.ones(2)], "lr": 0.1})
    optimizer.step([PARAMS, [jnp.ones(2)]])
    with pytest.raises(ValueError, match="parameters cannot be added: the state of optax"):
        optimizer.add_param_group({"params": [jnp.ones(2)]})
    assert len(optimizer.param_groups) == 2


# --- State ----------------------------------------------------------------------------------------------------------


def test_what_is_kept() -> None:
    tx = optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.0)
    optimizer = optim.FromOptax(PARAMS, tx)
    optimizer.step(loss, X)
    saved = optimizer.state_dict()
    assert list(saved["state"]) == ["optax"]
    (group,) = saved["param_groups"]
    assert group == {"lr": 1.0, "params": [0, 1], "param_names": ["b", "base.w"], "algorithm": "FromOptax"}
    assert saved["state"]["optax"]["step"] == 1
    assert "tx.inner_state.0.mu.base.w" in saved["state"]["optax"]
    # The numbers of optax are arrays of the state, and may be replaced there.
    assert optimizer.state["optax"]["tx.hyperparams.learning_rate"] == jnp.float32(0.05)
    optimizer.state["optax"]["tx.hyperparams.learning_rate"] = 0.0
    before = optimizer.params
    optimizer.step(loss, X)
    assert_equal(optimizer.params, before)


NAMES = ["adamw", "lbfgs", "add_noise", "inject_hyperparams", "schedule_free_adamw", "apply_if_finite", "prodigy"]


def through_a_file(path: Path, state_dict: Any) -> Any:
    optim.save(path, state_dict)
    return optim.load(path)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "state_dict": lambda state_dict, path: state_dict,
    "pickle": lambda state_dict, path: pickle.loads(pickle.dumps(state_dict)),
    "save": lambda state_dict, path: (
        optim.save(path / "x.safetensors", state_dict),
        optim.load(path / "x.safetensors"),
    )[1],
    "deepcopy": lambda state_dict, path: copy.deepcopy(state_dict),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_same_to_the_bit(name: str, way: str, tmp_path: Path) -> None:
    tx = optax_cases.made(name)
    optimizer = optim.FromOptax(PARAMS, tx)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for _ in range(3):
        optimizer.step(loss, X)
        scheduler.step()
    resumed = optim.FromOptax(optimizer.params, tx)
    again = optim.lr_scheduler.StepLR(resumed, step_size=2, gamma=0.5)
    resumed.load_state_dict(WAYS[way](optimizer.state_dict(), tmp_path))
    again.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        for one, other in ((optimizer, scheduler), (resumed, again)):
            one.step(loss, X)
            other.step()
    a, b = optimizer.functional_state(), resumed.functional_state()
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    assert_equal(jax.tree.map(keys, a), jax.tree.map(keys, b))


def test_a_number_that_goes_with_any_dtype_does_so_after_loading(tmp_path: Path, compilations: Any) -> None:
    """A weakly typed one, which does not make float32 of what it meets."""

    def update(grads: Any, state: Any, params: Any) -> Any:
        return jax.tree.map(lambda grad: -state * grad, grads), state

    tx = optax.GradientTransformation(lambda params: jnp.asarray(0.3), update)
    params = jnp.asarray(np.random.default_rng(0).normal(size=100), "bfloat16")
    grads = jnp.asarray(np.random.default_rng(1).normal(size=100), "bfloat16")
    optimizer = optim.FromOptax(params, tx)
    optimizer.step(grads)
    resumed = optim.FromOptax(optimizer.params, tx)
    resumed.load_state_dict(through_a_file(tmp_path / "x.safetensors", optimizer.state_dict()))
    before = compilations()
    for one in (optimizer, resumed):  # of the first, the state was looked at
        one.step(grads)
    assert compilations() == before
    np.testing.assert_array_equal(optimizer.params, resumed.params)


def test_a_copy_goes_its_own_way() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)
    before = plain(optimizer)
    twin = copy.deepcopy(optimizer)
    twin.step(loss, X)
    assert_equal(plain(optimizer), before)
    optimizer.step(loss, X)
    assert_equal(plain(optimizer), plain(twin))


def test_a_snapshot_stays() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)
    saved = optimizer.state_dict()
    values = jax.tree.map(np.array, saved)
    optimizer.step(loss, X)
    assert_equal(saved, values)


def test_parameters_in_another_order_are_matched_by_name() -> None:
    values = [("w", PARAMS["base"]["w"]), ("b", PARAMS["b"])]

    def of(params: Any, x: Any) -> Any:
        return loss({"base": {"w": jnp.asarray(params["w"])}, "b": jnp.asarray(params["b"])}, x)

    first = optim.FromOptax([(name, optim.Parameter(value)) for name, value in values], TX)
    first.step(of, X)
    second = optim.FromOptax([(name, optim.Parameter(first.params[name])) for name, _ in reversed(values)], TX)
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.step(of, X)
    assert_equal(first.params, second.params)


def test_state_dicts_that_do_not_fit_change_nothing() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)
    before = plain(optimizer)
    saved = optimizer.state_dict()
    kept = saved["state"]["optax"]

    def other(**entries: Any) -> Any:
        return {**saved, "state": {"optax": {**kept, **entries}}}

    adam = optim.Adam(PARAMS)
    adam.step(loss, X)
    lion = optim.FromOptax(PARAMS, optax.lion(0.1))
    lion.step(loss, X)
    wider = optim.FromOptax({"base": {"w": jnp.ones((3, 4))}, "b": jnp.ones(2)}, TX)
    wider.step(jax.tree.map(jnp.ones_like, wider.params))
    wrong = [
        (adam.state_dict(), r"has 'exp_avg', which FromOptax does not keep"),
        (lion.state_dict(), r"loaded state 'optax' is not that of this transformation.*missing \['tx.1.0.count'"),
        (wider.state_dict(), r"loaded state 'optax': 'tx.1.0.mu.base.w' has shape \(3, 4\), expected \(3, 2\)"),
        (other(step=-1), r"loaded state 'optax': 'step' is -1"),
        (other(**{"tx.1.0.mu.b": "text"}), r"'tx.1.0.mu.b' is 'text', which cannot be loaded"),
        (other(**{"tx.1.0.count": jnp.ones(())}), r"'tx.1.0.count' is .* of another kind"),
        (other(more=1), r"unexpected \['more'\]"),
        ({**saved, "state": {"optax": 3}}, "loaded state 'optax' must be a dict, got int"),
    ]
    for state_dict, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        assert_equal(plain(optimizer), before)
    with pytest.raises(ValueError, match=r"param_groups\[0\] of FromOptax, which here is updated by Adam"):
        adam.load_state_dict(saved)
    key = optim.FromOptax(PARAMS, optax_cases.made("add_noise"))
    key.step(loss, X)
    bad = key.state_dict()
    bad["state"]["optax"]["tx.rng_key"] = np.ones(2, np.uint32)
    with pytest.raises(ValueError, match=r"'tx.rng_key' must be a random key"):
        key.load_state_dict(bad)


def test_an_edited_state_that_does_not_fit_changes_nothing() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)
    good = optimizer.state["optax"]["tx.1.0.mu.b"]
    optimizer.state["optax"]["tx.1.0.mu.b"] = jnp.ones(5)
    before = plain(optimizer)
    with pytest.raises(ValueError, match=r"state\['optax'\]: 'tx.1.0.mu.b' has shape \(5,\), expected \(2,\)"):
        optimizer.step(loss, X)
    assert_equal(plain(optimizer), before)
    optimizer.state["optax"]["tx.1.0.mu.b"] = good
    optimizer.step(loss, X)
    assert optimizer.state["optax"]["step"] == 2
    optimizer.state.clear()  # begins again
    optimizer.step(loss, X)
    assert optimizer.state["optax"]["step"] == 1


# --- The functional form --------------------------------------------------------------------------------------------


def test_a_loop_outside_the_facade_continues_the_run() -> None:
    stayed, crossed = (optim.FromOptax(PARAMS, TX, lr=0.5) for _ in range(2))
    assert crossed.algorithm == from_optax(TX, lr=0.5)
    for _ in range(7):
        stayed.step(loss, X)
    for _ in range(2):
        crossed.step(loss, X)
    algorithm = crossed.algorithm

    @jax.jit
    def loop(params: Any, state: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            params, state = carry
            return algorithm.update(params, jax.grad(loss)(params), state), None

        return jax.lax.scan(one, (params, state), length=3)[0]

    params, state = loop(*crossed.functional_state())
    held = jax.tree.map(np.array, (params, state))
    crossed.load_functional_state(params, state)
    for _ in range(2):
        crossed.step(loss, X)
    assert_equal((params, state), held)
    assert_close(crossed.params, stayed.params)
    assert crossed.state["optax"]["step"] == 7


def test_it_begins_outside_and_comes_back() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    params, state = optimizer.functional_state()
    assert state.step == 0
    for _ in range(2):
        params, state = optimizer.algorithm.update(params, jax.grad(loss)(params), state)
    optimizer.load_functional_state(params, state)
    optimizer.step(loss, X)
    assert_close(optimizer.params, by_optax(TX, PARAMS, 3))


def test_a_module_leaves_as_its_state() -> None:
    ours, stayed = Net(), Net()
    optimizer, other = optim.FromOptax(ours, TX), optim.FromOptax(stayed, TX)
    params, state = optimizer.functional_state()
    grads = nnx.grad(net_loss)(ours, X)
    optimizer.load_functional_state(*optimizer.algorithm.update(params, grads, state))
    other.step(net_loss, X)
    assert_close(nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(nnx.state(stayed, nnx.Param)))


def test_functional_states_that_do_not_fit_change_nothing() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)
    before = plain(optimizer)
    params, state = optimizer.functional_state()
    wrong = [
        ({"b": params["b"]}, state, "must have the structure"),
        ({**params, "b": jnp.ones(3)}, state, r"'params\.b' has shape"),
        (params, state.tx, "must have the structure"),
        (params, optim.functional.adam().init(PARAMS), "must have the structure"),
        (params, state._replace(tx=jax.tree.map(lambda x: x[..., None], state.tx)), "has shape and dtype"),
    ]
    for wrong_params, wrong_state, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.load_functional_state(wrong_params, wrong_state)
        assert_equal(plain(optimizer), before)


# --- Around it ------------------------------------------------------------------------------------------------------


def test_hooks_run_once() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((len(args), kwargs)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    optimizer.step(loss, X)
    assert seen == [(3, {}), "after"]


def test_inside_jit() -> None:
    """Made inside, it is at home there; made outside, it is refused."""

    @jax.jit
    def run(rate: Any) -> Any:
        optimizer = optim.FromOptax(PARAMS, TX, lr=rate)
        for _ in range(2):
            optimizer.step(loss, X)
        return optimizer.params

    assert_close(run(1.0), by_optax(TX, PARAMS, 2))
    optimizer = optim.FromOptax(PARAMS, TX)
    with pytest.raises(RuntimeError, match="was made outside"):
        jax.jit(lambda x: optimizer.step(loss, x))(X)


def test_a_loss_that_looks_at_the_state_or_raises() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    optimizer.step(loss, X)

    def looking(params: Any, x: Any) -> Any:
        assert optimizer.state["optax"]["step"] == 1
        return loss(params, x)

    optimizer.step(looking, X)
    assert optimizer.state["optax"]["step"] == 2
    assert_close(optimizer.params, by_optax(TX, PARAMS, 2))


def test_shown() -> None:
    optimizer = optim.FromOptax(PARAMS, TX)
    assert repr(optimizer) == "FromOptax (\nParameter Group 0\n    lr: 1.0\n)"
    optimizer.step(loss, X)
    assert "FromOptax" in optimizer._repr_html_()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind: str, compilations: Any) -> None:
    """Parameters and state stay where they are, and the second step compiles nothing."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType[kind],))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    params = {"w": place(jnp.full((64, 64), 0.01), "d"), "b": place(jnp.zeros(64))}

    def squares(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh((x @ params["w"].T if kind == "Auto" else x @ params["w"]) + params["b"] - 1.0) ** 2)

    with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
        optimizer, x = optim.FromOptax(params, TX), place(jnp.ones((16, 64)))
        optimizer.step(squares, x)
        before = compilations()
        for _ in range(2):
            optimizer.step(squares, x)
        assert compilations() == before
        state = optimizer.state["optax"]
        for name, given in params.items():  # which the compiler would spread, too
            for array in (optimizer.params[name], state[f"tx.1.0.mu.{name}"]):
                assert array.sharding.is_equivalent_to(given.sharding, given.ndim)
    alone = by_optax(TX, jax.tree.map(np.asarray, params), 3, lambda p: squares(p, jnp.ones((16, 64))))
    chex.assert_trees_all_close(jax.tree.map(np.asarray, optimizer.params), alone, rtol=1e-4)


def test_strict_promotion() -> None:
    """What optax relies on is not asked of the user."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        optimizer = optim.FromOptax(PARAMS, TX)
        for _ in range(2):
            optimizer.step({"base": {"w": jnp.ones((3, 2))}, "b": jnp.ones(2)})
    assert optimizer.state["optax"]["step"] == 2
