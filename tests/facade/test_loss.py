"""`backward` and `step(loss_fn)`: what is differentiated, what is compiled, what the loss changes in a module."""

import dataclasses
import gc
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optimjax as optim

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


class Net(nnx.Module):
    """Statistics, random state and tied parameters."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(params=0, dropout=1)
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = nnx.Linear(3, 3, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(self.dropout(self.norm(self.second(jnp.tanh(self.first(x))))))


def loss_fn(net: Any, x: Any, y: Any) -> Any:
    return jnp.mean((net(x) - y) ** 2)


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's usual rules, which some layers of flax need."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def sum_of_squares(params: Any, scale: Any = 1.0) -> Any:
    return scale * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def boxes_of(optimizer: Any) -> list[Any]:
    return [box for group in optimizer.param_groups for box in group["params"]]


# --- Gradients ------------------------------------------------------------------------------------------------------


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
    """As `jax.grad` has it; an unused box of a module that is no argument gets none."""
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


def test_boxes_of_a_module_are_differentiated_in_the_module_given() -> None:
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


def test_boxes_may_be_arguments_themselves() -> None:
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


# --- What a loss changes in a module --------------------------------------------------------------------------------


def non_parameters(model: Any) -> list[np.ndarray]:
    state = nnx.state(model, nnx.Not(nnx.Param))
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(state)
    ]


@pytest.mark.parametrize("form", ["backward", "step", "boxes"])
def test_statistics_and_random_state_advance_as_under_nnx(form: str) -> None:
    ours, theirs = Net(), Net()
    optimizer = optim.SGD(optim.parameters(ours) if form == "boxes" else ours, lr=0.1)
    start = non_parameters(ours)

    @nnx.jit
    def value_and_grad(model: Any, x: Any, y: Any) -> Any:
        return nnx.value_and_grad(loss_fn)(model, x, y)

    for _ in range(3):
        expected, grads = value_and_grad(theirs, X, Y)
        params = nnx.state(theirs, nnx.Param)
        nnx.update(theirs, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        if form == "step":
            loss = optimizer.step(loss_fn, X, Y)
        else:
            optimizer.zero_grad()
            loss = optimizer.backward(loss_fn, *([ours] if form == "boxes" else []), X, Y)
            optimizer.step()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for a, b in zip(non_parameters(ours), non_parameters(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert any(not np.array_equal(a, b) for a, b in zip(start, non_parameters(ours), strict=True))
    assert int(ours.dropout.rngs.count[...]) == int(theirs.dropout.rngs.count[...]) == 3
    for a, b in zip(optim.parameters(ours), optim.parameters(theirs), strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-4, atol=1e-6)


def test_train_and_eval_are_respected() -> None:
    model = Net()
    optimizer = optim.SGD(model, lr=0.0)

    def three(form: Any) -> list[float]:
        return [float(form(loss_fn, X, Y)) for _ in range(3)]

    for form in (optimizer.backward, optimizer.step):
        model.train()
        assert len(set(three(form))) == 3  # dropout draws anew
        model.eval()
        before = non_parameters(model)
        assert len(set(three(form))) == 1
        for a, b in zip(before, non_parameters(model), strict=True):
            np.testing.assert_array_equal(a, b)
        assert three(form)[0] == pytest.approx(float(loss_fn(model, X, Y)), rel=1e-5)


def test_another_module_among_the_arguments_is_updated_but_not_differentiated() -> None:
    class Counter(nnx.Module):
        def __init__(self) -> None:
            self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
            self.w = nnx.Param(jnp.ones(()))

    def loss(params: Any, counter: Any) -> Any:
        counter.calls[...] += 1
        return params["v"] * counter.w[...]

    counter, optimizer = Counter(), optim.SGD({"v": jnp.ones(())}, lr=0.1)
    optimizer.backward(loss, counter)
    optimizer.step(loss, counter)
    assert int(counter.calls[...]) == 2
    assert float(counter.w[...]) == 1.0
    assert float(optimizer.params["v"]) == pytest.approx(0.9)


def test_an_error_in_the_loss_changes_nothing_in_the_module() -> None:
    model = Net()
    optimizer = optim.Adam(model)
    optimizer.step(loss_fn, X, Y)
    before = [*map(np.asarray, optim.parameters(model)), *non_parameters(model)]

    def broken(model: Any, x: Any, y: Any) -> Any:
        loss_fn(model, x, y)
        raise RuntimeError("broken")

    for form in (optimizer.backward, optimizer.step):
        with pytest.raises(RuntimeError, match="broken"):
            form(broken, X, Y)
        after = [*map(np.asarray, optim.parameters(model)), *non_parameters(model)]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(box.grad is None for box in optim.parameters(model))
    assert {state["step"] for state in optimizer.state.values()} == {1}


def test_a_loss_that_adds_variables_is_refused_by_name() -> None:
    def sows(model: Any, x: Any) -> Any:
        model.hidden = nnx.Variable(x)
        return jnp.mean(model(x))

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="added, removed or reshaped variables"):
        optim.SGD(model).backward(sows, X)


# --- What a loss writes into parameters -----------------------------------------------------------------------------


def normed(wrap: Any, param_dtype: Any = jnp.float32, **options: Any) -> Any:
    rngs = nnx.Rngs(0)
    wrapped = wrap(nnx.Linear(3, 4, rngs=rngs, param_dtype=param_dtype), rngs=rngs, **options)
    return nnx.Sequential(wrapped, nnx.Linear(4, 2, rngs=rngs))


class Clamped(nnx.Module):
    """The loss leaves other weights, on which the update and its decay must start."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.array([[3.0, -3.0], [0.5, 2.0], [1.0, 1.0]]))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        out = x @ self.weight[...] ** 2
        self.weight.set_value(jnp.clip(self.weight[...], -1, 1))
        self.calls[...] += 1
        return out + x @ self.weight[...]


