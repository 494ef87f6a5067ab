"""Modules and variables of ``flax.nnx`` are updated in place, in every kind of container, and where they are tied."""

import copy
import dataclasses
import gc
import itertools
import pickle
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_values import KERNEL, Named, X, names_of

import optimjax as optim

# --- nnx: containers of every kind ----------------------------------------------------------------------------------


def layers() -> list[Any]:
    rngs = nnx.Rngs(0)
    return [nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)]


class Whole(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List(layers())


def as_state() -> Any:
    return nnx.state(nnx.List(layers()), nnx.Param)


def state_loss(state: Any, x: Any) -> Any:
    graphdef, _, rest = nnx.split(nnx.List(layers()), nnx.Param, ...)
    return chain_loss(nnx.merge(graphdef, state, rest), x)


def whole_state_loss(state: Any, x: Any) -> Any:
    return chain_loss(nnx.merge(nnx.graphdef(nnx.List(layers())), state), x)


def chain_loss(parts: Any, x: Any) -> Any:
    for layer in parts:
        x = layer(x)
    return jnp.mean((x - 1) ** 2)


IN_ORDER = ["0.bias", "0.kernel", "1.bias", "1.scale", "2.bias", "2.kernel"]
CONTAINERS: dict[str, Any] = {
    "list": (layers, chain_loss, IN_ORDER),
    "tuple": (lambda: tuple(layers()), chain_loss, IN_ORDER),
    "dict": (
        lambda: dict(zip("abc", layers(), strict=True)),
        lambda parts, x: chain_loss(parts.values(), x),
        ["a.bias", "a.kernel", "b.bias", "b.scale", "c.bias", "c.kernel"],
    ),
    "NamedTuple": (
        lambda: Named(layers()[0], layers()[1:]),
        lambda parts, x: chain_loss([parts.kernel, *parts.bias], x),
        ["kernel.bias", "kernel.kernel", "bias.0.bias", "bias.0.scale", "bias.1.bias", "bias.1.kernel"],
    ),
    "nnx.List": (lambda: nnx.List(layers()), chain_loss, IN_ORDER),
    "nnx.Dict": (
        lambda: nnx.Dict(zip("abc", layers(), strict=True)),
        lambda parts, x: chain_loss([parts["a"], parts["b"], parts["c"]], x),
        ["a.bias", "a.kernel", "b.bias", "b.scale", "c.bias", "c.kernel"],
    ),
    "nnx.Sequential": (
        lambda: nnx.Sequential(*layers()),
        lambda model, x: chain_loss([model], x),
        [f"layers.{name}" for name in IN_ORDER],
    ),
    "attribute": (Whole, lambda model, x: chain_loss(model.layers, x), [f"layers.{name}" for name in IN_ORDER]),
    "state": (as_state, state_loss, IN_ORDER),
}


def arrays_of(params: Any) -> list[np.ndarray]:
    """By value, because a copy must not see what happens to the variables."""
    return [np.array(box) for box in optim.parameters(params)]


@pytest.fixture(scope="module")
def trained() -> list[np.ndarray]:
    """What three steps by hand make of the layers."""
    parts = layers()
    for _ in range(3):
        _, grads = nnx.value_and_grad(lambda parts: chain_loss(parts, X), has_aux=False)(parts)
        for part, grad in zip(parts, grads, strict=True):
            nnx.update(part, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(part, nnx.Param), grad))
    return arrays_of(parts)


