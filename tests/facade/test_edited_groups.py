"""Groups that were edited or misspelt, and what only looks like groups, train or raise an error that says why."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from losses import square

import optimjax as optim
from optimjax import functional as F
from optimjax.swa_utils import AveragedModel


@pytest.mark.parametrize("named", [False, True])
def test_parameters_put_into_a_group_by_hand_are_trained_by_every_form(named: bool) -> None:
    """As 3D Gaussian splatting does: more of them, or others, and their state is moved."""

    def pairs(*boxes: Any) -> Any:
        return [(box.name, box) for box in boxes] if named else list(boxes)

    a, b = (optim.Parameter(jnp.ones(2), name=name) for name in "ab")
    optimizer = optim.SGD(pairs(a), lr=0.25)
    group = optimizer.param_groups[0]
    optimizer.step(square)
    group["params"].append(b)
    if named:
        with pytest.raises(
            ValueError, match=r"2 parameters have 1 names of param_groups\[0\]: edit 'param_names', too"
        ):
            optimizer.step(square)
        group["param_names"].append("b")
    optimizer.step(square)
    np.testing.assert_array_equal([a.value, b.value], [[0.25, 0.25], [0.5, 0.5]])
    assert len(optimizer.params) == 2
    optimizer.step({"a": jnp.ones(2), "b": jnp.ones(2)} if named else [jnp.ones(2), jnp.ones(2)])
    np.testing.assert_array_equal([a.value, b.value], [[0, 0], [0.25, 0.25]])
    optimizer.zero_grad()
    optimizer.backward(square)
    np.testing.assert_array_equal(b.grad, [0.5, 0.5])

    group["params"][:] = [c := optim.Parameter(jnp.ones(3), name="c")]
    if named:
        group["param_names"][:] = ["c"]
    optimizer.step(square)
    np.testing.assert_array_equal(c.value, [0.5, 0.5, 0.5])
    assert len(optimizer.params) == 1


def test_parameters_put_into_the_group_of_a_tree_by_hand_are_named() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    optimizer.param_groups[0]["params"].append(optim.Parameter(jnp.ones(2), name="mine"))
    with pytest.raises(ValueError, match=r"mine: put into param_groups by hand.*add_param_group"):
        optimizer.step(square)


@pytest.mark.parametrize(
    "params",
    [
        [{"param": jnp.ones(2), "lr": 0.5}, {"param": jnp.ones(2), "lr": 0.9}],
        {"params": [jnp.ones(2)], "lr": 0.5},
        [[{"params": jnp.ones(2), "lr": 0.5}]],
        [{"weights": jnp.ones(2), "weight_decay": 0.1}],
        {"parameters": jnp.ones(2), "momentum": 0.9},
    ],
)
def test_misspelt_groups_are_no_tree(params: Any) -> None:
    with pytest.raises(ValueError, match=r"is an option, here .* groups are a list of dicts, each with 'params'"):
        optim.SGD(params, lr=0.1)


def test_a_tree_may_have_numbers_of_its_own() -> None:
    optimizer = optim.Adam({"norm": {"scale": jnp.ones(2), "eps": 1e-5}, "momentum": 0.9})
    assert optimizer.params["norm"]["eps"] == 1e-5
    assert optim.SGD({"lr": jnp.ones(2)}).params["lr"].shape == (2,)  # a parameter of this name


@pytest.mark.parametrize("x", [None, 3, 0.5, "w", len, object()])
def test_what_has_no_parameters_is_told_so(x: Any) -> None:
    with pytest.raises(TypeError, match="must hold parameters, got"):
        list(optim.parameters(x))


def test_a_module_of_pytorch_is_called_one(torch: Any) -> None:
    model = torch.nn.Linear(2, 1)
    for take in (optim.Adam, lambda x: list(optim.parameters(x)), lambda x: optim.Adam({"a": x, "b": jnp.ones(2)})):
        with pytest.raises(TypeError, match=r"must hold parameters, got Linear.*PyTorch module.*Coming from PyTorch"):
            take(model)


def test_the_parameters_of_an_optimizer_can_be_clipped() -> None:
    optimizer = optim.SGD({"a": jnp.zeros(2)}, lr=0.1)
    (box,) = optim.parameters(optimizer)
    assert box is optimizer.param_groups[0]["params"][0]
    assert [name for name, _ in optim.named_parameters(optimizer)] == ["a"]
    box.grad = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(optim.clip_grad_norm_(optim.parameters(optimizer), 1.0), 5.0)
    np.testing.assert_allclose(box.grad, [0.6, 0.8], rtol=1e-5)


def test_a_rate_may_be_a_tensor(torch: Any) -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)))
    optimizer.add_param_group({"params": {"v": jnp.ones(2)}, "lr": torch.tensor(0.2)})
    optimizer.step([{"w": jnp.ones(2)}, {"v": jnp.ones(2)}])
    np.testing.assert_allclose(
        [p for part in optimizer.params for p in part.values()], [[0.9] * 2, [0.8] * 2], rtol=1e-6
    )


def test_a_rate_that_is_none_is_not_offered_a_schedule() -> None:
    with pytest.raises(TypeError, match=r"^lr must be a number or an array of one element, got 'fast'$"):
        optim.Adam({"w": jnp.ones(2)}, lr="fast")


@pytest.mark.parametrize(
    "groups",
    [
        {"a": {"params": [jnp.ones(1)], "lr": 0.5}, "b": {"params": [jnp.ones(1)], "lr": 0.9}},
        {"params": [jnp.ones(1)], "lr": np.float32(0.5)},
        {"params": [jnp.ones(1)], "lr": [0.5]},
    ],
    ids=["dict of groups", "numpy scalar", "list"],
)
def test_more_of_what_looks_like_groups(groups: Any) -> None:
    with pytest.raises(ValueError, match=r"'lr' is an option, .* because it is not a group"):
        optim.SGD(groups, lr=0.1)


def test_one_parameter_twice_by_hand() -> None:
    parameter = optim.Parameter(jnp.ones(2), name="w")
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"].append(parameter)
    with pytest.raises(ValueError, match="appears more than once in the groups, which were edited: w"):
        optimizer.step([jnp.ones(2)] * 2)


@pytest.mark.parametrize(
    "use",
    [
        AveragedModel,
        lambda module: optim.group_parameters(module, []),
        F.adam().init,
        lambda module: optim.clip_grad_norm_(module, 1.0),
    ],
    ids=["average", "groups", "functional", "clip"],
)
def test_modules_of_pytorch_are_called_by_their_name(use: Callable[..., Any], torch: Any) -> None:
    with pytest.raises(TypeError, match="PyTorch module"):
        use(torch.nn.Linear(2, 2))
