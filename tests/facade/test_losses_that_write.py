"""What a loss writes into a module, into statistics, random state or parameters, stays there as under ``nnx``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from losses import Net, X, Y, boxes_of, loss_fn

import optimjax as optim

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
        assert len(set(three(form))) == 3  # dropout draws again
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
    """They would be outputs of the program: a copy of the model, and a next step that has to look at it again."""
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
