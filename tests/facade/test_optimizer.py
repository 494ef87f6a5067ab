"""The facade: every kind of parameters, every form of step, groups, errors, subclasses."""

import copy
import gc
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import optimjax as optim
from optimjax._engine.bucket import update_bucket
from optimjax._engine.state import ParameterState
from optimjax.rule import LearningRate, Rule

NAMES = ("base.kernel", "base.bias", "head.kernel")
VALUES = [np.random.default_rng(0).normal(size=shape) for shape in [(3, 4), (4,), (4, 2)]]
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}
STEPS = 6


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(100 + step)
    return rng.normal(size=(5, 3)), rng.normal(size=(5, 2))


def forward(kernel: Any, bias: Any, head: Any, x: Any) -> Any:
    return jnp.tanh(x @ kernel + bias[None]) @ head


def mse(output: Any, y: Any) -> Any:
    return jnp.mean((output - y) ** 2)


# --- One network in every kind of parameters ------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A network as it is handed to an optimizer.

    Attributes:
      params: what the constructor gets.
      loss: what `backward` and `step` differentiate, called with ``args`` and the batch after `params`, if it gets it.
      args: the module, where the optimizer has only boxes of it.
      grads: gradients in the form of `step(grads)`, from what `optimizer.params` is and the batch.
      leaves: the three arrays out of what `optimizer.params` is.
    """

    params: Any
    loss: Callable[..., Any]
    grads: Callable[..., Any]
    leaves: Callable[[Any], Sequence[Any]]
    args: tuple[Any, ...] = ()


def tree_given(
    tree: Any, output: Callable[..., Any], leaves: Callable[[Any], Sequence[Any]], params: Any = None
) -> Any:
    """A network whose loss function gets a tree."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        return mse(output(params, x), y)

    return Given(tree if params is None else params, loss, jax.grad(loss), leaves)


def dictionary(kernel: Any, bias: Any, head: Any) -> dict[str, Any]:
    return {"base": {"kernel": kernel, "bias": bias}, "head": {"kernel": head}}


def dictionary_leaves(tree: Any) -> Sequence[Any]:
    return tree["base"]["kernel"], tree["base"]["bias"], tree["head"]["kernel"]


def a_dict(arrays: Sequence[Any]) -> Given:
    return tree_given(dictionary(*arrays), lambda tree, x: forward(*dictionary_leaves(tree), x), dictionary_leaves)


def a_list(arrays: Sequence[Any]) -> Given:
    return tree_given(list(arrays), lambda tree, x: forward(*tree, x), list)


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def nested(arrays: Sequence[Any]) -> Given:
    kernel, bias, head = arrays
    tree = {"layers": (Layer(kernel, bias), [Layer(head, None)]), "count": 3, "note": None, "mask": np.array([1, 0])}

    def leaves(tree: Any) -> Sequence[Any]:
        (first, (second,)) = tree["layers"]
        return first.kernel, first.bias, second.kernel

    def loss(tree: Any, x: Any, y: Any) -> Any:
        return mse(forward(*leaves(tree), x), y)

    def grads(tree: Any, x: Any, y: Any) -> Any:
        kernel, bias, head = jax.grad(lambda arrays: mse(forward(*arrays, x), y))(leaves(tree))
        return {"layers": (Layer(kernel, bias), [Layer(head, None)]), "count": None, "note": None, "mask": None}

    return Given(tree, loss, grads, leaves)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(linen.Dense(4, name="base", param_dtype=jnp.float64)(x))
        return linen.Dense(2, name="head", use_bias=False, param_dtype=jnp.float64)(x)


def linen_params(arrays: Sequence[Any]) -> Given:
    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 3)))
    tree = jax.tree.map(lambda old, new: jnp.asarray(new), variables, {"params": dictionary(*arrays)})
    return tree_given(tree, net.apply, lambda variables: dictionary_leaves(variables["params"]))


class EquinoxNet(eqx.Module):
    base: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: Callable[..., Any]
    label: str
    bins: jax.Array

    def __call__(self, x: Any) -> Any:
        return jax.vmap(self.head)(self.activation(jax.vmap(self.base)(x)))


def equinox_module(arrays: Sequence[Any]) -> Given:
    key = jax.random.key(0)
    kernel, bias, head = map(jnp.asarray, arrays)
    net = EquinoxNet(
        eqx.nn.Linear(3, 4, key=key), eqx.nn.Linear(4, 2, use_bias=False, key=key), jnp.tanh, "net", jnp.arange(3)
    )
    net = eqx.tree_at(lambda n: (n.base.weight, n.base.bias, n.head.weight), net, (kernel.T, bias, head.T))

    def leaves(net: Any) -> Sequence[Any]:
        return net.base.weight.T, net.base.bias, net.head.weight.T

    def loss(net: Any, x: Any, y: Any) -> Any:
        return mse(net(x), y)

    return Given(net, loss, eqx.filter_grad(loss), leaves)


class Net(nnx.Module):
    def __init__(self, arrays: Sequence[Any]):
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, use_bias=False, rngs=rngs)
        for variable, array in zip(module_leaves(self), arrays, strict=True):
            variable.set_value(jnp.asarray(array))

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.base(x)))


def module_leaves(net: Net) -> Sequence[Any]:
    return net.base.kernel, net.base.bias, net.head.kernel


def module_loss(net: Any, x: Any, y: Any) -> Any:
    return mse(net(x), y)


def nnx_module(arrays: Sequence[Any]) -> Given:
    return Given(Net(arrays), module_loss, nnx.grad(module_loss), module_leaves)


def boxes(hand_in: Callable[[dict[str, optim.Parameter]], Any], named: bool) -> Callable[[Sequence[Any]], Given]:
    """Boxes that the user makes."""

    def make(arrays: Sequence[Any]) -> Given:
        made = {name: optim.Parameter(array) for name, array in zip(NAMES, arrays, strict=True)}

        def leaves(params: Any) -> Sequence[Any]:
            return [params[name] for name in NAMES] if named else params

        return tree_given(None, lambda params, x: forward(*leaves(params), x), leaves, hand_in(made))

    return make


def module_boxes(hand_in: Callable[[Net], Any], leaves: Callable[[Any], Sequence[Any]]) -> Callable[..., Given]:
    """Boxes of a module: the module itself is an argument of the loss function."""

    def make(arrays: Sequence[Any]) -> Given:
        net = Net(arrays)

        def grads(params: Any, x: Any, y: Any) -> Any:
            by_name = jax.grad(lambda tree: mse(forward(*dictionary_leaves(tree), x), y))(
                dictionary(*map(jnp.asarray, leaves(params)))
            )
            in_order = [by_name["base"]["bias"], by_name["base"]["kernel"], by_name["head"]["kernel"]]
            if isinstance(params, dict):
                return dict(zip(("base.bias", "base.kernel", "head.kernel"), in_order, strict=True))
            return [in_order[:2], in_order[2:]] if isinstance(params[0], list) else in_order

        return Given(hand_in(net), module_loss, grads, leaves, (net,))

    return make


# Groups: the head has a rate and a decay of its own.
HEAD = {"lr": 0.02, "weight_decay": 0.0}


def groups(first: Any, second: Any) -> list[dict[str, Any]]:
    return [{"params": first}, {"params": second, **HEAD}]


