"""The learning rate range test leaves everything as it was."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim
from optimjax.lr_scheduler import find_lr

X = jnp.linspace(-1.0, 1.0, 24).reshape(-1, 1)
BATCHES = [(X[start : start + 8], X[start : start + 8] ** 2) for start in range(0, 24, 8)]


class Model(nnx.Module):
    """With batch statistics and random state."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(1, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))


def module_loss(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


def tree_loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def boxes_loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ params[0] - y) ** 2)


class Own(optim.Optimizer):
    """A step in plain Python, with state in a list and an array that it changes."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        self.calls = 0

    def step(self, loss_fn: Any, *args: Any) -> Any:
        self.calls += 1
        loss = self.backward(loss_fn, *args)
        for group in self.param_groups:
            for box in group["params"]:
                self.state[box].setdefault("seen", []).append(group["lr"])
                self.state[box].setdefault("count", np.zeros(1))[...] += 1
                box.value = box.value - group["lr"] * box.grad
        return loss


def tree() -> Any:
    return {"w": jnp.ones((1, 1)), "b": jnp.zeros((1, 1))}


def in_place(optimizer: Any) -> Any:
    optimizer.donate = True
    return optimizer


def grouped() -> Any:
    model = Model()
    parts = [{"params": optim.parameters(model.inner), "lr": 0.3}, {"params": optim.parameters(model.outer)}]
    return optim.Adam(parts, lr=jnp.float32(0.1)), module_loss, [(model, *batch) for batch in BATCHES], model


# The optimizer, a loss function, batches, and what it trains.
CASES: dict[str, Callable[[], Any]] = {
    "tree": lambda: (optim.AdamW(tree(), lr=0.1), tree_loss, BATCHES, None),
    "tree in place": lambda: (in_place(optim.Adam(tree(), lr=0.1)), tree_loss, BATCHES, None),
    "without state": lambda: (optim.SGD(tree(), lr=0.1), tree_loss, BATCHES, None),
    "module": lambda: (optimizer := optim.SGD(Model(), lr=0.1, momentum=0.9), module_loss, BATCHES, optimizer.params),
    "parts of a module": grouped,
    "boxes": lambda: (optim.Adagrad([optim.Parameter(jnp.ones((1, 1)))], lr=0.1), boxes_loss, BATCHES, None),
    "LBFGS": lambda: (optim.LBFGS(tree(), lr=0.1), tree_loss, BATCHES, None),
    "a step of its own": lambda: (Own(tree()), tree_loss, BATCHES, None),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def everything(optimizer: Any, model: Any) -> Any:
    boxes = optimizer._parameters()
    return copy.deepcopy(
        (
            [(np.asarray(box.value), box.grad) for box in boxes],
            optimizer.state_dict(),
            [list(group) for group in optimizer.param_groups],
            {name: value for name, value in vars(optimizer).items() if name in ("donate", "_record", "calls")},
            None if model is None else jax.tree.map(np.asarray, nnx.to_pure_dict(plain_keys(nnx.state(model)))),
        )
    )


def plain_keys(state: Any) -> Any:
    """Random keys as numbers, which can be compared."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def assert_same(ours: Any, expected: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@every_case
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "mid-run"])
def test_everything_is_put_back(case: Any, warm: bool) -> None:
    optimizer, loss_fn, batches, model = case()
    if warm:
        for batch in batches:
            optimizer.step(loss_fn, *batch)
    before = everything(optimizer, model)
    rates, losses = find_lr(optimizer, loss_fn, batches, start=1e-3, end=10.0, steps=12)
    assert_same(everything(optimizer, model), before)
    assert rates.shape == losses.shape
    assert rates.dtype == losses.dtype == np.float64
    assert 2 <= len(rates) <= 12
    np.testing.assert_allclose(rates, np.geomspace(1e-3, 10.0, 12)[: len(rates)])
    assert len(set(losses)) > 2


