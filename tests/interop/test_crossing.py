"""A run can leave the class for the functional core, and come back."""

import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx

import optimjax as optim

SHAPES = {"base": {"kernel": (3, 2), "gain": (2, 2)}, "head": {"kernel": (2, 4)}}


def tree(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    make = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def state_of(optimizer: Any) -> Any:
    return jax.tree.map(np.asarray, optimizer.state_dict()["state"])


@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer.rule is not None], ids=str)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_loop_outside_the_facade_continues_the_run(case: Case, full: bool, steps: int) -> None:
    """Some steps inside, three outside under jit, some inside: as if all had been inside."""
    options = case.variants()[full]

    def step(optimizer: Any, index: int) -> None:
        optimizer.step(tree(10 + index))

    stayed, crossed = (case.optimizer(tree(), **options) for _ in range(2))
    for index in range(steps + 5):
        step(stayed, index)
    for index in range(steps):
        step(crossed, index)
    update = jax.jit(crossed.algorithm.update)
    params, state = crossed.functional_state()
    for index in range(steps, steps + 3):
        params, state = update(params, tree(10 + index), state)
    crossed.load_functional_state(params, state)
    held = jax.tree.map(np.array, (params, state))
    for index in range(steps + 3, steps + 5):
        step(crossed, index)
    jax.tree.map(np.testing.assert_array_equal, held, (params, state))  # what the user holds stays
    # Scalars are taken in float32 outside, in double precision inside.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)  # noqa: E731
    jax.tree.map(close, stayed.params, crossed.params)
    jax.tree.map(close, state_of(stayed), state_of(crossed))


def test_groups_become_trees_of_hyperparameters(x64: None) -> None:
    def make() -> Any:
        params = jax.tree.map(lambda x: x.astype(float), tree())
        rules = [{"params": "*.gain", "lr": 0.2, "betas": (0.5, 0.6)}, {"params": "head.*", "requires_grad": False}]
        return optim.Adam(optim.group_parameters(params, rules), lr=0.1)

    stayed, crossed = make(), make()
    grads = tree(5)
    params, state = crossed.functional_state()
    assert params["head"]["kernel"] is None
    algorithm = crossed.algorithm
    for _ in range(4):
        stayed.step(grads)
        params, state = algorithm.update(params, {**grads, "head": {"kernel": None}}, state)
    crossed.load_functional_state(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), stayed.params, crossed.params)
    assert crossed.params["head"]["kernel"] is not None


def test_a_module_leaves_as_its_state() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(model, lr=0.1, momentum=0.9)
    graphdef, _ = nnx.split(model)
    algorithm = optimizer.algorithm

    def loss(params: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, params)(jnp.ones((1, 2))) ** 2)

    def one(carry: Any, _: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        return algorithm.update(params, grads, state), value

    (params, state), losses = jax.lax.scan(one, optimizer.functional_state(), length=20)
    optimizer.load_functional_state(params, state)
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.kernel.get_value(), params["kernel"].get_value())
    later = optimizer.step(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2))
    assert later < losses[0]


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(2, 3, param_dtype=float, rngs=rngs)
        self.head = nnx.Linear(3, 1, param_dtype=float, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.base(x)))


X = np.random.default_rng(0).normal(size=(5, 2))


def net_loss(net: Any) -> Any:
    return jnp.mean((net(jnp.asarray(X)) - 1.0) ** 2)


def loop(optimizer: Any, net: Any, rates: Any) -> None:
    """Steps outside, one for each entry; an entry of ``rates`` is given as ``lr``, ``None`` is not."""
    algorithm, (graphdef, _) = optimizer.algorithm, nnx.split(net)

    @jax.jit
    def run(carry: Any, rates: Any) -> Any:
        def one(carry: Any, lr: Any) -> Any:
            grads = jax.grad(lambda params: net_loss(nnx.merge(graphdef, params)))(carry[0])
            return algorithm.update(carry[0], grads, carry[1], **({} if lr is None else {"lr": lr})), None

        return jax.lax.scan(one, carry, rates, length=None if jax.tree.leaves(rates) else 5)[0]

    optimizer.load_functional_state(*run(optimizer.functional_state(), rates))