@pytest.mark.parametrize("form", ["backward", "loss", "grads"])
@pytest.mark.parametrize(("make", "loss", "names"), CONTAINERS.values(), ids=CONTAINERS)
def test_modules_in_every_container_are_updated_in_place(
    make: Any, loss: Any, names: list[str], form: str, trained: Any
) -> None:
    params = make()
    optimizer = optim.SGD(params, lr=0.1)
    assert optimizer.params is params
    assert names_of(optimizer) == names == [name for name, _ in optim.named_parameters(params)]
    for _ in range(3):
        if form == "grads":
            optimizer.step((jax.grad if make is as_state else nnx.grad)(loss)(params, X))
        elif form == "loss":
            optimizer.step(loss, X)
        else:
            optimizer.zero_grad()
            optimizer.backward(loss, X)
            optimizer.step()
    for ours, theirs in zip(arrays_of(params), trained, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize(
    ("make", "loss"),
    [*(entry[:2] for entry in CONTAINERS.values()), (lambda: nnx.state(nnx.List(layers())), whole_state_loss)],
    ids=[*CONTAINERS, "state with statistics"],
)
def test_a_copy_has_modules_of_its_own_in_every_container(make: Any, loss: Any, duplicate: Any) -> None:
    optimizer = optim.Adam(make(), lr=0.1)
    optimizer.step(loss, X)
    twin = duplicate(optimizer)
    before = arrays_of(optimizer.params)
    twin.step(loss, X)
    for array, now in zip(before, arrays_of(optimizer.params), strict=True):
        np.testing.assert_array_equal(array, now)
    optimizer.step(loss, X)
    for ours, theirs in zip(arrays_of(twin.params), arrays_of(optimizer.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_groups_of_lists_of_layers() -> None:
    first, norm, last = layers()
    optimizer = optim.SGD([{"params": [first, norm]}, {"params": last, "lr": 0.01}], lr=0.1)
    assert names_of(optimizer) == ["0.bias", "0.kernel", "1.bias", "1.scale", "bias", "kernel"]
    before = arrays_of([first, norm, last])
    optimizer.backward(lambda groups, x: chain_loss([*groups[0], groups[1]], x), X)
    grads = [np.asarray(box.grad) for box in optim.parameters([first, norm, last])]
    optimizer.step()
    for now, old, grad, rate in zip(arrays_of([first, norm, last]), before, grads, [0.1] * 4 + [0.01] * 2, strict=True):
        np.testing.assert_allclose(now, old - np.float32(rate) * grad, rtol=1e-6)


def test_rules_choose_among_layers_in_a_list() -> None:
    parts = layers()
    groups = optim.group_parameters(parts, [{"params": "1.*", "requires_grad": False}, {"params": "*.bias", "lr": 1.0}])
    optimizer = optim.SGD(groups, lr=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.bias", "2.bias"],
        ["0.kernel", "2.kernel"],
    ]
    assert optimizer.params is parts
    before = arrays_of(parts[1])
    optimizer.step(chain_loss, X)
    for array, now in zip(before, arrays_of(parts[1]), strict=True):
        np.testing.assert_array_equal(array, now)


BESIDE: dict[str, tuple[Any, str]] = {
    "array": (lambda: jnp.ones(2), r"^parameter '3' is an array alongside flax\.nnx modules.* make it an nnx\.Param"),
    "NumPy array": (lambda: np.ones(2), "^parameter '3' is an array"),
    "box": (
        lambda: {"w": optim.Parameter(1.0)},
        r"^parameter '3\.w' is an optim\.Parameter alongside flax\.nnx modules",
    ),
    "generator": (lambda: optim.parameters(layers()), r"^'3' is a generator.* \[\*optim\.parameters\(a\)"),
    "iterator": (lambda: iter(layers()), "^'3' is a list_iterator"),
    "values": (lambda: dict(a=layers()[0]).values(), "^'3' is a dict_values"),
    "items": (lambda: dict(a=layers()[0]).items(), "^'3' is a dict_items"),
    "set": (lambda: {layers()[0]}, "^'3' is a set"),
}


@pytest.mark.parametrize(("make", "message"), BESIDE.values(), ids=BESIDE)
def test_what_would_be_passed_over_beside_modules_is_refused(make: Any, message: str) -> None:
    """An array would have to be updated in a copy, and the modules in place."""
    for take in (lambda params: optim.SGD(params, lr=0.1), lambda params: list(optim.parameters(params))):
        for params in ([*layers(), make()], {"net": layers()[0], "3": make()}):
            with pytest.raises(TypeError, match=message):
                take(params)


def test_what_is_static_beside_modules_is_let_through() -> None:
    beside = ["relu", 2, 0.5, None, jnp.tanh, np.arange(3), {"names"}, range(2)]
    assert names_of(optim.SGD([layers()[0], *beside], lr=0.1)) == ["0.bias", "0.kernel"]


@pytest.mark.parametrize("beside", [lambda: layers()[0], lambda: jnp.ones(2)], ids=["module", "array"])
def test_tensors_of_pytorch_among_parameters_are_refused(beside: Any, torch: Any) -> None:
    for tensor in (torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"^parameter 'a\.0' is a PyTorch tensor.* convert it"):
            optim.SGD({"a": [tensor], "b": beside()}, lr=0.1)
    with pytest.raises(TypeError, match=r"^parameter '0' is a PyTorch tensor"):
        optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    assert all(name.startswith("b") for name in names_of(optim.SGD({"a": torch.arange(2), "b": beside()}, lr=0.1)))


def test_a_parameter_that_holds_a_tree_is_refused_by_name() -> None:
    """`nnx.grad` would differentiate it."""
    for value in ({"w": jnp.ones(2)}, [np.ones(2)], 1.0):
        model = nnx.Dict(inner=nnx.Dict(bad=nnx.Param(value), good=nnx.Param(jnp.ones(2))))
        for take in (lambda model: optim.SGD(model, lr=0.1), lambda model: list(optim.parameters(model))):
            with pytest.raises(TypeError, match=rf"nnx\.Param 'inner\.bad' holds a {type(value).__name__}, .* its own"):
                take(model)
    others = [nnx.Param(value) for value in (None, jnp.arange(2), jax.random.key(0), {"count": 1}, jnp.ones(2))]
    assert names_of(optim.SGD(nnx.List(others), lr=0.1)) == ["4"]


# --- nnx: modules that have no hash ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Dataclass(nnx.Module):
    kernel: nnx.Param
    label: str = "net"


@nnx.dataclass
class NnxDataclass(nnx.Pytree):
    kernel: nnx.Param


class Equal(nnx.Module):
    def __init__(self, kernel: nnx.Param):
        self.kernel = kernel

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)


UNHASHABLE: dict[str, Any] = {
    "nnx.List": lambda kernel: nnx.List([kernel]),
    "dataclass": Dataclass,
    "nnx.dataclass": NnxDataclass,
    "with __eq__": Equal,
}


def kernel_loss(model: Any, x: Any) -> Any:
    kernel = model[0] if isinstance(model, nnx.List) else model.kernel
    return jnp.mean((x @ kernel[...] - 1) ** 2)


@pytest.mark.parametrize("make", UNHASHABLE.values(), ids=UNHASHABLE)
def test_modules_without_a_hash_train_and_are_copied(make: Any) -> None:
    model, other = make(nnx.Param(jnp.asarray(KERNEL))), make(nnx.Param(jnp.asarray(KERNEL)))
    with pytest.raises(TypeError, match="unhashable"):
        hash(model)
    optimizer, expected = optim.SGD(model, lr=0.1), jnp.asarray(KERNEL)
    (box,) = optim.parameters(model)
    assert box is optimizer.param_groups[0]["params"][0] is not next(optim.parameters(other))
    for _ in range(2):
        expected -= 0.1 * jax.grad(lambda kernel: jnp.mean((X @ kernel - 1) ** 2))(expected)
        optimizer.step(kernel_loss, X)
    np.testing.assert_allclose(box.value, expected, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(optimizer)
    twin.backward(kernel_loss, X)
    twin.step()
    np.testing.assert_allclose(box.value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(arrays_of(other)[0], KERNEL)


@pytest.mark.parametrize("make", [lambda kernel: nnx.Dict(kernel=kernel), *UNHASHABLE.values()])
def test_a_parameter_lives_as_long_as_a_module_that_holds_its_variable(make: Any) -> None:
    variable = nnx.Param(jnp.ones(2))
    first, second = make(variable), make(variable)
    box = weakref.ref(next(optim.parameters([first, second])))
    list(optim.parameters(second))
    kept = box()
    assert kept is not None
    kept.requires_grad = False
    del kept, first
    gc.collect()
    (kept,) = optim.parameters(second)
    assert kept is box()
    assert not kept.requires_grad
    del kept, second
    gc.collect()
    assert box() is None
    for _ in range(100):  # in the place of the old ones
        (fresh,) = optim.parameters(make(variable))
        assert fresh.requires_grad
        fresh.requires_grad = False
        del fresh


# --- nnx: variables as parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hand_in", "names"),
    [
        (lambda net: [net.layers[0].kernel, net.layers[2].bias], None),
        (lambda net: (variable for variable in (net.layers[0].kernel, net.layers[2].bias)), None),
        (lambda net: [("first", net.layers[0].kernel), ("last", net.layers[2].bias)], [["first", "last"]]),
        (lambda net: {"first": net.layers[0].kernel, "last": net.layers[2].bias}.items(), [["first", "last"]]),
        (lambda net: [{"params": net.layers[0].kernel}, {"params": [net.layers[2].bias], "lr": 0.1}], None),
        (lambda net: [net.layers[0].kernel, dict(optim.named_parameters(net))["layers.2.bias"]], None),
    ],
    ids=["list", "generator", "named", "items", "groups", "beside a box"],
)
def test_variables_are_parameters_as_their_boxes_are(hand_in: Any, names: Any) -> None:
    """As in `SGD([model.fc.weight, model.fc.bias])`."""
    net = Whole()
    optimizer = optim.SGD(hand_in(net), lr=0.1)
    boxes = dict(optim.named_parameters(net))
    chosen = [boxes["layers.0.kernel"], boxes["layers.2.bias"]]
    assert list(itertools.chain(*(group["params"] for group in optimizer.param_groups))) == chosen
    assert [str(box) for box in chosen] == [
        "layers.0.kernel",
        "layers.2.bias",
    ]  # known by the module's path from now on
    assert names is None or [group["param_names"] for group in optimizer.param_groups] == names
    before = {name: np.array(box) for name, box in boxes.items()}
    loss = lambda net, x: chain_loss(net.layers, x)  # noqa: E731
    optimizer.backward(loss, net, X)
    assert {name for name, box in boxes.items() if box.grad is not None} == {"layers.0.kernel", "layers.2.bias"}
    optimizer.step()
    for name, box in boxes.items():
        expected = before[name] if box.grad is None else before[name] - np.float32(0.1) * np.asarray(box.grad)
        np.testing.assert_allclose(box.value, expected, rtol=1e-6)


def test_a_variable_known_by_itself_gets_its_name_from_the_module() -> None:
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    (box,) = optim.SGD([layer.kernel], lr=0.1).param_groups[0]["params"]
    assert str(box) == "parameter"
    assert dict(optim.named_parameters(layer))["kernel"] is box
    assert str(box) == "kernel"
    twin, twin_box = copy.deepcopy((layer, box))
    assert dict(optim.named_parameters(twin))["kernel"] is twin_box is not box


def test_variables_that_are_no_list_of_parameters() -> None:
    net = Whole()
    with pytest.raises(TypeError, match="got a single Param"):
        optim.SGD(net.layers[0].kernel, lr=0.1)
    with pytest.raises(TypeError, match="must be a floating array, got int32"):
        optim.SGD([nnx.Param(jnp.arange(2))], lr=0.1)
    with pytest.raises(TypeError, match=r"one of the params is Linear, at place 0$"):
        optim.SGD([net.layers[0], net.layers[2].kernel], lr=0.1)


# --- Tied parameters ------------------------------------------------------------------------------------------------


def test_layers_that_share_a_variable_have_one_parameter() -> None:
    first, _, last = layers()
    second = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    second.kernel = first.kernel
    loss = lambda parts, x: jnp.mean((parts[0](x) * parts[1](x)) ** 2)  # noqa: E731
    optimizer = optim.SGD([first, second, first, last], lr=0.1)
    assert names_of(optimizer) == ["0.bias", "0.kernel", "1.bias", "3.bias", "3.kernel"]
    expected = jax.grad(lambda kernel: jnp.mean(((X @ kernel) * (X @ kernel)) ** 2))(first.kernel[...])
    old = np.array(first.kernel)
    optimizer.backward(loss, X)
    np.testing.assert_allclose(dict(optim.named_parameters(first))["kernel"].grad, expected, rtol=1e-4)
    optimizer.step()
    np.testing.assert_allclose(first.kernel[...], old - 0.1 * expected, rtol=1e-5)
    assert second.kernel is first.kernel
    with pytest.raises(ValueError, match=r"in more than one parameter group: 0\.kernel"):
        optim.SGD([{"params": first}, {"params": second}], lr=0.1)


@pytest.mark.parametrize("given", [lambda w: [w, w], lambda w: [("a", w), ("b", w)]], ids=["twice", "two names"])
def test_one_parameter_under_two_names_is_refused_by_name(given: Any) -> None:
    with pytest.raises(ValueError, match=r"appears more than once of param_groups\[0\]: w$"):
        optim.SGD(given(optim.Parameter(1.0, name="w")), lr=0.1)