WRITERS: dict[str, Any] = {
    "SpectralNorm": lambda: normed(nnx.SpectralNorm),
    "WeightNorm": lambda: normed(nnx.WeightNorm),
    "own": Clamped,
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("form", ["backward", "step", "boxes", "in place"])
@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_what_the_loss_writes_into_parameters_stays_as_under_nnx(make: Any, form: str) -> None:
    ours, theirs = make(), make()
    reference = nnx.Optimizer(theirs, optax.adamw(0.05, weight_decay=0.1), wrt=nnx.Param)
    optimizer = optim.AdamW(optim.parameters(ours) if form == "boxes" else ours, lr=0.05, weight_decay=0.1)
    optimizer.donate = form == "in place"

    @nnx.jit
    def expected(model: Any, reference: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn)(model, X, Y)
        reference.update(model, grads)
        return loss

    for _ in range(5):
        if form in ("step", "in place"):
            loss = optimizer.step(loss_fn, X, Y)
        else:
            optimizer.zero_grad()
            loss = optimizer.backward(loss_fn, *([ours] if form == "boxes" else []), X, Y)
            optimizer.step()
        np.testing.assert_allclose(loss, expected(theirs, reference), rtol=1e-3)
        for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a[...], b[...], rtol=1e-3, atol=1e-4, err_msg=str(path))


def test_backward_alone_keeps_what_the_loss_writes() -> None:
    model = Clamped()
    optimizer = optim.SGD(model, lr=0.1)
    grads = [nnx.grad(loss_fn)(twin := Clamped(), X, Y), nnx.grad(loss_fn)(twin, X, Y)]
    for _ in range(2):
        optimizer.backward(loss_fn, X, Y)
    np.testing.assert_array_equal(model.weight[...], jnp.clip(Clamped().weight[...], -1, 1))
    (box,) = optim.parameters(model)
    np.testing.assert_allclose(box.grad, grads[0]["weight"][...] + grads[1]["weight"][...], rtol=1e-5)


@pytest.mark.parametrize("form", ["backward", "step"])
@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_a_loss_that_writes_into_parameters_is_compiled_once(make: Any, form: str, compilations: Any) -> None:
    optimizer = optim.Adam(make(), lr=0.1)

    def run() -> None:
        if form == "step":
            optimizer.step(loss_fn, X, Y)
        else:
            optimizer.backward(loss_fn, X, Y)
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        run()
    before = compilations()
    for _ in range(3):
        run()
    assert compilations() == before