def assert_same_run(stayed: Any, crossed: Any) -> None:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)  # noqa: E731
    jax.tree.map(close, nnx.state(stayed.params), nnx.state(crossed.params))
    jax.tree.map(close, state_of(stayed), state_of(crossed))


def test_a_module_with_groups_leaves_with_their_numbers(x64: None) -> None:
    def make() -> Any:
        rules = [{"params": "base.*", "lr": 0.05, "betas": (0.5, 0.6), "foreach": True}]
        return optim.AdamW(optim.group_parameters(Net(), rules), lr=0.1)

    stayed, crossed = make(), make()
    for step in range(13):
        stayed.param_groups[1]["lr"] = 0.1 if step < 6 else 0.02
        stayed.step(net_loss)
    crossed.step(net_loss)
    loop(crossed, crossed.params, None)
    crossed.param_groups[1]["lr"] = 0.02
    loop(crossed, crossed.params, None)  # the groups as they are now
    loop_of_two = nnx.State({"base": jnp.full(2, 0.05), "head": jnp.full(2, 0.02)})
    loop(crossed, crossed.params, loop_of_two)  # a prefix of the module's state
    assert_same_run(stayed, crossed)


@pytest.mark.parametrize("make", [optim.Adam, functools.partial(optim.SGD, momentum=0.9)], ids=["Adam", "SGD"])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("inside", ["schedule", "preview"])
def test_a_schedule_takes_the_place_of_a_scheduler(x64: None, make: Any, before: int, inside: str) -> None:
    """Also where PyTorch's state has no count of updates, and where the class has not done a step yet."""
    stayed, crossed = (make(Net(), lr=0.1) for _ in range(2))
    schedulers = [optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10) for optimizer in (stayed, crossed)]

    def step(index: int, times: int) -> None:
        for _ in range(times):
            (stayed, crossed)[index].step(net_loss)
            schedulers[index].step()

    step(0, before + 6)
    step(1, before)
    if inside == "schedule":
        rates = optim.schedules.cosine_annealing(0.1, T_max=10)(schedulers[1].last_epoch + jnp.arange(5))
    else:
        rates = jnp.asarray(optim.lr_scheduler.preview(schedulers[1], 5)[:, 0])
    loop(crossed, crossed.params, rates)
    for _ in range(5):
        schedulers[1].step()
    step(1, 1)
    np.testing.assert_allclose(*(scheduler.get_last_lr() for scheduler in schedulers), rtol=1e-12)
    assert_same_run(stayed, crossed)


def test_rates_that_are_tracers_go_along() -> None:
    def last(first: Any, second: Any) -> Any:
        optimizer = optim.SGD([{"params": [jnp.ones(1)], "lr": first}, {"params": [jnp.ones(1)], "lr": second}])
        (a, b), _ = optimizer.algorithm.update(optimizer.params, optimizer.params, optimizer.functional_state()[1])
        return (a[0] + b[0])[0]

    value, slopes = jax.jit(jax.value_and_grad(last, argnums=(0, 1)))(0.25, 0.5)
    np.testing.assert_allclose((value, *slopes), (1.25, -1, -1))


@pytest.mark.parametrize("named", [False, True])
def test_parameters_leave_as_a_list_or_a_dict(named: bool) -> None:
    boxes = [optim.Parameter(jnp.ones(2)), optim.Parameter(jnp.zeros(3))]
    optimizer = optim.AdamW([("a", boxes[0]), ("b", boxes[1])] if named else boxes, lr=0.1)
    params, state = optimizer.functional_state()
    assert isinstance(params, dict if named else list)
    params, state = optimizer.algorithm.update(params, jax.tree.map(jnp.ones_like, params), state)
    optimizer.load_functional_state(params, state)
    np.testing.assert_array_equal(boxes[0].value, jax.tree.leaves(params)[0])
    assert optimizer.state[boxes[1]]["step"] == 1


