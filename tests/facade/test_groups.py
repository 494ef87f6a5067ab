"""Groups have options of their own, can be edited by hand, and can be added in the middle of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import VALUES, Net, batch, groups, mse

import optimjax as optim


def test_group_options_and_defaults() -> None:
    optimizer = optim.SGD(groups([jnp.ones(2)], {"w": jnp.ones(3)}), lr=0.5, momentum=0.9)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["momentum"]) == (0.5, 0, 0.9)
    assert (second["lr"], second["weight_decay"], second["momentum"]) == (0.02, 0.0, 0.9)
    assert optimizer.defaults["lr"] == 0.5
    assert isinstance(optimizer.params, list)
    assert [type(part) for part in optimizer.params] == [list, dict]


def test_the_users_group_dicts_are_left_alone() -> None:
    given = [{"params": [optim.Parameter(1.0)]}]
    shallow = [dict(group) for group in given]
    optim.SGD(given, lr=0.1)
    assert given == shallow


def test_group_values_can_be_edited_by_hand() -> None:
    optimizer = optim.SGD(groups([jnp.ones(2)], [jnp.ones(2)]), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    optimizer.step([[jnp.ones(2)], [jnp.ones(2)]])
    np.testing.assert_allclose(optimizer.params[0][0], 0.9, rtol=1e-6)
    np.testing.assert_allclose(optimizer.params[1][0], 0.998, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["backward", "grads", "loss"])
def test_add_param_group_mid_run_is_pytorchs(form: str, torch: Any) -> None:
    def ours() -> list[Any]:
        first, second = optim.Parameter(VALUES[0]), optim.Parameter(VALUES[1])
        optimizer = optim.Adam([first], lr=0.1)
        one = lambda params: jnp.sum(params[0] ** 4)  # noqa: E731
        both = lambda params: jnp.sum(params[0][0] ** 4) + jnp.sum(params[1][0] ** 4)  # noqa: E731
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": second, "lr": 0.02})
            loss = one if step < 3 else both
            if form == "backward":
                optimizer.zero_grad()
                optimizer.backward(loss)
                optimizer.step()
            else:
                optimizer.step(jax.grad(loss)(optimizer.params) if form == "grads" else loss)
        assert [optimizer.state[box]["step"] for box in (first, second)] == [6, 3]
        return [first.value, second.value]

    def theirs() -> list[Any]:
        first, second = (torch.nn.Parameter(torch.from_numpy(v.copy())) for v in VALUES[:2])
        optimizer = torch.optim.Adam([first], lr=0.1)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": second, "lr": 0.02})
            optimizer.zero_grad()
            loss = (first**4).sum() + ((second**4).sum() if step >= 3 else 0)
            loss.backward()
            optimizer.step()
        return [first.detach().numpy(), second.detach().numpy()]

    for a, b in zip(ours(), theirs(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_add_param_group_of_a_module_while_fine_tuning() -> None:
    net = Net([np.float32(v) for v in VALUES])
    x, y = (np.float32(a) for a in batch(0))
    optimizer = optim.SGD(net.head, lr=0.1)
    optimizer.add_param_group({"params": optim.named_parameters(net.base), "lr": 0.01})
    before = np.asarray(net.base.kernel)
    optimizer.backward(lambda head, net, x, y: mse(head(jnp.tanh(net.base(x))), y), net, x, y)
    grad = {box.name: box.grad for box in optimizer.param_groups[1]["params"]}["kernel"]
    optimizer.step()
    np.testing.assert_allclose(net.base.kernel[...], before - 0.01 * np.asarray(grad), rtol=1e-6)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_group_may_be_empty(named: bool, first: bool) -> None:
    """In PyTorch only among groups without names."""
    box = optim.Parameter(1.0)
    groups = [{"params": [("w", box)] if named else [box]}, {"params": [], "lr": 0.5}]
    optimizer = optim.Adam(groups[::-1] if first else groups, lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    box.grad = 1.0
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [("v", optim.Parameter(1.0))] if named else [optim.Parameter(1.0)]})
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == ([0, 1, 1] if first else [1, 0, 1])
    assert "<td>0</td>" in optimizer._repr_html_()