@pytest.mark.parametrize("inner", [lambda f: f, nnx.jit, nnx.remat], ids=["plain", "nnx.jit", "nnx.remat"])
def test_parameters_that_the_loss_only_reads_are_not_written(inner: Any) -> None:
    """They would be outputs of the program: a copy of the model, and a next step that has to look at it anew."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(model, lr=0.1)
    apply = inner(lambda model, x: model(x))
    before = [box.value for box in boxes_of(optimizer)]
    optimizer.backward(lambda model, x, y: jnp.mean((apply(model, x) - y) ** 2), X, Y)
    assert all(box.value is value for box, value in zip(boxes_of(optimizer), before, strict=True))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("form", ["backward", "step"])
def test_another_dtype_or_shape_written_into_a_parameter_is_refused_by_name(form: str) -> None:
    model = normed(nnx.WeightNorm, jnp.bfloat16)
    optimizer = optim.SGD(model, lr=0.1)
    before = [box.value for box in boxes_of(optimizer)]
    message = (
        r"float32\[3, 4\] into the parameter 'layers\.0\.layer_instance\.kernel', which must keep bfloat16\[3, 4\]"
    )
    with pytest.raises(TypeError, match=message):
        getattr(optimizer, form)(loss_fn, X, Y)
    assert all(box.value is value for box, value in zip(boxes_of(optimizer), before, strict=True))
    assert all(box.grad is None for box in boxes_of(optimizer))
    getattr(optim.SGD(normed(nnx.WeightNorm, jnp.bfloat16, dtype=jnp.bfloat16), lr=0.1), form)(loss_fn, X, Y)

    def reshapes(model: Any) -> Any:
        loss = jnp.sum(model.kernel[...])
        model.kernel.set_value(jnp.ones(2))
        return loss

    with pytest.raises(TypeError, match=r"float32\[2\] into the parameter 'kernel', which must keep float32\[3, 2\]"):
        getattr(optim.SGD(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), lr=0.1), form)(reshapes)


def test_lbfgs_searches_along_its_line_whatever_the_loss_writes() -> None:
    def loss(model: Any, write: Any = False) -> Any:
        loss = jnp.sum((model.weight[...] - 2) ** 2)
        if write:
            model.weight.set_value(jnp.zeros((3, 2)))
        model.calls[...] += 1
        return loss

    models = Clamped(), Clamped()
    for model, write in zip(models, (False, True), strict=True):
        optim.LBFGS(model, line_search_fn="strong_wolfe").step(loss, write)
        np.testing.assert_allclose(model.weight[...], np.full((3, 2), 2.0), atol=1e-4)
    assert int(models[0].calls[...]) == int(models[1].calls[...]) > 1


# --- Compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["backward", "step"])
def test_a_loss_is_compiled_once(form: str, compilations: Any) -> None:
    traces = 0

    def loss(params: Any, x: Any, scale: Any) -> Any:
        nonlocal traces
        traces += 1
        return scale * jnp.sum(params["w"] * x)

    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1, momentum=0.9)

    def run(step: int) -> None:
        if form == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss, np.full(3, step, np.float32), float(step))
            optimizer.step()
        else:
            optimizer.step(loss, np.full(3, step, np.float32), float(step))

    run(0)
    first = traces
    run(1)
    before = compilations()
    for step in range(2, 5):
        run(step)
    assert traces == first == 1
    assert compilations() == before


def test_a_module_loss_is_compiled_once(compilations: Any) -> None:
    model = Net()
    optimizer = optim.Adam(model)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(loss_fn, X, Y)
        optimizer.step()
        optimizer.step(loss_fn, X, Y)
    before = compilations()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(loss_fn, X, Y)
        optimizer.step()
        optimizer.step(loss_fn, X, Y)
    assert compilations() == before
    model.eval()
    optimizer.step(loss_fn, X, Y)
    evaluated = compilations()
    assert evaluated > before
    model.train()
    optimizer.step(loss_fn, X, Y)
    model.eval()
    optimizer.step(loss_fn, X, Y)
    assert compilations() == evaluated  # both modes are remembered


def test_static_arguments_are_compiled_in() -> None:
    def loss(params: Any, x: Any, reduction: str, activation: Any) -> Any:
        values = activation(params["w"] * x)
        return jnp.sum(values) if reduction == "sum" else jnp.mean(values)

    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    assert float(optimizer.backward(loss, jnp.ones(2), "sum", jnp.abs)) == 2.0
    assert float(optimizer.backward(loss, jnp.ones(2), "mean", jnp.abs)) == 1.0
    assert float(optimizer.backward(loss, jnp.ones(2), "mean", jnp.negative)) == -1.0


def test_random_keys_and_trees_are_arguments() -> None:
    def loss(params: Any, key: Any, batch: Any) -> Any:
        return jnp.sum(params["w"] * jax.random.normal(key, (2,)) * batch["x"])

    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    for key in (jax.random.key(0), jax.random.PRNGKey(1)):
        optimizer.zero_grad()
        optimizer.backward(loss, key, {"x": jnp.ones(2)})
        np.testing.assert_allclose(boxes_of(optimizer)[0].grad, jax.random.normal(key, (2,)), rtol=1e-6)


class Scaled(nnx.Module):
    """A module with an array that is in no variable."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.array([1.0, 2.0]))
        self.scale = jnp.array(3.0)

    def __call__(self) -> Any:
        return jnp.sum(self.weight[...] * self.scale)