def test_a_list_of_groups_leaves_as_a_list() -> None:
    groups = [{"params": {"w": jnp.ones(2)}}, {"params": [jnp.ones(3)], "lr": 0.5, "momentum": 0.9}]
    optimizer = optim.SGD(groups, lr=0.1)
    params, state = optimizer.functional_state()
    params, state = optimizer.algorithm.update(params, jax.tree.map(jnp.ones_like, params), state)
    optimizer.load_functional_state(params, state)
    np.testing.assert_allclose(optimizer.params[0]["w"], 0.9)
    np.testing.assert_allclose(optimizer.params[1][0], 0.5)
    # The buffer of the group without momentum is none of PyTorch's state.
    assert [len(optimizer.state.get(group["params"][0], {})) for group in optimizer.param_groups] == [0, 1]


def test_the_schedule_of_a_group_goes_along() -> None:
    optimizer = optim.SGD([jnp.ones(1)], lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.25
    params, _ = optimizer.algorithm.update([jnp.ones(1)], [jnp.ones(1)], optimizer.functional_state()[1])
    np.testing.assert_array_equal(params[0], [0.75])


def test_what_has_no_functional_form_is_refused() -> None:
    boxes = [optim.Parameter(jnp.ones(2)) for _ in range(2)]
    uneven = optim.Adam(boxes)
    boxes[0].grad = jnp.ones(2)
    uneven.step()
    with pytest.raises(ValueError, match=r"different numbers of updates \(0, 1\)"):
        uneven.functional_state()
    mixed = optim.Adam([{"params": [jnp.ones(2)]}, {"params": [jnp.ones(2)], "amsgrad": True}])
    with pytest.raises(ValueError, match=r"one 'amsgrad' for all parameters, the groups have \[False, True\]"):
        mixed.algorithm  # noqa: B018
    joint = optim.LBFGS([jnp.ones(2)])
    with pytest.raises(NotImplementedError, match="LBFGS has no rule for one parameter"):
        joint.functional_state()
    with pytest.raises(NotImplementedError, match="LBFGS has no rule for one parameter"):
        joint.load_functional_state(joint.params, ())


def test_loading_what_does_not_fit_changes_nothing() -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    optimizer.step({"w": jnp.ones(2)})
    before = jax.tree.map(np.asarray, (optimizer.params, optimizer.state_dict()))
    params, state = optimizer.functional_state()
    wrong = [
        ({"v": params["w"]}, state, "must have the structure"),
        ({"w": jnp.ones(3)}, state, r"'params\.w' has shape and dtype \(\(3,\)"),
        (params, state._replace(exp_avg={"w": jnp.ones(3)}), r"'state\.exp_avg\.w' has shape"),
        (params, optim.functional.sgd().init(params), "must have the structure"),
        ({"w": jnp.ones(2, "bfloat16")}, state, "bfloat16"),
    ]
    for wrong_params, wrong_state, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.load_functional_state(wrong_params, wrong_state)
    after = jax.tree.map(np.asarray, (optimizer.params, optimizer.state_dict()))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def _scan(function: Any) -> Any:
    return lambda x: jax.lax.scan(lambda carry, _: (carry, function(x)), 0, length=2)


TRACED = {
    "jit": jax.jit,
    "grad": jax.grad,
    "vmap": lambda function: lambda x: jax.vmap(function)(x[None]),
    "scan": _scan,
    "eval_shape": lambda function: lambda x: jax.eval_shape(function, x),
}
USES = {
    "step(loss_fn)": lambda optimizer, x: optimizer.step(_loss, x),
    "step(grads)": lambda optimizer, x: optimizer.step(x * jnp.ones(3)),
    "backward": lambda optimizer, x: optimizer.backward(_loss, x),
    "step()": lambda optimizer, x: optimizer.step(),
    "zero_grad": lambda optimizer, x: optimizer.zero_grad(),
    "clip": lambda optimizer, x: optim.clip_grad_norm_(optimizer, x),
    "load_state_dict": lambda optimizer, x: optimizer.load_state_dict(jax.device_get(optimizer.state_dict())),
    "add_param_group": lambda optimizer, x: optimizer.add_param_group({"params": [np.ones(2)]}),
}


def _loss(params: Any, x: Any) -> Any:
    kernel = params.kernel[...] if isinstance(params, nnx.Module) else params
    return jnp.sum((kernel * x) ** 2)


@pytest.mark.parametrize("transform", TRACED)
@pytest.mark.parametrize(
    ("kind", "use"), [("tree", use) for use in USES] + [("module", "step(loss_fn)"), ("LBFGS", "step(loss_fn)")]
)
def test_an_optimizer_from_outside_is_not_left_with_tracers(kind: str, use: str, transform: str) -> None:
    """It raises before anything changes, and goes on as if nothing had been."""
    start = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0)) if kind == "module" else jnp.ones(3)
    optimizer = optim.LBFGS(start, max_iter=2) if kind == "LBFGS" else optim.Adam(start, lr=0.1)
    optimizer.step(_loss, 1.0)
    before = jax.tree.map(np.array, optimizer.state_dict())
    value = np.array(optimizer.param_groups[0]["params"][0].value)

    def function(x: Any) -> Any:
        USES[use](optimizer, x)
        return x

    with pytest.raises(RuntimeError, match=r"was made outside .*optimizer\.algorithm"):
        TRACED[transform](function)(jnp.array(1.0))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, optimizer.state_dict()), before)
    (box,) = optimizer.param_groups[0]["params"]
    np.testing.assert_array_equal(box.value, value)
    assert box.grad is None
    optimizer.step(_loss, 1.0)


