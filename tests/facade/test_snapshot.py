"""A module that has not changed is not split again, and every change of one is seen."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim
from optimjax._params.snapshot import Snapshot


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(1, 2, decode=False, rngs=rngs)  # which has attributes that are None
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = 1.0

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.scale * self.dropout(self.norm(x))


def set_scale(model: Any) -> None:
    model.scale = 2.0


def set_mode(model: Any) -> None:
    model.eval()


def replace_layer(model: Any) -> None:
    model.layers[0] = nnx.Linear(2, 2, rngs=nnx.Rngs(1))


def append_layer(model: Any) -> None:
    model.layers.append(nnx.Linear(2, 2, rngs=nnx.Rngs(1)))


def add_attribute(model: Any) -> None:
    model.extra = nnx.Variable(jnp.ones(()))


def delete_attribute(model: Any) -> None:
    del model.scale


def rename_attribute(model: Any) -> None:
    value = model.scale
    del model.scale
    model.factor = value


def set_metadata(model: Any) -> None:
    model.norm.mean.set_metadata(note="x")


def set_to_a_tree(model: Any) -> None:
    model.norm.mean.set_value({"a": jnp.ones(2)})


def share(model: Any) -> None:
    model.layers[0].kernel = model.layers[1].kernel


CHANGES: list[Callable[[Any], None]] = [
    set_scale, set_mode, replace_layer, append_layer, add_attribute, delete_attribute, rename_attribute, set_metadata,
    set_to_a_tree, share,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen(change: Callable[[Any], None]) -> None:
    model = Net()
    snapshot = Snapshot([model])
    assert snapshot.holds([model])
    model.layers[0].kernel[...] = jnp.zeros((2, 2))  # a value is none
    assert snapshot.holds([model])
    assert not snapshot.holds([])
    assert not snapshot.holds([Net()])
    change(model)
    assert not snapshot.holds([model])


class Holder(nnx.Module):
    def __init__(self, held: Any):
        self.held = nnx.data(held)


@pytest.mark.parametrize(
    "module",
    [Holder([jnp.ones(2)]), Holder(jnp.ones(2)), Holder(nnx.Variable({"a": jnp.ones(2)}))],
    ids=["a list", "an array", "a variable of a tree"],
)
def test_what_can_be_changed_in_place_is_not_judged(module: Any) -> None:
    assert not Snapshot([module]).holds([module])


def test_a_module_is_split_once() -> None:
    model = Net()
    optimizer = optim.SGD(model, lr=0.1)
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    x = jnp.ones((4, 2))
    optimizer.step(loss_fn, x)
    with mock.patch.object(nnx, "split", side_effect=AssertionError("split again")):
        for _ in range(3):
            optimizer.step(loss_fn, x)
        model.eval()
        with pytest.raises(AssertionError, match="split again"):
            optimizer.step(loss_fn, x)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_hooks_and_classes_of_variables_that_read_and_write_otherwise() -> None:
    class Doubled(nnx.Param):
        def get_value(self, **_: Any) -> Any:
            return 2 * super().get_value()

    hooked = nnx.Param(jnp.ones(2), on_set_value=lambda variable, value: value + 1)
    (parameter,) = optim.parameters(Holder(hooked))
    parameter.value = jnp.zeros(2)
    np.testing.assert_array_equal(hooked.get_value(), [1, 1])
    hooked = nnx.Param(jnp.ones(2), on_get_value=lambda variable, value: 3 * value)
    (parameter,) = optim.parameters(Holder(hooked))
    np.testing.assert_array_equal(parameter.value, [3, 3])
    (parameter,) = optim.parameters(Holder(Doubled(jnp.ones(2))))
    np.testing.assert_array_equal(parameter.value, [2, 2])
    plain = nnx.Param(jnp.ones(2))
    (parameter,) = optim.parameters(Holder(plain))
    with pytest.raises(Exception, match="different trace level"):
        jax.jit(lambda: parameter._write(jnp.zeros(2)))()