def test_arrays_of_a_module_are_read_at_every_call() -> None:
    model = Scaled()
    optimizer = optim.SGD(model, lr=0.1)
    loss = lambda model: model()  # noqa: E731
    assert optimizer.step(loss) == 9
    model.scale = jnp.array(-1.0)
    np.testing.assert_allclose(optimizer.step(loss), -(0.7 + 1.7), rtol=1e-6)


def test_assigning_such_an_array_inside_the_loss_raises() -> None:
    def loss(model: Any) -> Any:
        model.scale = model.scale + 1
        return model()

    model = Scaled()
    with pytest.raises(ValueError, match=r"in no nnx\.Variable"):
        optim.SGD(model, lr=0.1).step(loss)
    np.testing.assert_array_equal(model.weight[...], [1, 2])


def test_a_module_that_changes_is_cut_again() -> None:
    model = Scaled()
    optimizer = optim.SGD(model, lr=0.0)
    loss = lambda model: model() + (model.extra[...].sum() if hasattr(model, "extra") else 0.0)  # noqa: E731
    assert optimizer.step(loss) == 9
    model.extra = nnx.Param(jnp.ones(4))
    assert optimizer.step(loss) == 13
    del model.extra
    assert optimizer.step(loss) == 9


@pytest.mark.parametrize("form", ["backward", "step"])
def test_the_signatures_of_losses_in_turn_are_looked_at_once(form: str, monkeypatch: Any) -> None:
    """As of a GAN."""
    optimizer, scale = optim.SGD({"w": jnp.ones(())}, lr=0.1), Scale()
    losses = [lambda params: params["w"], lambda params: params["w"] ** 2, lambda params: -params["w"]]
    for loss in (*losses, scale.loss):
        getattr(optimizer, form)(loss)
    looked_at = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda function: looked_at.append(function) or signature(function))
    for loss in (*losses, scale.loss) * 2:
        getattr(optimizer, form)(loss)
    assert not {*losses, scale.loss} & set(looked_at)  # JAX looks at its own
    with pytest.raises(TypeError, match=r"cannot be: too many .* leave it out"):
        getattr(optimizer, form)(losses[0], 1.0)
    assert losses[0] in looked_at


@pytest.mark.parametrize("form", ["backward", "step"])
def test_what_is_remembered_of_a_call_holds_no_arrays(form: str) -> None:
    """Old parameters and the last batch would take memory while the model is evaluated."""
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    batch = jnp.ones(3)
    held = [weakref.ref(optimizer.params["w"]), weakref.ref(batch)]
    getattr(optimizer, form)(lambda params, x: jnp.sum(params["w"] * x), batch)
    if form == "backward":
        optimizer.step()
    del batch
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_plain_flag_is_compiled_in() -> None:
    optimizer = optim.SGD({"w": jnp.array(2.0)}, lr=0.0)
    loss = lambda params, positive: params["w"] if positive else -params["w"]  # noqa: E731
    assert [float(optimizer.step(loss, flag)) for flag in (True, False, True)] == [2, -2, 2]


# --- What goes wrong at first ---------------------------------------------------------------------------------------


def fails_alike(optimizer: Any, error: Any, message: str, loss: Any, *args: Any) -> None:
    """Both forms raise, and nothing has changed."""
    before = [np.asarray(box) for box in boxes_of(optimizer)]
    for call in (optimizer.backward, optimizer.step):
        with pytest.raises(error, match=message):
            call(loss, *args)
    for box, value in zip(boxes_of(optimizer), before, strict=True):
        np.testing.assert_array_equal(box.value, value)
        assert box.grad is None


@pytest.mark.parametrize("make", [lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)), lambda: {"w": jnp.ones(3)}])
def test_a_loss_that_passes_the_parameters_by_trains_nothing_and_says_so(make: Any) -> None:
    model = make()
    total = lambda _: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model))  # noqa: E731
    fails_alike(optim.AdamW(model, lr=0.1), RuntimeError, "depends on none of the parameters", total)
    fails_alike(optim.AdamW(make(), lr=0.1), RuntimeError, "depends on none", lambda _: 3.0)
    stopped = lambda params: jax.lax.stop_gradient(sum_of_squares(params))  # noqa: E731
    fails_alike(optim.AdamW({"w": jnp.ones(3)}, lr=0.1), RuntimeError, "depends on none", stopped)