@pytest.mark.parametrize("transform", TRACED)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_made_inside_is_at_home_there(transform: str, way: Any) -> None:
    optimizer = optim.Adam(jnp.ones(3), lr=0.1)
    optimizer.step(_loss, 1.0)
    results = []

    def function(x: Any) -> Any:
        twin = way(optimizer)
        loss = twin.step(_loss, x)
        results.append(loss)
        return loss

    TRACED[transform](function)(jnp.array(1.0))
    assert results
    assert not isinstance(optimizer.params, jax.core.Tracer)
    optimizer.step(_loss, 1.0)


def test_hooks_do_not_run_for_a_step_that_is_refused() -> None:
    class Own(optim.Optimizer):
        def step(self) -> None:
            self.param_groups[0]["params"][0].value *= 2

    for optimizer in (optim.SGD([jnp.ones(2)]), Own([jnp.ones(2)], {})):
        optimizer.register_step_pre_hook(lambda *_: pytest.fail("it ran"))
        with pytest.raises(RuntimeError, match="was made outside"):
            jax.eval_shape(optimizer.step)
        np.testing.assert_array_equal(optimizer.params[0], [1, 1])


def test_groups_with_and_without_slots_leave_twice() -> None:
    """What has no slots says nothing of how many updates there were."""
    optimizer = optim.SGD(
        [{"params": jnp.ones(2)}, {"params": jnp.ones(2), "momentum": 0.9}, {"params": jnp.ones(()), "lr": 0.2}], lr=0.1
    )
    stayed = copy.deepcopy(optimizer)
    grads = [jnp.ones(2), jnp.ones(2), jnp.ones(())]
    for _ in range(3):
        stayed.step(grads)
        params, state = optimizer.functional_state()
        optimizer.load_functional_state(*optimizer.algorithm.update(params, grads, state))
    jax.tree.map(np.testing.assert_allclose, optimizer.params, stayed.params)
    assert optimizer.state_dict()["state"].keys() == stayed.state_dict()["state"].keys() == {1}


@pytest.mark.parametrize("kind", ["tree", "module", "boxes"])
def test_a_frozen_parameter_stays_behind(kind: str) -> None:
    """Also one that was frozen for a while, so that it has done fewer updates."""
    if kind == "module":
        given: Any = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    else:
        given = {"bias": jnp.ones(1), "kernel": jnp.ones((3, 1))}
    given = optim.named_parameters(given) if kind == "boxes" else given
    optimizer = optim.AdamW(given, lr=0.1)
    frozen, trained = optimizer.param_groups[0]["params"]
    frozen.requires_grad = False
    before = np.array(frozen.value)

    def ones(tree: Any) -> Any:
        return jax.tree.map(jnp.ones_like, tree)

    for _ in range(2):
        params, state = optimizer.functional_state()
        assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(3, 1)]
        optimizer.load_functional_state(*optimizer.algorithm.update(params, ones(params), state))
    np.testing.assert_array_equal(frozen.value, before)
    assert frozen not in optimizer.state
    assert optimizer.state[trained]["step"] == 2
    frozen.requires_grad = True
    with pytest.raises(ValueError, match=r"different numbers of updates \(0, 2\)"):
        optimizer.functional_state()
