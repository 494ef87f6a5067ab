"""State that was edited by hand is taken where it fits, and refused by name where it does not."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses import square

import optimjax as optim


def by_gradient(optimizer: Any, *grads: Any) -> None:
    for box, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        box.grad = grad
    optimizer.step()


EDITS = [
    ("SGD", {"momentum": 0.9}, "momentum_buffer"),
    ("Adam", {}, "exp_avg"),
    ("RMSprop", {}, "square_avg"),
    ("Adagrad", {}, "sum"),
    ("Adadelta", {}, "acc_delta"),
    ("Rprop", {}, "step_size"),
    ("NAdam", {}, "exp_avg_sq"),
    ("Adamax", {}, "exp_inf"),
    ("ASGD", {}, "ax"),
]


@pytest.mark.parametrize(("name", "options", "slot"), EDITS)
@pytest.mark.parametrize(
    "value",
    [jnp.ones((4, 3)), jnp.ones(3), jnp.ones((1, 3), int), np.ones((1, 3), bool), "x", [[1.0, 2.0]], object()],
    ids=["rows", "axes", "integers", "booleans", "text", "list", "object"],
)
def test_edited_state_that_does_not_fit_is_refused(name: str, options: Any, slot: str, value: Any) -> None:
    optimizer = getattr(optim, name)([("layer.w", optim.Parameter(jnp.ones((1, 3))))], lr=0.1, **options)
    (box,) = optimizer.param_groups[0]["params"]
    by_gradient(optimizer, jnp.ones((1, 3)))
    good, before = optimizer.state[box][slot], box.value
    optimizer.state[box][slot] = value
    with pytest.raises(ValueError, match=rf"^state of parameter 'layer\.w': '{slot}'"):
        by_gradient(optimizer, jnp.ones((1, 3)))
    assert box.value is before
    optimizer.state[box][slot] = good
    by_gradient(optimizer, jnp.ones((1, 3)))
    assert box.shape == (1, 3)


def test_edited_state_that_fits_is_taken(torch: Any) -> None:
    values = [np.full(3, 0.5, np.float32), [0.5, 0.5, 0.5], torch.full((3,), 0.5), jnp.full(3, 0.5)]
    results = []
    for value in values:
        optimizer = optim.SGD([optim.Parameter(jnp.ones(3))], lr=1.0, momentum=0.5)
        (box,) = optimizer.param_groups[0]["params"]
        by_gradient(optimizer, jnp.ones(3))
        optimizer.state[box]["momentum_buffer"] = value
        by_gradient(optimizer, jnp.ones(3))
        results.append(np.asarray(box.value))
    np.testing.assert_array_equal(results, np.full((4, 3), -1.25))


def test_a_count_that_is_none_is_refused() -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)})
    optimizer.step(square)
    (box,) = optimizer.param_groups[0]["params"]
    for count in (-1, 0.5, "many", None):
        optimizer.state[box]["step"] = count
        with pytest.raises(ValueError, match="state of parameter 'w': 'step'"):
            optimizer.step(square)


def test_a_parameter_of_another_shape_than_its_state_is_refused() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = optim.Adam(model, lr=0.1)

    def loss(model: Any) -> Any:
        return jnp.sum(model(jnp.ones((2, 4))) ** 2)

    optimizer.step(loss)
    model.kernel.set_value(jnp.ones((4, 10)))
    model.bias.set_value(jnp.zeros(10))
    with pytest.raises(ValueError, match=r"state of parameter 'bias': 'exp_avg' has shape \(1,\), expected \(10,\)"):
        optimizer.step(loss)
    for box in optimizer.param_groups[0]["params"]:
        del optimizer.state[box]
    optimizer.step(loss)
    assert optimizer.state[next(optim.parameters(model))]["exp_avg"].shape == (10,)


def test_a_buffer_that_is_none_begins_again(torch: Any) -> None:
    w = torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.SGD([w], lr=1.0, momentum=0.9, dampening=0.5)
    ours = optim.SGD([optim.Parameter(jnp.ones(2))], lr=1.0, momentum=0.9, dampening=0.5)
    (box,) = ours.param_groups[0]["params"]
    for step in range(4):
        if step == 2:
            ours.state[box]["momentum_buffer"] = theirs.state[w]["momentum_buffer"] = None
        w.grad = torch.ones(2)
        theirs.step()
        by_gradient(ours, jnp.ones(2))
    np.testing.assert_allclose(box.value, w.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(
        ours.state[box]["momentum_buffer"], theirs.state[w]["momentum_buffer"].numpy(), rtol=1e-6
    )


@pytest.mark.parametrize("wrong", [jnp.zeros(3, int), jnp.zeros(4), jnp.zeros(3, complex), "text"], ids=str)
def test_edited_state_is_checked_on_its_way_to_the_functional_form(wrong: Any) -> None:
    parameter = optim.Parameter(jnp.ones(3), name="w")
    optimizer = optim.Adam([parameter], lr=0.1)
    optimizer.step([jnp.ones(3)])
    optimizer.state[parameter]["exp_avg"] = wrong
    with pytest.raises(ValueError, match="state of parameter 'w': 'exp_avg'"):
        optimizer.functional_state()


def test_lbfgs_notices_edited_parameters() -> None:
    edits = (lambda params: params.pop(), lambda params: params.append(optim.Parameter(jnp.ones((2, 2)))))
    for edit in edits:
        a, b = (optim.Parameter(jnp.ones((2, 2)), name=name) for name in "ab")
        optimizer = optim.LBFGS([a, b])
        loss = lambda params: sum(jnp.sum(jnp.asarray(p) ** 2) for p in params)  # noqa: E731
        optimizer.step(loss)
        edit(optimizer.param_groups[0]["params"])
        with pytest.raises(ValueError, match=r"state of parameter 'a': 'd' has shape \(8,\), expected"):
            optimizer.step(loss)