def tree_groups(arrays: Sequence[Any]) -> Given:
    tree = dictionary(*arrays)
    return tree_given(
        groups(tree["base"], tree["head"]),
        lambda params, x: forward(params[0]["kernel"], params[0]["bias"], params[1]["kernel"], x),
        lambda params: (params[0]["kernel"], params[0]["bias"], params[1]["kernel"]),
    )


def box_groups(arrays: Sequence[Any]) -> Given:
    kernel, bias, head = map(optim.Parameter, arrays)
    return tree_given(
        groups([kernel, bias], head),  # a single box will do in a group, as in PyTorch
        lambda params, x: forward(*params[0], *params[1], x),
        lambda params: (*params[0], *params[1]),
    )


def generated_groups(arrays: Sequence[Any]) -> Given:
    given = box_groups(arrays)
    return replace(given, params=(group for group in given.params))


def named_box_groups(arrays: Sequence[Any]) -> Given:
    made = {name: optim.Parameter(array) for name, array in zip(NAMES, arrays, strict=True)}

    def leaves(params: Any) -> Sequence[Any]:
        merged = params[0] | params[1]
        return [merged[name] for name in NAMES]

    first, second = list(made.items())[:2], list(made.items())[2:]
    return tree_given(None, lambda params, x: forward(*leaves(params), x), leaves, groups(iter(first), second))


def submodule_groups(arrays: Sequence[Any]) -> Given:
    net = Net(arrays)

    def loss(parts: Any, x: Any, y: Any) -> Any:
        base, head = parts
        return mse(head(jnp.tanh(base(x))), y)

    def grads(parts: Any, x: Any, y: Any) -> Any:
        return list(nnx.grad(lambda parts: loss(parts, x, y))(tuple(parts)))

    return Given(
        groups(net.base, net.head), loss, grads, lambda parts: (parts[0].kernel, parts[0].bias, parts[1].kernel)
    )


def in_module_order(params: Any) -> Sequence[Any]:
    bias, kernel, head = params.values() if isinstance(params, dict) else params
    return kernel, bias, head


def in_group_order(params: Any) -> Sequence[Any]:
    (bias, kernel), (head,) = params
    return kernel, bias, head


ONE_GROUP = {
    "dict": a_dict,
    "list": a_list,
    "nested": nested,
    "linen": linen_params,
    "equinox": equinox_module,
    "nnx": nnx_module,
    "box list": boxes(lambda made: list(made.values()), named=False),
    "box tuple": boxes(lambda made: tuple(made.values()), named=False),
    "box values": boxes(lambda made: made.values(), named=False),
    "box generator": boxes(lambda made: (box for box in made.values()), named=False),
    "box filter": boxes(lambda made: filter(lambda box: box.requires_grad, made.values()), named=False),
    "box chain": boxes(lambda made: itertools.chain(*([box] for box in made.values())), named=False),
    "named list": boxes(lambda made: list(made.items()), named=True),
    "named items": boxes(lambda made: made.items(), named=True),
    "named generator": boxes(lambda made: ((name, box) for name, box in made.items()), named=True),
    "module parameters": module_boxes(optim.parameters, in_module_order),
    "module named_parameters": module_boxes(optim.named_parameters, in_module_order),
}
TWO_GROUPS = {
    "trees": tree_groups,
    "boxes": box_groups,
    "named boxes": named_box_groups,
    "submodules": submodule_groups,
    "submodule parameters": module_boxes(
        lambda net: groups(optim.parameters(net.base), optim.parameters(net.head)), in_group_order
    ),
    "generator of boxes": generated_groups,
}
MAKERS = [(make, {}, name) for name, make in ONE_GROUP.items()]
MAKERS += [(make, HEAD, f"groups of {name}") for name, make in TWO_GROUPS.items()]


