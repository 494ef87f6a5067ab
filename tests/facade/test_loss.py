"""`backward` and `step(loss_fn)` differentiate a loss by the parameters of every kind, and gradients add up."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses import Net, X, Y, boxes_of, loss_fn, sum_of_squares

import optimjax as optim


def test_backward_on_two_losses_adds_up() -> None:
    optimizer = optim.SGD({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    assert float(optimizer.backward(sum_of_squares)) == 5.0
    assert float(optimizer.backward(sum_of_squares, 10.0)) == 50.0
    np.testing.assert_allclose(boxes_of(optimizer)[0].grad, [22, 44], rtol=1e-6)
    np.testing.assert_array_equal(optimizer.params["w"], [1, 2])  # nothing has moved


def test_accumulated_gradients_equal_the_large_batch() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(model, lr=0.1)
    whole = nnx.grad(loss_fn)(model, X, Y)
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        optimizer.backward(lambda model, x, y: loss_fn(model, x, y) / 4, X[rows], Y[rows])
    for box in boxes_of(optimizer):
        np.testing.assert_allclose(box.grad, whole[box.name][...], rtol=1e-5, atol=1e-7)


class Normed(nnx.Module):
    """With statistics where asked for, and the same network in PyTorch."""

    def __init__(self, norm: bool):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
        self.norm = None
        if norm:
            options: Any = dict(momentum=0.9, epsilon=1e-5, use_fast_variance=False, param_dtype=jnp.float64)
            self.norm = nnx.data(nnx.BatchNorm(4, rngs=rngs, **options))
            for statistic in (self.norm.mean, self.norm.var):
                statistic.set_value(jnp.asarray(statistic[...], jnp.float64))
        self.last = nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any) -> Any:
        x = self.first(x)
        return self.last(jnp.tanh(x if self.norm is None else self.norm(x)))

    def in_torch(self, torch: Any) -> Any:
        first, last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        norm = torch.nn.Identity() if self.norm is None else torch.nn.BatchNorm1d(4)
        theirs = torch.nn.Sequential(first, norm, torch.nn.Tanh(), last).double()
        for layer, linear in ((self.first, first), (self.last, last)):
            linear.weight.data = torch.tensor(np.array(layer.kernel).T)
            linear.bias.data.zero_()
        return theirs


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("norm", [False, True], ids=["without statistics", "with statistics"])
@pytest.mark.parametrize("has_aux", [False, True])
def test_micro_batches_accumulate_as_in_pytorch(norm: bool, has_aux: bool, torch: Any) -> None:
    """Without statistics it is also the gradient of the large batch."""
    model, x, y = Normed(norm), X.astype(np.float64), Y.astype(np.float64)
    theirs = model.in_torch(torch)
    ours, reference = (lib.SGD(p, lr=0.1) for lib, p in ((optim, model), (torch.optim, theirs.parameters())))

    def loss_of_part(model: Any, x: Any, y: Any) -> Any:
        output = model(x)
        loss = jnp.sum((output - y) ** 2) / len(X)
        return (loss, output) if has_aux else loss

    for _ in range(3):
        ours.zero_grad()
        reference.zero_grad()
        whole = None if norm else nnx.grad(loss_of_part, has_aux=has_aux)(model, x, y)
        for part in range(4):
            rows = slice(2 * part, 2 * part + 2)
            result = ours.backward(loss_of_part, x[rows], y[rows], has_aux=has_aux)
            output = theirs(torch.tensor(x[rows]))
            loss = ((output - torch.tensor(y[rows])) ** 2).sum() / len(X)
            loss.backward()
            np.testing.assert_allclose(result[0] if has_aux else result, loss.item(), rtol=1e-12)
            if has_aux:
                np.testing.assert_allclose(result[1], output.detach().numpy(), rtol=1e-12, atol=1e-12)
        named = dict(optim.named_parameters(model))
        for layer, index in (("first", 0), ("last", 3)):
            weight = theirs[index].weight.grad.numpy().T
            np.testing.assert_allclose(named[f"{layer}.kernel"].grad, weight, rtol=1e-12, atol=1e-12)
        if whole is not None:
            grads = whole[0] if has_aux else whole
            for name, box in named.items():
                layer, leaf = name.split(".")
                np.testing.assert_allclose(box.grad, grads[layer][leaf][...], rtol=1e-12, atol=1e-12)
        ours.step()
        reference.step()
    if model.norm is not None:
        np.testing.assert_allclose(model.norm.mean[...], theirs[1].running_mean.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_begin_anew_after_zero_grad(set_to_none: bool) -> None:
    optimizer = optim.SGD({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        optimizer.backward(sum_of_squares)
        optimizer.backward(sum_of_squares)
        assert boxes_of(optimizer)[0].grad.tolist() == [4, 8]


def test_has_aux() -> None:
    def with_aux(params: Any, x: Any) -> Any:
        loss = jnp.sum(params["w"] * x)
        return loss, {"double": 2 * loss, "x": x}

    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    loss, aux = optimizer.backward(with_aux, jnp.array([1.0, 2.0]), has_aux=True)
    assert (float(loss), float(aux["double"])) == (3.0, 6.0)
    np.testing.assert_array_equal(aux["x"], [1, 2])
    np.testing.assert_array_equal(boxes_of(optimizer)[0].grad, [1, 2])


def test_parameters_that_are_one_array() -> None:
    optimizer = optim.SGD(jnp.array([1.0, 2.0]), lr=0.5)
    assert optimizer.step(lambda x: (x**2).sum()) == 5
    assert optimizer.params.tolist() == [0, 0]


def test_a_parameter_the_loss_does_not_use_gets_a_zero_gradient() -> None:
    """As `jax.grad` has it; an unused box of a module that is not an argument gets none."""
    optimizer = optim.SGD({"w": jnp.ones(2), "unused": jnp.ones(3)}, lr=0.1)
    optimizer.backward(lambda params: jnp.sum(params["w"]))
    assert [box.grad.tolist() for box in boxes_of(optimizer)] == [[0, 0, 0], [1, 1]]


@pytest.mark.parametrize("form", ["backward", "step"])
@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adam])
def test_a_frozen_parameter_gets_no_gradient_and_no_state(form: str, optimizer_class: Any) -> None:
    model = Net()
    named = dict(optim.named_parameters(model))
    for name, box in named.items():
        box.requires_grad = not name.startswith("first")
    before = {name: np.asarray(box) for name, box in named.items()}
    optimizer = optimizer_class(model, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        if form == "backward":
            optimizer.backward(loss_fn, X, Y)
            optimizer.step()
        else:
            optimizer.step(loss_fn, X, Y)
    for name, box in named.items():
        moved = not np.array_equal(before[name], box)
        assert moved == box.requires_grad
        assert (box.grad is None) == (form == "step" or not box.requires_grad)
        assert (box in optimizer.state) == (moved and optimizer_class is optim.Adam)

    for box in named.values():  # thawed, it takes part, and counts from here
        box.requires_grad = True
    optimizer.step(loss_fn, X, Y)
    assert not np.array_equal(before["first.bias"], named["first.bias"])
    if optimizer_class is optim.Adam:
        steps = [optimizer.state[named[name]]["step"] for name in ("first.kernel", "out.kernel")]
        assert steps == [1, 3]


def test_parameters_of_a_module_are_differentiated_in_the_module_given() -> None:
    model = Net()
    optimizer = optim.SGD(optim.parameters(model.out), lr=0.1)
    loss = optimizer.backward(loss_fn, model, X, Y)
    assert loss.shape == ()
    named = dict(optim.named_parameters(model))
    assert [name for name, box in named.items() if box.grad is not None] == ["out.bias", "out.kernel"]
    with pytest.raises(ValueError, match="pass the module that they belong to"):
        optimizer.backward(loss_fn, Net(), X, Y)
    with pytest.raises(ValueError, match="pass the module that they belong to"):
        optimizer.step(lambda x: jnp.sum(x), X)


def test_parameters_may_be_arguments_themselves() -> None:
    w, b = optim.Parameter([1.0, 2.0]), optim.Parameter([0.5, 0.5], requires_grad=False)
    optimizer = optim.SGD([w], lr=0.1)
    optimizer.backward(lambda params, other: jnp.sum(params[0] * other), b)
    np.testing.assert_array_equal(w.grad, [0.5, 0.5])
    assert b.grad is None


def test_modules_that_share_variables_stay_shared() -> None:
    model = Net()
    first, second = optim.SGD(optim.parameters(model.first), lr=0.1), optim.SGD(model, lr=0.1)
    first.backward(lambda a, b, x: jnp.mean(a(x) + b(x)), model.first, model.second, X)
    both = dict(optim.named_parameters(model))["first.kernel"].grad
    second.zero_grad()
    first.backward(lambda a, x: jnp.mean(a(x)), model.first, X)
    np.testing.assert_allclose(both, 2 * first.param_groups[0]["params"][1].grad, rtol=1e-6)
