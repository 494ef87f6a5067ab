"""Trees of every class and modules of Equinox are trained, keep their class, and have dotted names."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, struct
from flax.core import freeze
from model_values import KERNEL, Named, X, names_of

import optimjax as optim
from optimjax._core.numerics import widened

BIAS = np.random.default_rng(2).normal(size=3).astype(np.float32)


# --- Trees of every class -------------------------------------------------------------------------------------------


@chex.dataclass
class Chex:
    kernel: Any
    bias: Any


@chex.dataclass(frozen=True, mappable_dataclass=False)
class FrozenChex:
    kernel: Any
    bias: Any


@struct.dataclass
class Struct:
    kernel: Any
    bias: Any
    label: str = struct.field(pytree_node=False, default="static")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    kernel: Any
    bias: Any


@jax.tree_util.register_pytree_node_class
class Nameless:
    """A node that says nothing of its keys."""

    def __init__(self, kernel: Any, bias: Any):
        self.kernel, self.bias = kernel, bias

    def tree_flatten(self) -> Any:
        return (self.kernel, self.bias), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        return cls(*children)


class Partitioned(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        ones = linen.initializers.ones
        return linen.Dense(3, kernel_init=linen.with_partitioning(ones, ("a", "b")), bias_init=ones)(x)


def make(cls: Any, **fields: Any) -> Any:
    """Pyright sees no constructor of dataclasses that other decorators make."""
    return cls(**fields)


TREES = {
    "FrozenDict": (freeze({"a": {"kernel": KERNEL, "bias": BIAS}}), ["a.bias", "a.kernel"]),
    "NamedTuple": ((Named(KERNEL), [Named(BIAS)]), ["0.kernel", "1.0.kernel"]),
    "chex": (make(Chex, kernel=KERNEL, bias={"x": BIAS}), ["bias.x", "kernel"]),
    "frozen chex": (make(FrozenChex, kernel=KERNEL, bias=(BIAS,)), ["bias.0", "kernel"]),
    "struct": (make(Struct, kernel=KERNEL, bias=[BIAS]), ["kernel", "bias.0"]),
    "dataclass": ({"layers": [Registered(KERNEL, BIAS)]}, ["layers.0.kernel", "layers.0.bias"]),
    "own node": ([Nameless(KERNEL, BIAS)], ["0.0", "0.1"]),
    "integers": ({0: KERNEL, 1: {2: BIAS}}, ["0", "1.2"]),
    "haiku": ({"net/~/linear": {"w": KERNEL, "b": BIAS}}, ["net/~/linear.b", "net/~/linear.w"]),
    "dots in keys": ({"a.b": KERNEL, "a": {"b": BIAS}}, ["['a']['b']", "['a.b']"]),
    "linen metadata": (
        Partitioned().init(jax.random.key(0), X),
        ["params.Dense_0.bias", "params.Dense_0.kernel.value"],
    ),
    "one array": (jnp.asarray(KERNEL), [""]),
    "a number": (jnp.array(2.0), [""]),
    "the same array twice": ((lambda array: {"a": array, "b": array})(jnp.asarray(BIAS)), ["a", "b"]),
}


def sum_of_squares(tree: Any, scale: Any = 1.0) -> Any:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return scale * sum(jnp.sum(jnp.square(jnp.abs(widened(leaf)).astype(jnp.float32))) for leaf in leaves)


@pytest.mark.parametrize(("tree", "names"), TREES.values(), ids=TREES)
def test_trees_keep_their_classes_and_have_dotted_names(tree: Any, names: list[str]) -> None:
    optimizer, by_grads = optim.Adam(tree, lr=0.1), optim.Adam(tree, lr=0.1)
    assert names_of(optimizer) == names
    for step in range(2):
        if step:
            optimizer.zero_grad()
            optimizer.backward(sum_of_squares)
            optimizer.step()
        else:
            optimizer.step(sum_of_squares)
        by_grads.step(jax.grad(sum_of_squares)(by_grads.params))
        assert type(optimizer.params) is type(by_grads.params)
        assert jax.tree.structure(optimizer.params) == jax.tree.structure(tree)  # with what is static in it
        for ours, other, old in zip(*map(jax.tree.leaves, (optimizer.params, by_grads.params, tree)), strict=True):
            np.testing.assert_allclose(ours, other, rtol=1e-6)
            assert ours.dtype == old.dtype
            assert not np.any(ours == old)  # each leaf for itself, also of one array that is there twice
    twin = optim.Adam(tree, lr=0.1)
    twin.load_state_dict(optimizer.state_dict())
    assert [float(entries["step"]) for entries in twin.state.values()] == [2] * len(names)


def test_every_floating_dtype_in_one_tree() -> None:
    tree = {
        "bfloat16": jnp.ones(2, jnp.bfloat16),
        "complex64": jnp.array([1 + 2j, 3.0], jnp.complex64),
        "empty": jnp.ones((0, 3)),
        "float16": jnp.ones((2, 2), jnp.float16),
        "float32": np.ones(3, np.float32),
        "scalar": np.float32(1.0),
        "steps": np.arange(3),
        "mask": jnp.array([True]),
        "key": jax.random.key(0),
    }
    optimizer = optim.AdamW(tree, lr=0.125)
    assert names_of(optimizer) == ["bfloat16", "complex64", "empty", "float16", "float32", "scalar"]
    assert np.isfinite(optimizer.step(sum_of_squares))
    optimizer.backward(sum_of_squares)
    for box in optimizer.param_groups[0]["params"]:
        assert (box.grad.dtype, box.grad.shape) == (box.dtype, box.shape)
    optimizer.step()
    after = optimizer.params
    for name in names_of(optimizer):
        assert (after[name].dtype, after[name].shape) == (tree[name].dtype, tree[name].shape)
        assert np.all(np.abs(np.asarray(after[name], np.complex64)) < np.abs(np.asarray(tree[name], np.complex64)))
    assert all(after[name] is tree[name] for name in ("steps", "mask", "key"))


def test_a_gradient_of_bfloat16_is_pytorchs(torch: Any) -> None:
    values = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    w, x = (jnp.asarray(v, jnp.bfloat16) for v in values)
    optimizer = optim.SGD({"w": w}, lr=0.1)
    for _ in range(2):
        optimizer.backward(lambda params, x: jnp.sum((params["w"] * x) ** 2), x)
    theirs, their_x = (torch.tensor(np.asarray(v, np.float32)).bfloat16() for v in (w, x))
    theirs.requires_grad_()
    for _ in range(2):
        ((theirs * their_x) ** 2).sum().backward()
    (box,) = optimizer.param_groups[0]["params"]
    assert box.grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(box.grad, np.float32), theirs.grad.float().numpy(), rtol=2**-7)


@pytest.mark.parametrize(
    ("params", "found"),
    [
        (linen.Dense(3), "Dense"),
        (nnx.Linear, "ModuleMeta"),
        ({"w": 1.0}, "dict"),
        (3.0, "float"),
        (jax.ShapeDtypeStruct((2,), np.float32), "ShapeDtypeStruct"),
        ([nnx.Dropout(0.5)], "list"),
    ],
    ids=["linen module", "class", "Python number", "number", "shape", "layers without parameters"],
)
def test_what_holds_no_arrays_is_named(params: Any, found: str) -> None:
    tree = isinstance(params, (list, dict))
    message = f"empty parameter list: no floating array in this {found}" if tree else f"parameters, got {found}"
    with pytest.raises(ValueError if tree else TypeError, match=message):
        optim.SGD(params, lr=0.1)


# --- Equinox --------------------------------------------------------------------------------------------------------


class Equinox(eqx.Module):
    """Layers whose plain numbers are leaves, arrays that are not parameters, a static field."""

    conv: eqx.nn.Conv1d
    pool: eqx.nn.MaxPool1d
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear
    activation: Callable[..., Any]
    mask: Any
    bins: Any
    repeats: int
    rate: float
    residual: bool
    label: str = eqx.field(static=True)

    def __init__(self, key: Any):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv1d(1, 2, 3, key=first)
        self.pool = eqx.nn.MaxPool1d(2, stride=2)
        self.norm = eqx.nn.LayerNorm(3)
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(3, 2, key=second)
        self.activation, self.mask, self.bins = jnp.tanh, jnp.array([True, False, True]), jnp.arange(3)
        self.repeats, self.rate, self.residual, self.label = 2, 0.5, True, "net"

    def __call__(self, x: Any, key: Any) -> Any:
        x = self.norm(self.pool(self.conv(x))[0]) * self.mask.astype(x.dtype)
        for _ in range(self.repeats):
            x = x + self.activation(x) if self.residual else self.activation(x)
        return self.head(self.dropout(x, key=key)) * self.rate + self.bins[1].astype(x.dtype)


def equinox_loss(model: Any, x: Any, key: Any) -> Any:
    return jnp.mean(jax.vmap(model, in_axes=(0, None))(x, key) ** 2)


@pytest.mark.parametrize("form", ["backward", "loss", "grads"])
def test_an_equinox_module_trains_as_by_hand(form: str) -> None:
    model = expected = Equinox(jax.random.key(0))
    optimizer = optim.SGD(model, lr=0.1)
    layers = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert names_of(optimizer) == layers
    x = np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32)
    for step in range(3):
        key = jax.random.key(step)
        loss, grads = eqx.filter_value_and_grad(equinox_loss)(expected, x, key)
        expected = eqx.apply_updates(expected, jax.tree.map(lambda grad: -0.1 * grad, grads))
        if form == "grads":
            optimizer.step(eqx.filter_grad(equinox_loss)(optimizer.params, x, key))
        elif form == "loss":
            np.testing.assert_allclose(optimizer.step(equinox_loss, x, key), loss, rtol=1e-5)
        else:
            optimizer.zero_grad()
            np.testing.assert_allclose(optimizer.backward(equinox_loss, x, key), loss, rtol=1e-5)
            optimizer.step()
        trained = optimizer.params
        assert jax.tree.structure(trained) == jax.tree.structure(model)
        for ours, theirs, old in zip(*map(jax.tree.leaves, (trained, expected, model)), strict=True):
            if eqx.is_inexact_array(old):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
            else:
                assert ours is old


def test_plain_numbers_of_a_model_are_compiled_in_and_told_apart() -> None:
    """Also `True` and 1, which are equal."""
    loss = lambda params: params["w"] if params["sign"] is True else -params["w"]  # noqa: E731
    positive = optim.SGD({"w": jnp.array(2.0), "sign": True}, lr=1.0)
    negative = optim.SGD({"w": jnp.array(2.0), "sign": 1}, lr=1.0)
    assert [float(positive.step(loss)), float(negative.step(loss))] == [2, -2]
    assert [float(o.params["w"]) for o in (positive, negative)] == [1, 3]
