"""Rules choose groups by name, and freeze and unfreeze parameters; one that chooses nothing is an error."""

import copy
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim


class Net(nnx.Module):
    def __init__(self, rngs: Any):
        self.base = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(nnx.relu(self.base(x)))


def tree() -> Any:
    return {"base": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}, "head": {"bias": jnp.ones(2)}, "step": 3}


def names(groups: Any) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"params": "base.*"}], [["base.bias", "base.kernel"], ["head.bias"]]),
        ([{"params": "*.bias"}], [["base.bias", "head.bias"], ["base.kernel"]]),
        ([{"params": "*.bias"}, {"params": "base.*"}], [["base.bias", "head.bias"], ["base.kernel"]]),
        ([{"params": "*"}], [["base.bias", "base.kernel", "head.bias"]]),
        ([{"params": re.compile("e.b")}], [["base.bias"], ["base.kernel", "head.bias"]]),
        ([{"params": lambda name, value: value.ndim > 1}], [["base.kernel"], ["base.bias", "head.bias"]]),
        ([], [["base.bias", "base.kernel", "head.bias"]]),
    ],
)
def test_the_first_rule_that_matches_has_the_parameter(rules: Any, expected: Any) -> None:
    assert names(optim.group_parameters(tree(), rules)) == expected


@pytest.mark.parametrize("kind", ["tree", "module", "pairs"])
def test_grouped_parameters_are_one_whole(kind: str) -> None:
    def make() -> Any:
        if kind == "tree":
            return {"base": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
        module = Net(nnx.Rngs(0))
        return module if kind == "module" else list(optim.named_parameters(module))

    rules = [{"params": "head.kernel", "lr": 0.5}, {"params": "base.bias", "requires_grad": False}]
    given = make()
    optimizer = optim.SGD(optim.group_parameters(given, rules[: 1 if kind == "tree" else 2]), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0]["param_names"] == ["head.kernel"]
    if kind == "module":
        assert optimizer.params is given
        before = np.asarray(given.base.kernel.get_value())
        optimizer.step(jax.tree.map(jnp.ones_like, nnx.state(given, nnx.Param)))
        np.testing.assert_allclose(given.base.kernel.get_value(), before - 0.1, rtol=1e-6)
    elif kind == "pairs":
        assert optimizer.params.keys() == dict(given).keys()
    else:
        assert jax.tree.structure(optimizer.params) == jax.tree.structure(given)
        optimizer.step(jax.tree.map(jnp.ones_like, given))
        np.testing.assert_allclose(optimizer.params["base"]["kernel"], 0.9, rtol=1e-6)
        np.testing.assert_allclose(optimizer.params["head"]["kernel"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["tree", "module"])
def test_frozen_parameters_stay_until_their_group_is_added(kind: str) -> None:
    def loss(params: Any) -> Any:
        leaves = jax.tree.leaves(nnx.state(params, nnx.Param) if kind == "module" else params)
        return sum(jnp.sum(leaf**2) for leaf in leaves)

    given = Net(nnx.Rngs(0)) if kind == "module" else {"base": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    groups = optim.group_parameters(given, [{"params": "base.*", "requires_grad": False}])
    optimizer = optim.Adam(groups, lr=0.1)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    def values(part: str) -> np.ndarray:
        return np.asarray(
            getattr(given, part).kernel.get_value() if kind == "module" else optimizer.params[part]["kernel"]
        )

    base, head = values("base"), values("head")
    for form in ("loss", "backward"):
        if form == "loss":
            optimizer.step(loss)
        else:
            optimizer.backward(loss)
            assert all(box.grad is None for _, box in groups.frozen)
            optimizer.step()
        scheduler.step()
        np.testing.assert_array_equal(values("base"), base)
        assert not np.allclose(values("head"), head)
    assert not any(box in optimizer.state for _, box in groups.frozen)

    optimizer.add_param_group({"params": groups.frozen, "lr": 0.4})
    for _, box in groups.frozen:
        box.requires_grad = True
    optimizer.step(loss)
    scheduler.step()
    assert not np.allclose(values("base"), base)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.2]
    if kind == "tree":
        optimizer.step(optimizer.params)  # gradients still have the structure of the whole
    twin = copy.deepcopy(optimizer)
    assert names([{"params": [(box.name, box) for box in group["params"]]} for group in twin.param_groups]) == names(
        [{"params": [(box.name, box) for box in group["params"]]} for group in optimizer.param_groups]
    )


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"params": "base.kernal"}, ValueError, r"rules\[1\] \('base\.kernal'\) matches no parameter.* base\.kernel"),
        ({"params": re.compile("^kernel")}, ValueError, r"rules\[1\] \('\^kernel'\) matches no .*base\.kernel"),
        (
            {"params": lambda name, value: False},
            ValueError,
            r"matches no parameter; there are, for example, base\.bias",
        ),
        ({"params": "head.*"}, ValueError, r"rules\[1\].* only what rules before it have: head\.bias"),
        ({"lr": 0.1}, TypeError, r"rules\[1\] must be a dict with 'params', got \{'lr': 0\.1\}"),
        ("base.*", TypeError, r"rules\[1\] must be a dict"),
        ({"params": 3}, TypeError, r"'params' of rules\[1\] must be a glob.*got 3"),
        ({"params": "*", "requires_grad": False, "lr": 1}, TypeError, r"rules\[1\] freezes .*\['lr'\] would have no"),
    ],
)
def test_errors_name_the_rule_and_change_nothing(rule: Any, error: Any, message: str) -> None:
    boxes = [(name, optim.Parameter(jnp.ones(2))) for name in ("base.bias", "base.kernel", "head.bias")]
    with pytest.raises(error, match=message):
        optim.group_parameters(boxes, [{"params": "head.bias", "requires_grad": False}, rule])
    assert all(box.requires_grad for _, box in boxes)


def test_names_are_needed_and_options_are_the_optimizers() -> None:
    with pytest.raises(ValueError, match="without names"):
        optim.group_parameters([optim.Parameter(1.0)], [])
    with pytest.raises(TypeError, match="unknown option 'momentun'"):
        optim.SGD(optim.group_parameters(tree(), [{"params": "base.*", "momentun": 0.9}]))
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.SGD(optim.group_parameters(tree(), [{"params": "*", "requires_grad": False}]))


def test_groups_are_shown_by_their_names_whatever_was_added_to_them() -> None:
    groups = optim.group_parameters(tree(), [{"params": "base.*", "lr": 0.1}])
    assert "'params': ['base." in repr(groups)
    assert "Array" not in repr(groups)
    groups += [{"params": [optim.Parameter(1.0, name="w")]}, {"params": {"v": 1.0}}, {}]
    assert "Parameter('w'" in repr(groups)
    assert "{'v': 1.0}" in repr(groups)
