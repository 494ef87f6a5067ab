"""Groups with an ``algorithm`` of their own: one optimizer does bit for bit what one for each part would do."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx
from jax.experimental.sparse import BCOO

import optimjax as optim
from optimjax.rule import LearningRate, Rule

HIDDEN = {"w": jnp.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]])}
REST = {"b": jnp.array([0.1, -0.2, 0.3])}


def by_gradients(optimizer: Any, grads: Any) -> None:
    optimizer.step(grads)


def by_backward(optimizer: Any, grads: Any) -> None:
    optimizer.zero_grad()
    for group, tree in zip(optimizer.param_groups, grads if isinstance(grads, list) else [grads], strict=True):
        for parameter, grad in zip(group["params"], jax.tree.leaves(tree), strict=True):
            parameter.grad = grad
    optimizer.step()


def grads_like(params: Any, step: int) -> Any:
    return jax.tree.map(lambda p: (jnp.cos(p * (step + 1)) / (1 + step)).astype(p.dtype), params)


def mixed(hidden: Any = HIDDEN, rest: Any = REST, **options: Any) -> Any:
    """Muon for the matrix, AdamW for the rest."""
    return optim.AdamW(
        [{"params": hidden, "algorithm": optim.Muon, "lr": 0.02, "momentum": 0.9, **options}, {"params": rest}], lr=3e-3
    )


def loss_fn(params: Any, x: Any) -> Any:
    hidden, rest = params
    return jnp.mean((jnp.tanh(x @ hidden["w"]) + rest["b"][None] - 0.5) ** 2)


X = jnp.array([[1.0, -2.0], [0.5, 0.3], [0.0, 1.0]])


def assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- The same as apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [by_gradients, by_backward])
@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=str)
def test_each_group_moves_as_by_its_own_optimizer(case: Case, step: Callable[..., None]) -> None:
    options = case.variants()[1]
    theirs = case.fit({"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([3.0, 0.0])})
    together = optim.RMSprop([{"params": theirs, "algorithm": case.optimizer, **options}, {"params": REST}], lr=0.01)
    apart = [case.optimizer(theirs, **options), optim.RMSprop(REST, lr=0.01)]
    for count in range(4):
        grads = [grads_like(theirs, count), grads_like(REST, count)]
        step(together, grads)
        for optimizer, part in zip(apart, grads, strict=True):
            step(optimizer, part)
    assert_equal(together.params, [optimizer.params for optimizer in apart])
    kept = [entries for optimizer in apart for entries in optimizer.state_dict()["state"].values()]
    assert_equal([*together.state_dict()["state"].values()], kept)


@pytest.mark.parametrize("donate", [False, True])
def test_a_loss_is_one_program_and_the_same_numbers(donate: bool, x64: None) -> None:
    hidden, rest, x = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (HIDDEN, REST, X))
    one, other = mixed(hidden, rest, ns_dtype="float64"), mixed(hidden, rest, ns_dtype="float64")
    one.donate = donate
    for group in one.param_groups:
        for parameter in group["params"]:
            parameter.value = jnp.copy(parameter.value)
    for _ in range(4):
        loss = one.step(loss_fn, x)
        other.zero_grad()
        np.testing.assert_allclose(loss, other.backward(loss_fn, x), rtol=1e-12)
        other.step()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), one.params, other.params)
    assert len(one._stepper.planner.plan.structure.buckets) == 2


def test_parameters_may_be_in_any_order() -> None:
    """The groups lie across the order in which a module has its parameters."""
    net = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    twin = nnx.clone(net)
    rules = [{"params": "*.kernel", "algorithm": "Muon", "lr": 0.02, "matrix_axes": ((-1,), (-2,))}]
    together = optim.AdamW(optim.group_parameters(net, rules), lr=3e-3)
    kernels = [p for name, p in optim.named_parameters(twin) if name.endswith("kernel")]
    biases = [p for name, p in optim.named_parameters(twin) if name.endswith("bias")]
    apart = optim.Muon(kernels, lr=0.02, matrix_axes=((-1,), (-2,))), optim.AdamW(biases, lr=3e-3)
    loss = lambda net, x: jnp.mean(net(x) ** 2)  # noqa: E731
    for _ in range(3):
        together.step(loss, X)
        for optimizer in apart:
            optimizer.zero_grad()
            optimizer.backward(loss, twin, X)
        for optimizer in apart:
            optimizer.step()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        nnx.state(net, nnx.Param),
        nnx.state(twin, nnx.Param),
    )


def test_missing_and_sparse_gradients() -> None:
    table = jnp.ones((6, 2))
    sparse = BCOO((jnp.ones((2, 2)), jnp.array([[1], [4]])), shape=table.shape)
    together = optim.SGD([{"params": {"t": table}, "algorithm": "SparseAdam", "lr": 0.1}, {"params": REST}], lr=0.1)
    apart = optim.SparseAdam({"t": table}, lr=0.1), optim.SGD(REST, lr=0.1)
    for grads in ([{"t": sparse}, {"b": None}], [{"t": None}, REST], [{"t": sparse}, REST]):
        together.step(grads)
        for optimizer, part in zip(apart, grads, strict=True):
            optimizer.step(part)
    assert_equal(together.params, [optimizer.params for optimizer in apart])
    with pytest.raises(RuntimeError, match=r"SparseAdam does not support dense gradients.*'t'"):
        together.step([{"t": table}, REST])


# --- Options --------------------------------------------------------------------------------------------------------


def test_a_group_takes_the_defaults_of_its_algorithm() -> None:
    optimizer = optim.AdamW([{"params": HIDDEN, "algorithm": "Muon"}, {"params": REST}], lr=0.5, weight_decay=0.7)
    first, second = optimizer.param_groups
    expected = optim.Muon(HIDDEN).param_groups[0]
    assert {**first, "params": None, "param_names": None} == {
        **expected, "params": None, "param_names": None, "algorithm": optim.Muon,
    }  # fmt: skip
    assert (second["lr"], second["weight_decay"]) == (0.5, 0.7)
    assert "algorithm" not in second


def test_the_class_of_the_optimizer_itself_takes_its_defaults_too() -> None:
    optimizer = optim.AdamW([{"params": HIDDEN, "algorithm": optim.AdamW}, {"params": REST}], lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]


class Slots(NamedTuple):
    pass


class Rate(NamedTuple):
    lr: Any


class SignSGD(optim.Optimizer):
    rule = Rule(
        Slots,
        lambda param, hyper, flags: Slots(),
        lambda step, hyper: Rate(hyper.lr),
        lambda param, grad, slots, scalars, flags: (param - scalars.lr * jnp.sign(grad), slots),
        counts_steps=False,
    )

    def __init__(self, params: Any, lr: LearningRate):  # without a default
        super().__init__(params, dict(lr=lr))


class Extended(optim.SGD):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class PlainStep(optim.Optimizer):
    def __init__(self, params: Any, lr: LearningRate = 0.1):
        super().__init__(params, dict(lr=lr))

    def step(self) -> None:
        pass


def test_an_algorithm_written_elsewhere() -> None:
    optimizer = optim.SGD([{"params": REST, "algorithm": SignSGD, "lr": 0.5}, {"params": HIDDEN}], lr=0.0)
    optimizer.step([{"b": jnp.array([3.0, -4.0, 0.0])}, HIDDEN])
    np.testing.assert_allclose(optimizer.params[0]["b"], [-0.4, 0.3, 0.3])
    twin = optim.SGD([{"params": REST, "algorithm": SignSGD, "lr": 0.1}, {"params": HIDDEN}], lr=0.0)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="'lr'"):
        optim.SGD([{"params": REST, "algorithm": SignSGD}])


def test_a_class_that_extends_step_may_have_groups_of_other_algorithms() -> None:
    optimizer = Extended([{"params": HIDDEN, "algorithm": "Muon"}, {"params": REST}], lr=0.1)
    optimizer.step([HIDDEN, REST])
    assert set(optimizer.state_dict()["state"]) == {0}


@pytest.mark.parametrize(
    ("cls", "group", "error", "message"),
    [
        (optim.AdamW, {"algorithm": "Moun"}, ValueError, r"algorithm of param_groups\[1\].*'Moun'.*'Muon'\?"),
        (optim.AdamW, {"algorithm": optim.functional.muon()}, TypeError, r"algorithm of param_groups\[1\] must be"),
        (optim.AdamW, {"algorithm": int}, TypeError, r"algorithm of param_groups\[1\] must be"),
        (optim.AdamW, {"algorithm": optim.LBFGS}, ValueError, r"LBFGS has a step of its own.*param_groups\[1\]"),
        (optim.AdamW, {"algorithm": Extended}, ValueError, r"Extended has a step of its own"),
        (PlainStep, {"algorithm": "SGD"}, ValueError, r"PlainStep has a step of its own"),
        (optim.AdamW, {"algorithm": "Muon", "betas": (0.9, 0.9)}, TypeError, r"'betas' of param_groups\[1\] is an opt"),
        (optim.AdamW, {"algorithm": "Muon", "momentun": 0.9}, TypeError, r"did you mean 'momentum'\? Muon knows"),
        (optim.AdamW, {"algorithm": "Muon", "lr": -1.0}, ValueError, "Learning rate should be >= 0 but is: -1"),
        (optim.AdamW, {"algorithm": "Muon", "params": [jnp.ones(3)]}, ValueError, "Muon only supports 2D parameters"),
        (optim.AdamW, {"algorithm": "Muon", "params": [jnp.ones((2, 2), complex)]}, RuntimeError, "complex"),
    ],
)
def test_mixtures_that_are_refused_change_nothing(cls: Any, group: Any, error: Any, message: str) -> None:
    optimizer = cls([{"params": [jnp.ones((2, 2))]}])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [jnp.ones((2, 3))], **group})
    assert len(optimizer.param_groups) == 1
    assert not optimizer.state
    assert len(jax.tree.leaves(optimizer.params)) == 1


@pytest.mark.parametrize("cls", [optim.Adagrad, optim.AdamW])
@pytest.mark.parametrize("kind", ["cyclic", "one cycle"])
def test_momentum_is_cycled_where_an_algorithm_has_it(cls: Any, kind: str) -> None:
    groups = [
        {"params": HIDDEN, "algorithm": "Muon"},
        {"params": REST},
        {"params": jnp.ones(2), "algorithm": "Adagrad"},
    ]
    optimizer = cls(groups)
    if kind == "cyclic":
        scheduler = optim.lr_scheduler.CyclicLR(
            optimizer, 0.1, 1.0, step_size_up=2, base_momentum=0.7, max_momentum=0.9
        )
    else:
        scheduler = optim.lr_scheduler.OneCycleLR(
            optimizer, 1.0, 7, pct_start=2 / 7, base_momentum=0.7, max_momentum=0.9, anneal_strategy="linear"
        )
    assert optimizer.param_groups[0]["momentum"] == 0.9
    optimizer.step([HIDDEN, REST, jnp.ones(2)])
    scheduler.step()
    muon, own, adagrad = optimizer.param_groups
    assert muon["momentum"] < 0.9
    assert "momentum" not in own
    assert "momentum" not in adagrad
    assert own.get("betas", (muon["momentum"],))[0] == muon["momentum"]
    alone = optim.Adagrad(HIDDEN)
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
        type(scheduler)(alone, *((0.1, 1.0) if kind == "cyclic" else (1.0, 7)))


def test_an_algorithm_that_was_edited_is_refused_until_it_is_put_back() -> None:
    optimizer = optim.AdamW([{"params": HIDDEN, "algorithm": "Muon"}, {"params": REST}])
    group, before = optimizer.param_groups[0], jax.tree.map(np.array, optimizer.params)
    group["algorithm"] = "SGD"
    assert "algorithm: SGD" in repr(optimizer)
    assert "SGD" in optimizer._repr_html_()
    for call in (
        lambda: optimizer.step([HIDDEN, REST]),
        lambda: optimizer.algorithm,
        lambda: optimizer.functional_state(),
    ):
        with pytest.raises(ValueError, match="'algorithm' of a group must be an optimizer class, got 'SGD'"):
            call()
    chex.assert_trees_all_equal(optimizer.params, before)
    group["algorithm"] = optim.Muon
    optimizer.step([HIDDEN, REST])


def test_a_group_of_another_algorithm_can_be_added_in_the_middle_of_a_run() -> None:
    optimizer, alone = optim.AdamW([{"params": REST}], lr=0.1), optim.AdamW(REST, lr=0.1)
    optimizer.step([REST])
    optimizer.add_param_group({"params": HIDDEN, "algorithm": "Muon", "lr": 0.02})
    alone.step(REST)
    muon = optim.Muon(HIDDEN, lr=0.02)
    for _ in range(2):
        optimizer.step([REST, HIDDEN])
        alone.step(REST)
        muon.step(HIDDEN)
    assert_equal(optimizer.params, [alone.params, muon.params])


def test_edits_and_schedulers_compile_nothing(compilations: Callable[[], int]) -> None:
    optimizer = mixed()
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(loss_fn, X)
    optimizer.step(loss_fn, X)
    before = compilations()
    for count in range(3):
        optimizer.param_groups[0]["momentum"] = 0.8 + count / 100
        optimizer.param_groups[1]["betas"] = (0.8, 0.99)
        optimizer.step(loss_fn, X)
        scheduler.step()
    assert compilations() == before
    np.testing.assert_allclose([group["lr"] for group in optimizer.param_groups], [0.02 / 8, 3e-3 / 8])


def test_a_cycle_of_the_momentum_writes_what_each_group_has() -> None:
    optimizer = mixed()
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.003], total_steps=10)
    optimizer.step(loss_fn, X)
    scheduler.step()
    first, second = optimizer.param_groups
    assert first["momentum"] == second["betas"][0] < 0.95
    assert "betas" not in first
    assert "momentum" not in second


def test_a_group_that_is_given_another_algorithm_by_hand_starts_again() -> None:
    """With equal flags: what one algorithm keeps must not be taken for what the other keeps."""
    optimizer = optim.SGD([{"params": REST, "algorithm": "Adamax"}, {"params": HIDDEN}], lr=0.1)
    optimizer.step([REST, HIDDEN])
    group = optimizer.param_groups[0]
    options = optim.RAdam(REST).param_groups[0]
    group.update({name: value for name, value in options.items() if name not in ("params", "param_names")})
    group["algorithm"] = optim.RAdam
    twin = optim.RAdam({"b": optimizer.params[0]["b"]})
    optimizer.step([REST, HIDDEN])
    twin.step(REST)
    assert_equal(optimizer.params[0], twin.params)


# --- State dicts and copies -----------------------------------------------------------------------------------------


def test_resuming_is_bit_for_bit() -> None:
    optimizer = mixed()
    for _ in range(3):
        optimizer.step(loss_fn, X)
    saved = optimizer.state_dict()
    assert [group.get("algorithm") for group in saved["param_groups"]] == ["Muon", None]
    twin = mixed(*optimizer.params, momentum=0.5)
    twin.load_state_dict(pickle.loads(pickle.dumps(saved)))
    assert twin.param_groups[0]["algorithm"] is optim.Muon
    for each in (optimizer, twin, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        each.step(loss_fn, X)
        each.step(loss_fn, X)
        assert_equal(each.params, optimizer.params)
        assert_equal(each.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=str)
def test_a_group_of_every_algorithm_loads_what_it_saved(case: Case) -> None:
    """Also of one that sets an option by itself, which its constructor does not take."""
    kinds = {"params": HIDDEN, "algorithm": case.optimizer, **case.ours(case.base)}
    source, other = (optim.SGD([kinds, {"params": REST}], lr=0.1) for _ in range(2))
    source.step([HIDDEN, REST])
    other.load_state_dict(source.state_dict())
    assert other.state_dict()["param_groups"] == source.state_dict()["param_groups"]
    source.step([HIDDEN, REST])
    other.load_state_dict(source.state_dict())
    assert_equal(other.state_dict()["state"], source.state_dict()["state"])


def test_a_file_keeps_the_names_of_algorithms(tmp_path: Any) -> None:
    optimizer = mixed()
    optimizer.step(loss_fn, X)
    optim.save(tmp_path / "state.safetensors", optimizer.state_dict())
    twin = mixed()
    twin.load_state_dict(optim.load(tmp_path / "state.safetensors"))
    assert_equal(twin.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("saved", ["AdamW", "Muon in the other", "nothing"])
def test_state_of_another_algorithm_is_refused(saved: str) -> None:
    others = {
        "AdamW": [{"params": HIDDEN, "algorithm": "Adam"}, {"params": REST}],
        "Muon in the other": [{"params": HIDDEN}, {"params": {"b": jnp.ones((1, 3))}, "algorithm": "Muon"}],
        "nothing": [{"params": HIDDEN}, {"params": REST}],
    }
    state = optim.AdamW(others[saved]).state_dict()
    optimizer = mixed()
    optimizer.step(loss_fn, X)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[0\] of Adam.?, which here is updated by Muon"):
        optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict()["state"], before["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_not_strict_options_come_from_the_group_that_has_the_parameters() -> None:
    def group(name: str, blocks: Any, lr: float) -> dict[str, Any]:
        return {"params": {name: jnp.ones((4, 4))}, "algorithm": "Muon", "blocks": blocks, "lr": lr}

    saved = optim.AdamW([group("a", 2, 0.5), group("w", None, 0.1), {"params": REST, "lr": 0.3}]).state_dict()
    optimizer = optim.AdamW([group("w", 4, 0.2), {"params": REST}])
    keys = optimizer.load_state_dict(saved, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], ["a"])
    first, last = optimizer.param_groups
    assert (first["lr"], last["lr"]) == (0.1, 0.3)
    assert first["blocks"] == 4  # which says how the parameters of this group fall apart
    optimizer = optim.AdamW([group("new", 4, 0.2), {"params": REST}])
    optimizer.load_state_dict(saved, strict=False)
    assert optimizer.param_groups[0]["lr"] == 0.5  # of the group in the same place, because no other has its parameters


def test_a_parameter_that_goes_to_another_algorithm_begins_again() -> None:
    two = {"v": jnp.eye(2), "w": jnp.ones((2, 2))}
    optimizer = optim.AdamW([{"params": two, "algorithm": "Muon"}, {"params": REST}])
    grads = [two, REST]
    optimizer.step(grads)
    muon, adamw = optimizer.param_groups
    for key in ("params", "param_names"):
        adamw[key].append(muon[key].pop())
    moved, before = adamw["params"][-1], np.array(adamw["params"][-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 'w' has 'momentum_buffer' of Muon, .* updated by AdamW"):
            optimizer.step(grads)
    np.testing.assert_array_equal(before, moved)
    del optimizer.state[moved]
    optimizer.step(grads)
    assert sorted(optimizer.state[moved]) == ["exp_avg", "exp_avg_sq", "step"]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(grads)


@pytest.mark.parametrize("name", ["algoritm", "Algorithm", "optimizer"])
def test_a_misspelt_algorithm_is_not_an_entry_of_ones_own(name: str) -> None:
    with pytest.raises(TypeError, match=rf"unknown option '{name}' of param_groups\[0\]: did you mean 'algorithm'"):
        optim.AdamW([{"params": HIDDEN, name: optim.Muon}, {"params": REST}])


def test_an_optimizer_is_not_an_algorithm() -> None:
    with pytest.raises(TypeError, match=r"algorithm of param_groups\[0\] must be the class Muon itself"):
        optim.AdamW([{"params": HIDDEN, "algorithm": optim.Muon(HIDDEN)}, {"params": REST}])


@pytest.mark.parametrize("name", ["Step", "_Mine", "Lambda"])
def test_any_class_name_makes_a_label(name: str) -> None:
    own = type(name, (optim.SGD,), {"__module__": __name__})
    optimizer = optim.AdamW([{"params": HIDDEN, "algorithm": own}, {"params": REST}])
    params, state = optimizer.functional_state()
    params, state = optimizer.algorithm.update(params, [HIDDEN, REST], state)
    optimizer.load_functional_state(params, state)
    chex.assert_trees_all_equal(optimizer.params[0]["w"], 0.999 * HIDDEN["w"])


def test_a_functional_form_of_frozen_parameters_alone_is_refused() -> None:
    optimizer = mixed()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad = False
    with pytest.raises(ValueError, match="all parameters are frozen"):
        optimizer.functional_state()


def test_not_strict_what_has_moved_to_another_algorithm_is_reported() -> None:
    named = [
        ("w", optim.Parameter(HIDDEN["w"])),
        ("v", optim.Parameter(HIDDEN["w"])),
        ("b", optim.Parameter(REST["b"])),
    ]
    old = optim.AdamW([{"params": named[:2], "algorithm": "Muon"}, {"params": named[2:]}])
    for _, parameter in named:
        parameter.grad = parameter.value
    old.step()
    new = optim.AdamW([{"params": named[:1], "algorithm": "Muon"}, {"params": named[1:]}])
    keys = new.load_state_dict(old.state_dict(), strict=False)
    assert keys == (["v"], ["v"])
    assert [set(new.state[p]) for _, p in named] == [{"momentum_buffer"}, set(), {"step", "exp_avg", "exp_avg_sq"}]


def test_hooks_see_one_step() -> None:
    optimizer, seen = mixed(), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.step(loss_fn, X)
    assert seen == ["before", "after"]


def test_shown() -> None:
    optimizer = mixed()
    assert "    algorithm: Muon\n" in repr(optimizer)
    assert "<th>algorithm</th>" in optimizer._repr_html_()
    assert "<td>Muon</td>" in optimizer._repr_html_()


# --- The functional form --------------------------------------------------------------------------------------------


def test_leaving_and_coming_back() -> None:
    optimizer, twin = mixed(), mixed()
    optimizer.step(loss_fn, X)
    both, (params, state) = optimizer.algorithm, optimizer.functional_state()
    assert state._fields == ("step", "muon", "adamw")
    assert jax.tree.structure(state) == jax.tree.structure(both.init(params))

    def one(carry: Any, _: Any) -> Any:
        params, state = carry
        return both.update(params, jax.grad(loss_fn)(params, X), state), None

    (params, state), _ = jax.lax.scan(one, (params, state), length=3)
    optimizer.load_functional_state(params, state)
    for _ in range(4):
        twin.step(loss_fn, X)
    for each in (optimizer, twin):
        each.step(loss_fn, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), optimizer.params, twin.params)
    kept = [each.state_dict()["state"] for each in (optimizer, twin)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *kept)


def test_groups_that_compile_in_something_else_are_parts_of_their_own() -> None:
    other = {"v": jnp.ones((2, 2))}
    optimizer = mixed()
    optimizer.add_param_group({"params": other, "algorithm": "Muon", "nesterov": False})
    optimizer.step([HIDDEN, REST, other])
    params, state = optimizer.functional_state()
    assert state._fields == ("step", "muon", "adamw", "muon_2")
    new, state = optimizer.algorithm.update(params, [HIDDEN, REST, other], state)
    optimizer.step([HIDDEN, REST, other])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), optimizer.params, new)


def test_frozen_parameters_stay_behind() -> None:
    optimizer = mixed()
    optimizer.param_groups[1]["params"][0].requires_grad = False
    params, state = optimizer.functional_state()
    assert params == [{"w": params[0]["w"]}, {"b": None}]
    assert state._fields == ("step", "muon")
    optimizer.load_functional_state(*optimizer.algorithm.update(params, params, state))


def test_what_does_not_fit_changes_nothing() -> None:
    optimizer = mixed()
    optimizer.step(loss_fn, X)
    before = optimizer.state_dict()["state"]
    params, state = optimizer.functional_state()
    wide = state._replace(muon=state.muon._replace(momentum_buffer=[{"w": jnp.ones((3, 3))}, {"b": None}]))
    with pytest.raises(ValueError, match=r"'state\.muon\.momentum_buffer\.0\.w' has shape"):
        optimizer.load_functional_state(params, wide)
    assert_equal(optimizer.state_dict()["state"], before)