def by_backward(optimizer: Any, given: Given, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    loss = optimizer.backward(given.loss, *given.args, x, y)
    optimizer.step()
    return loss


def by_grads(optimizer: Any, given: Given, x: Any, y: Any) -> Any:
    before = mse(forward(*map(jnp.asarray, given.leaves(optimizer.params)), x), y)
    optimizer.step(given.grads(optimizer.params, x, y))
    return before


def by_loss(optimizer: Any, given: Given, x: Any, y: Any) -> Any:
    return optimizer.step(given.loss, *given.args, x, y)


FORMS = [by_backward, by_grads, by_loss]


@pytest.fixture(scope="module")
def torch_run(torch: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Losses and parameters after each step in PyTorch, the head with options of its own."""
    runs: dict[str, Any] = {}

    def run(head_options: Mapping[str, Any]) -> Any:
        key = repr(head_options)
        if key not in runs:
            kernel, bias, head = (torch.nn.Parameter(torch.from_numpy(value.copy())) for value in VALUES)
            optimizer = torch.optim.Adam([{"params": [kernel, bias]}, {"params": [head], **head_options}], **OPTIONS)
            losses, params = [], []
            for x, y in map(batch, range(STEPS)):
                output = torch.tanh(torch.from_numpy(x) @ kernel + bias) @ head
                loss = ((output - torch.from_numpy(y)) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                params.append([p.detach().numpy().copy() for p in (kernel, bias, head)])
            runs[key] = losses, params
        return runs[key]

    return run


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("make", "head_options"), [m[:2] for m in MAKERS], ids=[m[2] for m in MAKERS])
def test_trajectory_is_pytorchs(make: Any, head_options: Any, form: Any, torch_run: Any) -> None:
    given = make(VALUES)
    optimizer = optim.Adam(given.params, **OPTIONS)
    structure = jax.tree.structure(optimizer.params)
    losses, params = torch_run(head_options)
    for step in range(STEPS):
        loss = form(optimizer, given, *batch(step))
        assert abs(float(loss) - losses[step]) < 1e-12
        for ours, theirs in zip(given.leaves(optimizer.params), params[step], strict=True):
            np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-12, atol=1e-12)
    if not isinstance(given.params, nnx.Module):  # the module's graph carries ids of its own
        assert jax.tree.structure(optimizer.params) == structure


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [a_dict, a_list, nested, linen_params, equinox_module])
def test_params_of_a_tree_is_that_tree(make: Any) -> None:
    given = make(VALUES)
    optimizer = optim.SGD(given.params, lr=0.1)
    assert jax.tree.structure(optimizer.params) == jax.tree.structure(given.params)
    before = [np.array(leaf) for leaf in given.leaves(given.params)]
    optimizer.step(given.loss, *batch(0))
    for ours, old, theirs in zip(given.leaves(optimizer.params), before, given.leaves(given.params), strict=True):
        assert not np.array_equal(ours, old)
        np.testing.assert_array_equal(theirs, old)  # the user's own tree is left alone


def test_leaves_that_are_no_floats_pass_through() -> None:
    tree = {"w": jnp.ones(2), "ids": jnp.arange(3), "f": jnp.tanh, "name": "net", "none": None, "flag": True, "x": 2.0}
    optimizer = optim.SGD(tree, lr=0.5)
    optimizer.step({**dict.fromkeys(tree), "w": jnp.ones(2)})
    assert [str(box) for box in optimizer.param_groups[0]["params"]] == ["w"]
    after = optimizer.params
    np.testing.assert_array_equal(after["w"], [0.5, 0.5])
    assert all(after[key] is tree[key] for key in tree if key != "w")


def test_params_of_a_module_and_of_boxes() -> None:
    net = Net([np.float32(v) for v in VALUES])
    assert optim.SGD(net).params is net
    boxes = list(optim.parameters(net))
    values = optim.SGD(boxes).params
    assert isinstance(values, list)
    assert all(value is box.value for value, box in zip(values, boxes, strict=True))
    assert list(optim.SGD(optim.named_parameters(net)).params) == [name for name, _ in optim.named_parameters(net)]


def test_one_step_never_sees_the_same_array_twice() -> None:
    """The user may keep `params` of any moment: a step does not delete it."""
    optimizer = optim.Adam({"w": jnp.ones(3)}, lr=0.1)
    kept = []
    for _ in range(3):
        optimizer.step({"w": jnp.ones(3)})
        kept.append(optimizer.params["w"])
    assert len({float(value[0]) for value in kept}) == 3


# --- nnx: what is no parameter is never touched ---------------------------------------------------------------------


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.rngs = nnx.Rngs(dropout=1)
        self.embed = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.out.kernel = self.embed.kernel
        self.dropout = nnx.Dropout(0.5, rngs=self.rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(self.dropout(self.norm(self.embed(x))))


def test_tied_variables_count_once_and_other_variables_not_at_all() -> None:
    model = Tied()
    optimizer = optim.SGD(model, lr=0.1, momentum=0.9)
    names = optimizer.param_groups[0]["param_names"]
    assert sorted(names) == ["embed.bias", "embed.kernel", "norm.bias", "norm.scale", "out.bias"]

    others = nnx.state(model, nnx.Not(nnx.Param))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.filter_state(others, nnx.BatchStat)))
    counts = [np.asarray(count) for count in jax.tree.leaves(nnx.state(model, nnx.RngCount))]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    old = np.asarray(model.embed.kernel)
    optimizer.step(grads)
    np.testing.assert_allclose(np.asarray(model.embed.kernel), old - 0.1, rtol=1e-6)  # once, not twice
    assert model.out.kernel is model.embed.kernel
    after = nnx.to_pure_dict(nnx.filter_state(nnx.state(model, nnx.Not(nnx.Param)), nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for count, now in zip(counts, jax.tree.leaves(nnx.state(model, nnx.RngCount)), strict=True):
        np.testing.assert_array_equal(count, now)


def test_two_optimizers_on_one_module() -> None:
    """As in a GAN: each has its state and its parameters, and leaves the other's alone."""

    def train(interleaved: bool) -> list[Any]:
        net = Net([np.float32(v) for v in VALUES])
        x, y = (np.float32(a) for a in batch(0))
        first = optim.Adam(optim.parameters(net.base), lr=0.1)
        second = optim.SGD(optim.parameters(net.head), lr=0.1, momentum=0.9)
        trace = []
        for _ in range(3):
            head = np.asarray(net.head.kernel)
            first.zero_grad()
            first.backward(module_loss, net, x, y)
            assert all(box.grad is None for box in optim.parameters(net.head)) or interleaved
            first.step()
            np.testing.assert_array_equal(head, net.head.kernel)
            base = np.asarray(net.base.kernel)
            if interleaved:
                second.zero_grad()
                second.backward(module_loss, net, x, y)
                second.step()
                np.testing.assert_array_equal(base, net.base.kernel)
                assert not np.array_equal(head, net.head.kernel)
            trace.append(base)
        assert len(first.state) == 2
        assert len(second.state) == (1 if interleaved else 0)
        return trace

    apart, together = train(False), train(True)
    np.testing.assert_array_equal(apart[0], together[0])
    assert not np.array_equal(apart[1], together[1])  # through the loss, not through the optimizer


def test_two_optimizers_on_the_same_parameters_share_gradients_not_state() -> None:
    net = Net([np.float32(v) for v in VALUES])
    first, second = optim.Adam(net, lr=0.1), optim.Adam(net, lr=0.1)
    first.backward(module_loss, *(np.float32(a) for a in batch(0)))
    first.step()
    assert not second.state
    second.step()  # the gradient is the parameter's, as in PyTorch
    assert [state["step"] for state in second.state.values()] == [1, 1, 1]
    second.zero_grad()
    assert all(box.grad is None for box in optim.parameters(net))


# --- Groups ---------------------------------------------------------------------------------------------------------


def test_group_options_and_defaults() -> None:
    optimizer = optim.SGD(groups([jnp.ones(2)], {"w": jnp.ones(3)}), lr=0.5, momentum=0.9)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["momentum"]) == (0.5, 0, 0.9)
    assert (second["lr"], second["weight_decay"], second["momentum"]) == (0.02, 0.0, 0.9)
    assert optimizer.defaults["lr"] == 0.5
    assert isinstance(optimizer.params, list)
    assert [type(part) for part in optimizer.params] == [list, dict]


def test_the_users_group_dicts_are_left_alone() -> None:
    given = [{"params": [optim.Parameter(1.0)]}]
    shallow = [dict(group) for group in given]
    optim.SGD(given, lr=0.1)
    assert given == shallow


def test_group_values_can_be_edited_by_hand() -> None:
    optimizer = optim.SGD(groups([jnp.ones(2)], [jnp.ones(2)]), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    optimizer.step([[jnp.ones(2)], [jnp.ones(2)]])
    np.testing.assert_allclose(optimizer.params[0][0], 0.9, rtol=1e-6)
    np.testing.assert_allclose(optimizer.params[1][0], 0.998, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["backward", "grads", "loss"])
def test_add_param_group_mid_run_is_pytorchs(form: str, torch: Any) -> None:
    def ours() -> list[Any]:
        first, second = optim.Parameter(VALUES[0]), optim.Parameter(VALUES[1])
        optimizer = optim.Adam([first], lr=0.1)
        one = lambda params: jnp.sum(params[0] ** 4)  # noqa: E731
        both = lambda params: jnp.sum(params[0][0] ** 4) + jnp.sum(params[1][0] ** 4)  # noqa: E731
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": second, "lr": 0.02})
            loss = one if step < 3 else both
            if form == "backward":
                optimizer.zero_grad()
                optimizer.backward(loss)
                optimizer.step()
            else:
                optimizer.step(jax.grad(loss)(optimizer.params) if form == "grads" else loss)
        assert [optimizer.state[box]["step"] for box in (first, second)] == [6, 3]
        return [first.value, second.value]

    def theirs() -> list[Any]:
        first, second = (torch.nn.Parameter(torch.from_numpy(v.copy())) for v in VALUES[:2])
        optimizer = torch.optim.Adam([first], lr=0.1)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": second, "lr": 0.02})
            optimizer.zero_grad()
            loss = (first**4).sum() + ((second**4).sum() if step >= 3 else 0)
            loss.backward()
            optimizer.step()
        return [first.detach().numpy(), second.detach().numpy()]

    for a, b in zip(ours(), theirs(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_add_param_group_of_a_module_while_fine_tuning() -> None:
    net = Net([np.float32(v) for v in VALUES])
    x, y = (np.float32(a) for a in batch(0))
    optimizer = optim.SGD(net.head, lr=0.1)
    optimizer.add_param_group({"params": optim.named_parameters(net.base), "lr": 0.01})
    before = np.asarray(net.base.kernel)
    optimizer.backward(lambda head, net, x, y: mse(head(jnp.tanh(net.base(x))), y), net, x, y)
    grad = {box.name: box.grad for box in optimizer.param_groups[1]["params"]}["kernel"]
    optimizer.step()
    np.testing.assert_allclose(net.base.kernel[...], before - 0.01 * np.asarray(grad), rtol=1e-6)


# --- Gradients ------------------------------------------------------------------------------------------------------


def test_zero_grad_both_ways() -> None:
    w, b = optim.Parameter(jnp.ones(2)), optim.Parameter(jnp.ones(3))
    optimizer = optim.SGD([w, b], lr=0.1, momentum=0.9)
    w.grad = jnp.full(2, 3.0)
    optimizer.zero_grad(set_to_none=False)
    np.testing.assert_array_equal(w.grad, [0, 0])
    assert b.grad is None
    optimizer.step()
    assert w in optimizer.state  # a zero gradient is a gradient
    assert b not in optimizer.state
    optimizer.zero_grad()
    assert w.grad is None
    optimizer.step()  # nothing to do
    np.testing.assert_array_equal(w.value, [1, 1])


@pytest.mark.usefixtures("x64")
def test_a_missing_gradient_skips_everything_as_in_pytorch(torch: Any) -> None:
    def run(make: Any, optimizer_class: Any, to_array: Any) -> Any:
        params = [make(v) for v in VALUES]
        optimizer = optimizer_class(params, lr=0.1, weight_decay=0.5)
        for step in range(4):
            for index, p in enumerate(params):
                p.grad = None if (step + index) % 2 else to_array(np.full(VALUES[index].shape, step + 1.0))
            optimizer.step()
        return params, [int(optimizer.state[p]["step"]) for p in params]

    ours, steps = run(optim.Parameter, optim.AdamW, jnp.asarray)
    theirs, their_steps = run(
        lambda v: torch.nn.Parameter(torch.from_numpy(v.copy())), torch.optim.AdamW, torch.from_numpy
    )
    assert steps == their_steps == [2, 2, 2]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.value, b.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_gradients_may_be_numpy_arrays() -> None:
    optimizer = optim.SGD({"w": np.ones(2, np.float32)}, lr=1.0)
    optimizer.step({"w": np.full(2, 0.25)})
    assert optimizer.params["w"].dtype == jnp.float32
    np.testing.assert_array_equal(optimizer.params["w"], [0.75, 0.75])


# --- Compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["backward", "grads", "loss"])
@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
def test_changing_group_values_never_recompiles(form: str, optimizer_class: Any, compilations: Any) -> None:
    optimizer = optimizer_class([jnp.ones(3), jnp.ones((2, 2))], lr=0.1, weight_decay=0.1)

    def loss(params: Any, x: Any) -> Any:
        return x * sum(jnp.sum(p**2) for p in params)

    def step(x: float) -> None:
        if form == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss, x)
            optimizer.step()
        elif form == "grads":
            optimizer.step(optimizer.params)
        else:
            optimizer.step(loss, x)

    step(1.0)
    step(1.0)
    before = compilations()
    numeric = [
        key
        for key, value in optimizer.param_groups[0].items()
        if isinstance(value, float) and not isinstance(value, bool)
    ]
    assert {"lr", "weight_decay"} <= set(numeric)
    for index in range(3):
        for key in numeric:
            optimizer.param_groups[0][key] *= 0.9
        if "betas" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["betas"] = (0.5 + 0.1 * index, 0.9)
        step(1.0 + index)
    assert compilations() == before


def test_a_rate_in_an_array_does_not_recompile_either(compilations: Any) -> None:
    optimizer = optim.SGD([jnp.ones(3)], lr=jnp.asarray(0.1))
    rates = [jnp.asarray(0.01 * i) for i in range(4)]
    for _ in range(2):
        optimizer.step([jnp.ones(3)])
    before = compilations()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step([jnp.ones(3)])
    assert compilations() == before


def test_differing_step_counts_do_not_recompile(compilations: Any) -> None:
    """Experts of a mixture: each step another few get gradients. The number of parameters decides, not their counts."""
    rng = np.random.default_rng(0)
    optimizer = optim.Adam([jnp.ones(4) for _ in range(6)], lr=0.1)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step([jnp.ones(4) if rng.random() < 0.6 else None for _ in range(6)])

    run(30)
    before = compilations()
    run(30)
    assert compilations() - before <= 1  # a number of gradients that had not come up


def test_endless_patterns_of_missing_gradients_stop_compiling(compilations: Any) -> None:
    """Each pattern of shapes would be a program of its own; after some the optimizer uses programs for any pattern."""
    rng = np.random.default_rng(1)
    shapes = [(2, 3), (4,), (), (5, 1)] * 3
    grads = [jnp.ones(shape) for shape in shapes]
    optimizer = optim.Adam(grads, lr=0.1)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step([grad if rng.random() < 0.6 else None for grad in grads])

    run(40)
    before = compilations()
    run(30)
    assert compilations() - before <= 1


def test_a_new_optimizer_of_the_same_shapes_compiles_nothing(compilations: Any) -> None:
    def run() -> None:
        optimizer = optim.Adam([jnp.ones(7), jnp.ones(7)], lr=0.1)
        for _ in range(2):
            optimizer.step([jnp.ones(7), jnp.ones(7)])

    run()
    before = compilations()
    run()
    assert compilations() == before


# --- Errors change nothing ------------------------------------------------------------------------------------------


def contents(optimizer: Any) -> Any:
    """Everything that an error must not change, as plain comparable values."""
    plain = lambda x: np.asarray(x).tolist() if hasattr(x, "shape") else x  # noqa: E731
    groups = [{**group, "params": [id(box) for box in group["params"]]} for group in optimizer.param_groups]
    state = {id(box): {k: plain(v) for k, v in entries.items()} for box, entries in optimizer.state.items()}
    boxes = [box for group in optimizer.param_groups for box in group["params"]]
    return copy.deepcopy((groups, state, [(plain(box.value), plain(box.grad)) for box in boxes]))


def two_groups() -> Any:
    optimizer = optim.Adam(
        [{"params": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}, {"params": {"h": jnp.ones(2)}, "lr": 0.5}], lr=0.1
    )
    optimizer.step([{"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"h": jnp.ones(2)}])
    for box in optimizer.param_groups[0]["params"]:
        box.grad = jnp.ones(box.shape)
    return optimizer


GOOD = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
H = {"h": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([GOOD], ValueError, "2 groups"),
        (GOOD, ValueError, "2 groups"),
        ([GOOD, {"k": H["h"]}], ValueError, r"missing \['h'\], unexpected \['k'\]"),
        ([{"w": GOOD["w"]}, H], ValueError, r"missing \['b'\]"),
        ([{**GOOD, "c": 1.0}, H], ValueError, r"unexpected \['c'\]"),
        ([list(GOOD.values()), H], ValueError, "structure"),
        ([GOOD, {"h": np.ones(3, np.float32)}], ValueError, r"'h' has shape \(3,\), the parameter has \(2,\)"),
        ([GOOD, {"h": np.ones((1, 2), np.float32)}], ValueError, r"'h' has shape \(1, 2\)"),
        ([GOOD, {"h": np.float32(1)}], ValueError, r"'h' has shape \(\)"),
        ([GOOD, {"h": np.ones(2, int)}], TypeError, "'h' is int64: it must be a floating array"),
        ([GOOD, {"h": np.ones(2, bool)}], TypeError, "'h' is bool"),
        ([GOOD, {"h": np.ones(2, complex)}], TypeError, "'h' is complex128, the parameter is real"),
        ([GOOD, {"h": "grad"}], TypeError, "'h' must be an array or None, got str"),
    ],
)
def test_gradients_that_do_not_fit(grads: Any, error: Any, message: str) -> None:
    optimizer = two_groups()
    before = contents(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(grads)
    assert contents(optimizer) == before


def test_gradients_of_a_module_that_do_not_fit() -> None:
    net = Net([np.float32(v) for v in VALUES])
    optimizer = optim.SGD(net, lr=0.1)
    grads = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"missing \['head.kernel'\]"):
        optimizer.step({"base": grads["base"]})
    grads["head"]["kernel"] = jnp.ones(2)
    with pytest.raises(ValueError, match=r"'head.kernel' has shape \(2,\), the parameter has \(4, 2\)"):
        optimizer.step(grads)
    assert contents(optimizer) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: o.step(lambda params: params[0]["w"]), TypeError, "scalar"),
        (lambda o: o.step(lambda params: jnp.sum(params[0]["missing"])), KeyError, "missing"),
        (lambda o: o.step([GOOD, H], 3), TypeError, "no further arguments"),
        (lambda o: o.backward(lambda params: params[0]["w"]), TypeError, "scalar"),
        (lambda o: o.backward(3), TypeError, "callable, got int: 3"),
        (lambda o: o.add_param_group([jnp.ones(2)]), TypeError, "must be a dict, but got"),
        (lambda o: o.add_param_group({"lr": 1.0}), ValueError, "no 'params'"),
        (lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "lr": -1}), ValueError, "rate: -1"),
        (lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "lr": "fast"}), TypeError, "'fast'"),
        (
            lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "weight_decy": 1}),
            TypeError,
            "option 'weight_decy'.*'weight_decay'",
        ),
        (lambda o: o.add_param_group({"params": o.param_groups[0]["params"][:1]}), ValueError, "more than one|names"),
        (
            lambda o: o.add_param_group({"params": [("b", o.param_groups[0]["params"][0])]}),
            ValueError,
            "some parameters appear in more than one parameter group: b",
        ),
        (lambda o: o.add_param_group({"params": [optim.Parameter(1.0)]}), ValueError, "with/without names"),
        (lambda o: o.add_param_group({"params": {optim.Parameter(1.0)}}), TypeError, "sets"),
        (lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "amsgrad": jnp.ones(())}), TypeError, "plain"),
    ],
)
def test_an_error_changes_nothing(call: Any, error: Any, message: str) -> None:
    optimizer = two_groups()
    before = contents(optimizer)
    with pytest.raises(error, match=message):
        call(optimizer)
    assert contents(optimizer) == before
    optimizer.step([GOOD, H])  # and it still works