def test_a_loss_of_other_arguments_is_told_who_passes_the_model() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    message = r"loss_fn\(optimizer.params, \*args\) and cannot be: too many positional arguments; .* leave it out"
    fails_alike(optim.SGD(model, lr=0.1), TypeError, message, loss_fn, model, X, Y)
    boxes = optim.SGD(optim.parameters(model), lr=0.1)
    fails_alike(boxes, TypeError, r"loss_fn\(\*args\) and cannot be: missing .* 'y'; .* give the module", loss_fn, X, Y)
    fails_alike(boxes, TypeError, "too many", lambda: 0.0, model)
    assert float(boxes.step(loss_fn, model, X, Y)) == float(loss_fn(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X, Y))


class Batch:
    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as of a dataclass that is no tree

    def __init__(self, x: Any):
        self.x = x


def test_arguments_and_results_that_are_neither_arrays_nor_trees_are_named() -> None:
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    fails_alike(optimizer, TypeError, "holds a Batch, which is neither", lambda p, b: jnp.sum(p["w"] * b.x), Batch(X))
    both = lambda params: (sum_of_squares(params), 1)  # noqa: E731
    with pytest.raises(TypeError, match=r"scalar, got a tuple; .*has_aux=True"):
        optimizer.step(both)
    assert optimizer.backward(both, has_aux=True)[1] == 1


def test_batches_may_be_tensors_of_pytorch(torch: Any) -> None:
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    twin = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    loss = lambda params, x, index: jnp.mean((x @ params["w"])[index] ** 2)  # noqa: E731
    index = np.array([0, 2])
    for scale in (1, 2):
        ours = optimizer.step(loss, torch.from_numpy(X * scale), torch.from_numpy(index))
        assert float(ours) == float(twin.step(loss, X * scale, index))
    with jax.numpy_dtype_promotion("standard"):
        half = optimizer.backward(loss, torch.from_numpy(X).bfloat16(), torch.from_numpy(index))
    np.testing.assert_allclose(half, twin.backward(loss, X, index), rtol=0.02)


def test_has_aux_with_another_number_of_results_says_what_to_return() -> None:
    optimizer = optim.SGD({"w": jnp.ones(3)}, lr=0.1)
    losses = {1: sum_of_squares, 3: lambda params: (sum_of_squares(params), 1, 2)}
    for count, loss in losses.items():
        with pytest.raises(TypeError, match=rf"has_aux=True .* must return \(loss, aux\), two results, got {count}"):
            optimizer.backward(loss, has_aux=True)
    with pytest.raises(TypeError, match="got 1"):
        optimizer.backward(lambda params: params["w"][:2], has_aux=True)  # which could be unpacked


def test_where_all_parameters_are_frozen_the_error_says_so() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for params in (model, list(optim.parameters(model))):
        for box in optim.parameters(model):
            box.requires_grad = False
        args = (model, X, Y) if isinstance(params, list) else (X, Y)
        fails_alike(
            optim.SGD(params, lr=0.1), ValueError, "all of .* parameters have requires_grad=False", loss_fn, *args
        )


def test_a_loss_function_without_a_hash_is_refused() -> None:
    @dataclasses.dataclass
    class Loss:
        scale: float

        def __call__(self, params: Any) -> Any:
            return self.scale * sum_of_squares(params)

    message = r"this Loss has none \(unhashable type: 'Loss'\): give a plain function"
    fails_alike(optim.SGD({"w": jnp.ones(3)}, lr=0.1), TypeError, message, Loss(2.0))


class Scale:
    def loss(self, params: Any) -> Any:
        return 2.0 * params["w"]


@pytest.mark.parametrize("form", ["backward", "step"])
def test_loss_functions_made_anew_are_warned_of_once(form: str) -> None:
    optimizer = optim.SGD({"w": jnp.ones(())}, lr=0.1)

    def anew() -> None:
        for _ in range(12):
            getattr(optimizer, form)(lambda params: params["w"] ** 2)

    with pytest.warns(UserWarning, match="define the function once") as warned:
        anew()
    assert [warning.filename for warning in warned] == [__file__]
    scale = Scale()
    for _ in range(12):  # of a function and a bound method in turn there is nothing to say
        optimizer.backward(sum_of_squares)
        optimizer.backward(scale.loss)