@every_case
def test_training_goes_on_as_if_nothing_had_been(case: Any) -> None:
    def run(look: bool) -> Any:
        optimizer, loss_fn, batches, model = case()
        for index, batch in enumerate(batches * 2):
            if look and index in (0, 3):
                find_lr(optimizer, loss_fn, batches, steps=5)
            optimizer.step(loss_fn, *batch)
        return everything(optimizer, model)

    assert_same(run(look=True), run(look=False))


@every_case
def test_everything_is_put_back_after_an_error(case: Any) -> None:
    optimizer, loss_fn, batches, model = case()
    optimizer.step(loss_fn, *batches[0])
    before = everything(optimizer, model)

    def broken() -> Any:
        yield from batches
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        find_lr(optimizer, loss_fn, broken(), steps=9)
    assert_same(everything(optimizer, model), before)
    with pytest.raises(TypeError):
        find_lr(optimizer, loss_fn, [(*batches[0], 1)])
    assert_same(everything(optimizer, model), before)


def test_rates_and_losses_are_those_of_a_loop_written_by_hand() -> None:
    """All groups have the rate; a loss is the one before the update."""
    optimizer = optim.SGD([{"params": {"w": jnp.array(1.0)}}, {"params": {"v": jnp.array(2.0)}, "lr": 3.0}], lr=0.1)

    def loss_fn(params: Any, x: Any) -> Any:
        return (params[0]["w"] * x) ** 2 + params[1]["v"] ** 2

    rates, losses = find_lr(optimizer, loss_fn, [1.0, 2.0], start=1e-4, end=1e-1, steps=4)
    w, v, by_hand = 1.0, 2.0, []
    for rate, x in zip((1e-4, 1e-3, 1e-2, 1e-1), (1.0, 2.0, 1.0, 2.0), strict=True):
        by_hand.append((w * x) ** 2 + v**2)
        w, v = w - rate * 2 * w * x**2, v - rate * 2 * v
    np.testing.assert_allclose(rates, [1e-4, 1e-3, 1e-2, 1e-1])
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)


def test_it_ends_when_the_loss_diverges() -> None:
    optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.1)
    rates, losses = find_lr(optimizer, lambda params: params["w"] ** 2, [()], start=1e-2, end=1e4, steps=50)
    assert len(rates) < 50
    assert losses[-1] > 4 * losses.min()
    assert np.all(losses[:-1] <= 4 * np.minimum.accumulate(losses[:-1]))
    _, losses = find_lr(optimizer, lambda params: jnp.log(params["w"] - 1.0), [()], steps=50)
    assert len(losses) == 1
    assert not np.isfinite(losses[0])
    assert len(find_lr(optimizer, lambda params: -(params["w"] ** 2), [()], steps=9, stop=1e9)[0]) == 9


def test_schedulers_and_the_order_of_steps_know_nothing_of_it() -> None:
    optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    before = scheduler.state_dict()
    find_lr(optimizer, lambda params: params["w"] ** 2, [()], steps=3)
    assert scheduler.state_dict() == before
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(start=0.0), "start and end must be positive, got 0.0 and 10.0"),
        (dict(end=-1.0), "got 1e-07 and -1.0"),
        (dict(steps=1), "steps must be at least 2, got 1"),
        (dict(batches=[]), "expected 100 batches, or such that can be gone through again, got 0"),
        (dict(batches=iter([1.0, 2.0]), steps=3), "expected 3 batches, .* got 2"),
    ],
)
def test_errors(arguments: Any, message: str) -> None:
    optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.1)
    with pytest.raises(ValueError, match=message):
        find_lr(optimizer, lambda params, x: params["w"] ** 2 * x, **{"batches": [1.0], **arguments})
    assert optimizer.params == {"w": 1.0}
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_optimizer_without_a_rate() -> None:
    class Rateless(optim.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="Rateless has no lr"):
        find_lr(Rateless([jnp.ones(1)]), lambda params: params[0].sum(), [()])