def test_a_group_that_was_appended_by_hand_is_told_how() -> None:
    optimizer = two_groups()
    optimizer.param_groups.append({"params": [optim.Parameter(1.0)]})
    with pytest.raises(KeyError, match=r"'lr' of param_groups\[2\] is missing: groups are added with add_param_group"):
        optimizer.step()


def test_a_number_in_text_is_no_number() -> None:
    optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = "0.1"
    with pytest.raises(ValueError, match="which is not a number: it is a string"):
        optimizer.step([GOOD, H])


def test_a_group_value_that_is_no_number_is_named() -> None:
    optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = "fast"
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"lr of param_groups\[1\] is 'fast'"):
        optimizer.step([GOOD, H])
    assert contents(optimizer) == before


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: [], ValueError, "empty parameter list"),
        (lambda: (), ValueError, "empty parameter list"),
        (lambda: {}, ValueError, "empty parameter list"),
        (lambda: iter(()), ValueError, "empty parameter list: nothing was in it; a generator can be used once only"),
        (lambda: {"n": 3}, ValueError, "empty parameter list"),
        (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), ValueError, "empty parameter list"),
        (lambda: optim.parameters(nnx.Dropout(0.5)), ValueError, "empty parameter list"),
        (lambda: optim.Parameter(1.0), TypeError, "single"),
        (lambda: {optim.Parameter(1.0)}, TypeError, "ordering in sets"),
        (lambda: {"w": optim.Parameter(1.0)}, TypeError, r"\.items\(\)"),
        (lambda: [optim.Parameter(1.0), jnp.ones(2)], TypeError, "can only optimize Parameters"),
        (lambda: [optim.Parameter(1.0), ("b", optim.Parameter(1.0))], ValueError, "with/without names"),
        (lambda: [("b", optim.Parameter(1.0)), ("b", optim.Parameter(1.0))], ValueError, "differ"),
        (lambda: [optim.Parameter(1.0)] * 2, ValueError, "more than once"),
        (lambda: groups([box := optim.Parameter(1.0)], [box]), ValueError, "more than one parameter group"),
        (
            lambda: [{"params": [optim.Parameter(1.0)], "lrs": 1}],
            TypeError,
            r"unknown option 'lrs' of param_groups\[0\].*mean 'lr'",
        ),
        (lambda: 3, TypeError, "must hold parameters, got int: 3"),
        (lambda: None, TypeError, "must hold parameters, got NoneType"),
        (lambda: "w", TypeError, "must hold parameters, got str: 'w'"),
        (lambda: jnp.arange(3), TypeError, "must hold parameters, got ArrayImpl"),
        (lambda: groups([optim.Parameter(1.0)], None), TypeError, r"params of param_groups\[1\] must hold parameters"),
        (lambda: [{"params": [optim.Parameter(1.0)], "lr": -1}], ValueError, "Invalid learning rate: -1"),
    ],
)
def test_parameters_that_cannot_be_optimized(params: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        optim.SGD(params(), lr=0.1)


@pytest.mark.parametrize("kwargs", [{"lr": -1}, {"momentum": -1}, {"learning_rate": 0.1}])
def test_a_failed_constructor_leaves_a_module_alone(kwargs: Any) -> None:
    net = Net([np.float32(v) for v in VALUES])
    before = [np.asarray(v) for v in module_leaves(net)]
    with pytest.raises((ValueError, TypeError)):
        optim.SGD(net, **kwargs)
    for old, variable in zip(before, module_leaves(net), strict=True):
        np.testing.assert_array_equal(old, variable[...])
    assert all(box.grad is None for box in optim.parameters(net))


# --- repr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Adam", {}),
        ("AdamW", {"lr": 1e-3, "amsgrad": True}),
        ("RMSprop", {"centered": True}),
        ("Adagrad", {"lr_decay": 0.1}),
    ],
)
def test_repr_is_pytorchs(name: str, options: Any, torch: Any) -> None:
    def build(module: Any, box: Callable[[Any], Any]) -> Any:
        first, second = box(np.ones(2)), box(np.ones(3))
        optimizer = getattr(module, name)([{"params": [first]}, {"params": [second], "lr": 0.5}], **options)
        optimizer.param_groups[0]["lr"] = 0.25
        return optimizer

    ours = build(optim, optim.Parameter)
    theirs = build(torch.optim, lambda value: torch.nn.Parameter(torch.from_numpy(value)))
    assert repr(ours).splitlines() == repr(theirs).splitlines()


