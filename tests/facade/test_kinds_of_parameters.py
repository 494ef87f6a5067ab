"""One network in every kind of parameters, trained by every form of step, takes PyTorch's trajectory."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from networks import HEAD, VALUES, Net, batch, forward, groups, module_leaves, module_loss, mse

import optimjax as optim

NAMES = ("base.kernel", "base.bias", "head.kernel")
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}
STEPS = 6


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
