"""Copies and pickles in the middle of a run go on alike, for every kind of `params`, with module and schedulers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim

X = jnp.linspace(-1, 1, 12).reshape(4, 3)


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.dropout(self.norm(self.base(x))))


def module_loss(model: Any, x: Any) -> Any:
    return jnp.mean((model(x) - 1) ** 2)


def tree_loss(params: Any, x: Any) -> Any:
    return sum(jnp.sum((jnp.sum(x) + w) ** 2 * (1 + w)) for w in jax.tree.leaves(params))


def tree() -> Any:
    return {"a": jnp.arange(3.0), "b": [jnp.ones(2), jnp.zeros((2, 2))]}


def boxes() -> Any:
    return [("x", optim.Parameter(jnp.arange(3.0))), ("y", optim.Parameter(jnp.ones(2)))]


TREE_RULES = [{"params": "a", "lr": 0.3}, {"params": "b.1", "requires_grad": False}]
MODULE_RULES = [{"params": "base.*", "lr": 0.3}, {"params": "norm.*", "requires_grad": False}]


def of_boxes(params: Callable[[Net], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model = Net()
        return params(model), (model,)

    return make


# For each kind: params, and the other arguments of the loss: a module, where boxes were taken of it.
KINDS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "pytree": lambda: (tree(), ()),
    "Equinox": lambda: (eqx.nn.MLP(3, 1, 2, 1, jnp.tanh, key=jax.random.key(0)), ()),
    "module": lambda: (Net(), ()),
    "boxes": lambda: ([box for _, box in boxes()], ()),
    "named boxes": lambda: (boxes(), ()),
    "groups": lambda: ([{"params": tree()}, {"params": boxes(), "lr": 0.3}], ()),
    "group_parameters": lambda: (optim.group_parameters(tree(), TREE_RULES), ()),
    "group_parameters of a module": lambda: (optim.group_parameters(Net(), MODULE_RULES), ()),
    "boxes of a module": of_boxes(optim.parameters),
    "groups of a module": of_boxes(
        lambda model: [{"params": optim.named_parameters(model.base)}, {"params": optim.named_parameters(model.head)}]
    ),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy of a pickle": lambda x: copy.deepcopy(pickle.loads(pickle.dumps(x))),
}


def equinox_loss(model: Any, x: Any) -> Any:
    return jnp.mean(jax.vmap(model)(x) ** 2)


def run(args: Any, optimizer: Any, scheduler: Any) -> list[Any]:
    """Three steps: losses, rates, parameters."""
    model = args[0] if args else optimizer.params
    loss = {Net: module_loss, eqx.nn.MLP: equinox_loss}.get(type(model), tree_loss)
    log = []
    for _ in range(3):
        log += [optimizer.step(loss, *args, X), *scheduler.get_last_lr()]
        scheduler.step()
    if isinstance(model, Net):
        log += jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    return [*log, *(box.value for group in optimizer.param_groups for box in group["params"])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_run_continues_bit_for_bit_and_leaves_the_run_alone(kind: str) -> None:
    params, args = KINDS[kind]()
    optimizer = optim.AdamW(params, lr=0.1, amsgrad=True)
    whole = args, optimizer, optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    run(*whole)
    # Functions of JAX do not pickle, so models that hold them do not.
    copies = [duplicate(whole) for name, duplicate in WAYS.items() if name == "deepcopy" or kind != "Equinox"]
    logs = [run(*twin) for twin in copies]
    expected = run(*whole)
    assert not np.array_equal(expected[0], expected[2])
    for log in logs:
        for ours, theirs in zip(log, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "module" in kind])
def test_the_parameters_of_a_copy_are_those_of_the_copied_module(kind: str, way: str) -> None:
    params, args = KINDS[kind]()
    args, optimizer = WAYS[way]((args, optim.SGD(params, lr=0.1)))
    model = args[0] if args else optimizer.params
    of_groups = [box for group in optimizer.param_groups for box in group["params"]]
    assert set(of_groups) <= set(optim.parameters(model))
    optimizer.backward(module_loss, *args, X)
    assert all(box.grad is not None for box in of_groups)


def test_a_copied_parameter_of_a_variable_is_that_variables_parameter() -> None:
    box = next(optim.parameters(model := Net()))
    assert copy.copy(box) is box
    assert next(optim.parameters(model)) is box


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_were_seen_do_not_keep_an_optimizer_from_being_copied(way: str) -> None:
    model = Net()
    optimizer = optim.SGD(model, lr=0.1)
    grads = nnx.grad(module_loss)(model, X)
    optimizer.step(grads)
    twin = WAYS[way](optimizer)
    for each in (optimizer, twin):
        each.step(grads)
    np.testing.assert_array_equal(twin.params.base.kernel[...], model.base.kernel[...])


@pytest.mark.parametrize("way", WAYS)
def test_several_schedulers_and_their_optimizer_stay_together(way: str) -> None:
    optimizer = optim.SGD(tree(), lr=1.0, weight_decay=0.1, momentum=0.9)
    lr = optim.lr_scheduler
    warmup, cosine = lr.LinearLR(optimizer, 0.1, total_iters=2), lr.CosineAnnealingLR(optimizer, 5)
    schedulers = [lr.SequentialLR(optimizer, [warmup, cosine], [2]), lr.StepLR(optimizer, 2, 0.5, key="weight_decay")]
    for _ in range(2):
        optimizer.step(tree_loss, X)
        for scheduler in schedulers:
            scheduler.step()
    twin, others = WAYS[way]((optimizer, schedulers))
    assert all(other.optimizer is twin for other in others)
    for _ in range(4):
        for scheduler in (*schedulers, *others):
            scheduler.step()
        for key in ("lr", "weight_decay"):
            assert twin.param_groups[0][key] == optimizer.param_groups[0][key]
    assert [other.state_dict() for other in others[1:]] == [scheduler.state_dict() for scheduler in schedulers[1:]]


def test_boxes_inside_a_tree_are_its_parameters() -> None:
    w = optim.Parameter(1.0)
    assert list(optim.named_parameters({"a": [w], "b": 2})) == [("a.0", w)]