# --- Subclasses -----------------------------------------------------------------------------------------------------


class SignSlots(NamedTuple):
    previous: Any


class SignScalars(NamedTuple):
    lr: Any


class SignSGD(optim.Optimizer):
    """A rule of a user: steps against the sign of the gradient, halved where the sign has changed."""

    rule = Rule(
        slots=SignSlots,
        init=lambda param, hyper, flags: SignSlots(jnp.zeros_like(param)),
        scalars=lambda step, hyper: SignScalars(hyper.lr),
        update=lambda param, grad, slots, scalars, flags: (
            param - scalars.lr * jnp.where(grad * slots.previous < 0, 0.5, 1.0) * jnp.sign(grad),
            SignSlots(grad),
        ),
    )

    def __init__(self, params: Any, lr: LearningRate = 0.1):
        super().__init__(params, dict(lr=lr))


def test_a_subclass_with_a_rule_gets_both_faces(compilations: Any) -> None:
    def loss(params: Any, target: Any) -> Any:
        return jnp.sum((params["w"] - target) ** 2)

    start, target = {"w": jnp.array([0.05, 1.0])}, jnp.zeros(2)
    expected = [[-0.05, 0.9], [0.0, 0.8]]
    optimizer = SignSGD(start)
    optimizer.step(loss, target)
    np.testing.assert_allclose(optimizer.params["w"], expected[0], atol=1e-6)
    optimizer.backward(loss, target)
    optimizer.step()
    np.testing.assert_allclose(optimizer.params["w"], expected[1], atol=1e-6)
    assert optimizer.state_dict()["state"][0].keys() == {"step", "previous"}
    assert repr(optimizer) == "SignSGD (\nParameter Group 0\n    lr: 0.1\n)"
    before = compilations()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert compilations() == before

    sign_sgd = optim.functional.factory(SignSGD)(lr=0.1)
    params, state = start, sign_sgd.init(start)
    for row in expected:
        params, state = jax.jit(sign_sgd.update)(params, jax.grad(loss)(params, target), state)
        np.testing.assert_allclose(params["w"], row, atol=1e-6)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        SignSGD(start, lr=-1)


class PlainSGD(optim.Optimizer):
    """SGD as old PyTorch tutorials write it: a loop over groups and parameters."""

    def __init__(self, params: Any, lr: Any, momentum: Any = 0, weight_decay: Any = 0, nesterov: bool = False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            loss = closure()
        for group in self.param_groups:
            weight_decay = group["weight_decay"]
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                d_p = p.grad
                if weight_decay != 0:
                    d_p = d_p + weight_decay * p.value
                if momentum != 0:
                    param_state = self.state[p]
                    if "momentum_buffer" not in param_state:
                        buf = param_state["momentum_buffer"] = d_p
                    else:
                        buf = param_state["momentum_buffer"] = momentum * param_state["momentum_buffer"] + d_p
                    d_p = d_p + momentum * buf if group["nesterov"] else buf
                p.value = p.value - group["lr"] * d_p
        return loss


def test_a_subclass_may_take_arguments_of_its_own() -> None:
    """They are no hyperparameters of the rule, which does not know them."""

    class Clipped(optim.Adam):
        def __init__(self, params: Any, lr: LearningRate = 0.1, clip: float = 0.5, *, log: Any = print):
            super().__init__(params, lr=lr)
            self.clip, self.log = clip, log

        def step(self, *args: Any) -> Any:
            optim.clip_grad_value_(self, self.clip)
            return super().step(*args)

    class Plain(optim.Optimizer):
        def __init__(self, params: Any, transform: Any = jnp.sign):
            super().__init__(params, dict(transform=transform))

    box = optim.Parameter(jnp.ones(2))
    optimizer = Clipped([box], clip=0.25)
    box.grad = jnp.array([1.0, 0.1])
    optimizer.step()
    np.testing.assert_allclose(optimizer.state[box]["exp_avg"], [0.025, 0.01], rtol=1e-6)
    assert "clip" not in optimizer.param_groups[0]
    optim.functional.factory(Clipped)(lr=0.2).init([jnp.ones(2)])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        Clipped([box], lr=-1)
    assert Plain([box]).param_groups[0]["transform"] is jnp.sign
    with pytest.raises(NotImplementedError, match="only a rule has a functional form"):
        _ = Plain([box]).algorithm


def test_an_optimizer_around_another_need_not_call_init() -> None:
    """As wrappers written for PyTorch do, such as Lookahead."""

    class Around(optim.Optimizer):
        def __init__(self, inner: Any):
            self.inner = inner
            self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

        def step(self) -> None:
            self.inner.step()

    box = optim.Parameter(jnp.ones(2))
    optimizer = Around(optim.SGD([box], lr=0.5, momentum=0.9))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        box.grad = jnp.ones(2)
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(box.value, 1 - 0.5 - 0.25 * 1.9, rtol=1e-6)
    assert len(calls) == 2
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.125
    copy.deepcopy(optimizer).step()


@pytest.mark.parametrize("name", ["Adam", "LBFGS"])
def test_state_set_as_a_dict_is_taken(name: str) -> None:
    box = optim.Parameter(jnp.ones(2))
    loss = lambda params: jnp.sum(params[0] ** 2 + params[0] ** 4)  # noqa: E731
    optimizer, twin = (getattr(optim, name)([box], lr=0.1) for _ in range(2))
    optimizer.step(loss)
    copied = dict(optimizer.state[box])
    value = box.value
    optimizer.step(loss)
    expected, box.value = box.value, value
    twin.state[box] = copied
    assert "<table>" in twin._repr_html_()
    twin.step(loss)
    np.testing.assert_array_equal(box.value, expected)
    twin.state = defaultdict(dict)
    twin.step(loss)
    assert "<table>" in twin._repr_html_()


@pytest.mark.parametrize("call", [lambda o: o.step(None, 1), lambda o: o.step([jnp.ones(2)], 1)])
def test_arguments_without_a_loss_function_are_refused(call: Any) -> None:
    box = optim.Parameter(jnp.ones(2))
    box.grad = jnp.ones(2)
    with pytest.raises(TypeError, match="takes no further arguments, got 1"):
        call(optim.SGD([box]))
    np.testing.assert_array_equal(box.value, [1, 1])


def test_keywords_from_a_hook_are_those_of_step() -> None:
    box = optim.Parameter(jnp.ones(2))
    optimizer = optim.SGD([box], lr=1.0)
    with optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"grads_or_loss": [jnp.full(2, 3.0)]})):
        optimizer.step()
    np.testing.assert_array_equal(box.value, [-2, -2])
    with (
        optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"grads": 1})),
        pytest.raises(TypeError, match="unexpected keyword argument 'grads'"),
    ):
        optimizer.step([jnp.ones(2)])
    np.testing.assert_array_equal(box.value, [-2, -2])


def test_messages_name_boxes_by_the_names_of_their_pairs_or_by_their_place() -> None:
    def boxes() -> list[Any]:
        return [optim.Parameter(jnp.ones(2)) for _ in range(2)]

    bad = [jnp.ones(2), jnp.ones(3)]
    with pytest.raises(ValueError, match=r"gradient of 'enc\.b' has shape \(3,\)"):
        optim.Adam(zip(["enc.a", "enc.b"], boxes(), strict=True)).step({"enc.a": bad[0], "enc.b": bad[1]})
    with pytest.raises(ValueError, match=r"gradient of 'params\[1\] of param_groups\[1\]' has shape \(3,\)"):
        optim.Adam(groups(boxes(), boxes())).step([bad[:1] * 2, bad])


def test_a_failing_write_into_the_module_loses_no_state() -> None:
    """The program has donated the slots by then."""

    class Guarded(nnx.BatchStat[Any]):
        armed = False

        def set_value(self, value: Any, **kwargs: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt
            super().set_value(value, **kwargs)

    class Counting(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(3))
            self.calls = Guarded(jnp.zeros(()))

    def loss(model: Any) -> Any:
        return jnp.sum(model.w[...] ** 2)

    model = Counting()
    optimizer = optim.Adam(model)
    optimizer.step(loss)
    optimizer.step(loss)
    Guarded.armed = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss)
    Guarded.armed = False
    optimizer.step(loss)
    assert optimizer.state_dict()["state"][0]["step"] == 4
    assert np.isfinite(optimizer.state_dict()["state"][0]["exp_avg"]).all()


def test_slots_that_start_from_the_parameter_are_arrays_of_their_own() -> None:
    """The step updates slots in place, and a parameter that a slot starts from may be in other hands."""

    class Slots(NamedTuple):
        average: Any
        anchor: Any

    class Scalars(NamedTuple):
        lr: Any

    def update(param: Any, grad: Any, slots: Any, scalars: Any, flags: Any) -> Any:
        param = param - scalars.lr * grad
        return param, Slots(0.5 * slots.average + 0.5 * param, slots.anchor)

    class Averaged(optim.Optimizer):
        rule = Rule(Slots, lambda p, h, f: Slots(p, p), lambda step, hyper: Scalars(hyper.lr), update)

        def __init__(self, params: Any, lr: float = 1.0) -> None:
            super().__init__(params, dict(lr=lr))

    start = jnp.array([1.0, 2.0])
    optimizer = Averaged([start])
    algorithm = optim.functional.factory(Averaged)()
    params, state = [start], algorithm.init([start])
    compiled = jax.jit(lambda p, g, s: algorithm.update(p, g, s)[::-1], donate_argnums=2)
    for _ in range(2):
        optimizer.step([jnp.ones(2)])
        state, params = compiled(params, [jnp.ones(2)], state)
    np.testing.assert_array_equal(start, [1, 2])
    np.testing.assert_array_equal(optimizer.params[0], params[0])
    entries = optimizer.state[optimizer.param_groups[0]["params"][0]]
    for average, anchor in ((entries["average"], entries["anchor"]), (state.average[0], state.anchor[0])):
        np.testing.assert_array_equal(average, [-0.25, 0.75])
        np.testing.assert_array_equal(anchor, [1, 2])


def test_the_facade_inside_jit_is_differentiable() -> None:
    """Rates that are tracers become scalars of the program; nothing is read on the host."""

    def last(lr: Any, start: Any) -> Any:
        optimizer = optim.SGD([start], lr=1.0)
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(3):
            optimizer.step([2 * optimizer.params[0]])
        return optimizer.params[0]

    value, slope = jax.jit(jax.value_and_grad(last))(0.1, jnp.array(1.0))
    np.testing.assert_allclose(value, 0.8**3, rtol=1e-6)
    np.testing.assert_allclose(slope, -6 * 0.8**2, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("form", ["grads", "loss", "backward"])
def test_the_facade_is_differentiable_as_the_functional_core(form: str, donate: bool, compiled: bool) -> None:
    """State that a step has updated in place would be missing on the way back."""

    def loss(params: Any) -> Any:
        return jnp.sum((params["w"] - 0.3) ** 4)

    def by_class(lr: Any, params: Any) -> Any:
        optimizer = optim.Adam(params, lr=lr, differentiable=True)
        optimizer.donate = donate
        for _ in range(3):
            if form == "backward":
                optimizer.zero_grad()
                optimizer.backward(loss)
            optimizer.step(*{"grads": [jax.grad(loss)(optimizer.params)], "loss": [loss], "backward": []}[form])
        return loss(optimizer.params)

    def by_function(lr: Any, params: Any) -> Any:
        adam = optim.functional.adam(lr=lr)
        state = adam.init(params)
        for _ in range(3):
            params, state = adam.update(params, jax.grad(loss)(params), state)
        return loss(params)

    at = 0.1, {"w": jnp.array([1.0, -2.0])}
    slopes = jax.grad(by_class, argnums=(0, 1))
    ours = (jax.jit(slopes) if compiled else slopes)(*at)
    expected = jax.jit(jax.grad(by_function, argnums=(0, 1)))(*at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, expected)


@pytest.mark.usefixtures("x64")
def test_a_subclass_that_overrides_step_in_python() -> None:
    """It moves as `optim.SGD` does, with hooks, closure, state dict and scheduler."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    arrays = [jnp.asarray(v) for v in VALUES]
    plain, ours = PlainSGD(list(map(optim.Parameter, arrays)), **options), optim.SGD(arrays, **options)
    calls: list[str] = []
    plain.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    plain.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    scheduler = optim.lr_scheduler.StepLR(plain, 2)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return mse(forward(*params, x), y)

    for step in range(4):

        def closure(step: int = step) -> Any:
            plain.zero_grad()
            return plain.backward(loss, *batch(step))

        ours.param_groups[0]["lr"] = plain.param_groups[0]["lr"]
        np.testing.assert_allclose(plain.step(closure), ours.step(loss, *batch(step)), rtol=1e-12)
        scheduler.step()
    for a, b in zip(plain.params, ours.params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert calls == ["pre", "post"] * 4

    resumed = PlainSGD([optim.Parameter(value) for value in plain.params], **options)
    resumed.load_state_dict(plain.state_dict())
    for optimizer in (plain, resumed):
        optimizer.zero_grad()
        optimizer.backward(loss, *batch(9))
        optimizer.step()
    for a, b in zip(plain.params, resumed.params, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_subclass_that_extends_step_runs_hooks_once() -> None:
    class Logged(optim.SGD):
        def step(self, *args: Any) -> Any:
            log.append("step")
            return super().step(*args)

    log: list[str] = []
    optimizer = Logged([jnp.ones(2)], lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: log.append("post"))
    optimizer.step([jnp.ones(2)])
    assert log == ["pre", "step", "post"]
    np.testing.assert_allclose(optimizer.params[0], 0.9, rtol=1e-6)


def test_a_subclass_without_rule_and_step_says_what_it_lacks() -> None:
    class Nothing(optim.Optimizer):
        def __init__(self, params: Iterable[Any]):
            super().__init__(params, {})

    with pytest.raises(NotImplementedError, match="Nothing has no `rule`: it must set one or override step"):
        Nothing([jnp.ones(2)]).step([jnp.ones(2)])


def _set_value(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0].value = jnp.array([5.0, -5.0])


def _set_state(optimizer: Any) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"] = jnp.array([1.0, 2.0])


def _replace_state(optimizer: Any) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]] = ParameterState({"momentum_buffer": jnp.array([1.0, 2.0])})


def _forget_state(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def _move_to_the_other_group(optimizer: Any) -> None:
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def _reorder(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _drop_from_the_group(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


def _no_momentum(optimizer: Any) -> None:
    optimizer.param_groups[0]["momentum"] = 0


def _other_rate(optimizer: Any) -> None:
    optimizer.param_groups[1]["lr"] = 0.5


def _read_state(optimizer: Any) -> None:
    list(optimizer.state.values())[1]["momentum_buffer"]


def _reload(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        _set_value,
        _set_state,
        _replace_state,
        _forget_state,
        _move_to_the_other_group,
        _reorder,
        _drop_from_the_group,
        _no_momentum,
        _other_rate,
        _read_state,
        _reload,
    ],
)
def test_a_step_takes_over_nothing_that_has_changed(change: Any) -> None:
    def make() -> Any:
        boxes = [optim.Parameter(jnp.array([1.0, 2.0]) + k) for k in range(4)]
        groups = [{"params": boxes[:2]}, {"params": boxes[2:], "lr": 0.2}]
        return boxes, optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)

    boxes, optimizer = make()
    others, forgetful = make()
    for index in range(6):
        if index == 3:
            change(optimizer)
            change(forgetful)
        for box, other in zip(boxes, others, strict=True):
            box.grad = other.grad = jnp.sin(box.value)
        optimizer.step()
        forgetful._stepper.planner.plan = None
        forgetful.step()
        for box, other in zip(boxes, others, strict=True):
            np.testing.assert_array_equal(box.value, other.value)
    for box, other in zip(boxes, others, strict=True):
        ours, theirs = dict(optimizer.state.get(box, {})), dict(forgetful.state.get(other, {}))
        assert ours.keys() == theirs.keys()
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_a_step_remembers_holds_no_array_that_is_of_no_use() -> None:
    boxes = [optim.Parameter(jnp.array([1.0, 2.0]) + k) for k in range(2)]
    optimizer = optim.Adam(boxes, lr=0.1)

    def step(*with_gradient: int) -> None:
        for index, box in enumerate(boxes):
            box.grad = jnp.ones(2) if index in with_gradient else None
        optimizer.step()

    step(0, 1)
    step(0, 1)
    old = [weakref.ref(box.value) for box in boxes] + [weakref.ref(optimizer.state[boxes[0]]["exp_avg"])]
    step(0)  # the other one is frozen from now on
    step(0)
    gc.collect()
    assert [reference() is None for reference in old] == [True, False, True]


# --- Donation of the parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_loss", [False, True])
def test_donate_updates_parameters_in_place(by_loss: bool) -> None:
    def loss(params: Any) -> Any:
        return sum(jnp.sum(jnp.cos(value)) for value in params)

    def make() -> Any:
        return optim.Adam([jnp.arange(4.0), jnp.ones((2, 2)), jnp.ones((2, 2))], lr=0.1)

    kept, donating = make(), make()
    donating.donate = True
    for _ in range(4):
        before = {name: optimizer.params for name, optimizer in (("kept", kept), ("donating", donating))}
        for optimizer in (kept, donating):
            optimizer.step(loss) if by_loss else optimizer.step(jax.grad(loss)(optimizer.params))
        assert not any(array.is_deleted() for array in before["kept"])
        assert all(array.is_deleted() for array in before["donating"])
        jax.tree.map(np.testing.assert_array_equal, kept.params, donating.params)


def test_with_donate_a_compiled_step_needs_no_memory_of_its_own(usual: Any) -> None:
    optimizer = optim.Adam([jnp.ones((256, 256)) for _ in range(3)], lr=0.1)
    grads = {box: jnp.ones((256, 256)) for box in optimizer.param_groups[0]["params"]}
    plan, rows = optimizer._stepper.planner.planned(optimizer.param_groups, optimizer.state, grads)
    (call,) = plan.calls(grads, rows, in_place=True)
    compiled = update_bucket.donating((1, 2)).lower(*call.args).compile(usual)
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 1000
    assert memory.alias_size_in_bytes == 9 * 256 * 256 * 4


# --- Rules that update parameters of one shape together, and rules that refuse some parameters ----------------------


class Norms(NamedTuple):
    norm: Any


class Rate(NamedTuple):
    lr: Any


def _only_matrices(param: Any, flags: Any) -> None:
    if param.ndim != 2:
        raise ValueError(f"only matrices, got shape {param.shape}")


class Batched(optim.Optimizer):
    rule = Rule(
        slots=Norms,
        init=lambda param, hyper, flags: Norms(jnp.zeros((), param.dtype)),
        scalars=lambda step, hyper: Rate(hyper.lr),
        update=lambda params, grads, slots, scalars, flags: (
            [p - s.lr * (g @ g.T @ p) for p, g, s in zip(params, grads, scalars, strict=True)],
            [Norms(slot.norm + jnp.sum(g)) for slot, g in zip(slots, grads, strict=True)],
        ),
        check_param=_only_matrices,
        takes="alike",
    )

    def __init__(self, params: Any, lr: LearningRate = 1e-3):
        super().__init__(params, dict(lr=lr))


def test_a_batched_rule_updates_each_parameter_by_its_own() -> None:
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape)) for shape in [(2, 3), (4, 2), (2, 3), (2, 3)]]
    grads = [jnp.asarray(rng.normal(size=value.shape)) for value in params]
    expected = [p - lr * (g @ g.T @ p) for p, g, lr in zip(params, grads, (0.1, 0.1, 0.1, 0.2), strict=True)]

    optimizer = Batched([{"params": params[:3]}, {"params": params[3:], "lr": 0.2}], lr=0.1)
    optimizer.step([grads[:3], grads[3:]])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), [*optimizer.params[0], *optimizer.params[1]], expected
    )

    algorithm = optim.functional.factory(Batched)(lr=[0.1, 0.1, 0.1, 0.2])
    state = algorithm.init(params)
    updated, state = jax.jit(algorithm.update)(params, [*grads[:1], None, *grads[2:]], state)
    expected[1] = params[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updated, expected)
    assert [float(norm) for norm in state.norm] == pytest.approx(
        [float(jnp.sum(grads[0])), 0, *(float(jnp.sum(grad)) for grad in grads[2:])]
    )


def test_a_rule_that_refuses_a_parameter_names_it() -> None:
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    for make in (Batched, optim.functional.factory(Batched)().init):
        with pytest.raises(ValueError, match=r"only matrices, got shape \(2,\) \('bias'\)"):
            make(params)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_group_may_be_empty(named: bool, first: bool) -> None:
    """In PyTorch only among groups without names."""
    box = optim.Parameter(1.0)
    groups = [{"params": [("w", box)] if named else [box]}, {"params": [], "lr": 0.5}]
    optimizer = optim.Adam(groups[::-1] if first else groups, lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    box.grad = 1.0
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [("v", optim.Parameter(1.0))] if named else [optim.Parameter(1.0)]})
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == ([0, 1, 1] if first else [1, 0, 1])
    assert "<td>0</td>" in optimizer._repr_html_()
