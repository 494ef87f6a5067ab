"""A network trained in PyTorch, then here, then in PyTorch again, is the one that was trained in PyTorch alone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_twins import Twin, twin_of_pytorch

import optimjax as optim
from optimjax.interop import torch as interop

pytestmark = pytest.mark.usefixtures("folder", "x64")

STEPS = 20  # here, and before and after it in PyTorch


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels last, as we take them."""
    rng = np.random.default_rng(step)
    return rng.normal(size=(6, 4, 4, 2)), rng.normal(size=(6, 1))


def loss_fn(net: Any, x: Any, y: Any) -> Any:
    return jnp.mean((net(x) - y) ** 2)


# --- PyTorch's side ---------------------------------------------------------------------------------------------------

# What makes the optimizers of a network, by name; each has some of the parameters.
Make = Callable[[Any, Any], dict[str, Any]]


def decayed(net: Any) -> list[dict[str, Any]]:
    """In two groups: what has axes decays."""
    named = list(net.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0, "lr": 0.005},
    ]


MATRICES = ("attention.out_proj.weight", "hidden.weight", "head.weight")


def muon_and_adamw(torch: Any, net: Any) -> dict[str, Any]:
    named = list(net.named_parameters())
    return {
        "muon": torch.optim.Muon([item for item in named if item[0] in MATRICES], lr=0.02),
        "adamw": torch.optim.AdamW([item for item in named if item[0] not in MATRICES], lr=0.01),
    }


def lbfgs(torch: Any, net: Any) -> dict[str, Any]:
    options: Any = dict(lr=0.05, max_iter=2, history_size=5)
    return {"lbfgs": torch.optim.LBFGS(net.named_parameters(), **options)}


MAKE: dict[str, Make] = {
    "AdamW in two groups": lambda torch, net: {"adamw": torch.optim.AdamW(decayed(net), lr=0.01, amsgrad=True)},
    "SGD": lambda torch, net: {"sgd": torch.optim.SGD(net.named_parameters(), lr=0.05, momentum=0.9)},
    "Muon and AdamW": muon_and_adamw,
    "Muon and AdamW in one": muon_and_adamw,
    "LBFGS": lbfgs,
    "Adafactor": lambda torch, net: {"adafactor": torch.optim.Adafactor(net.named_parameters(), lr=0.05)},
}


def train(torch: Any, net: Any, optimizers: Mapping[str, Any], start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        images, y = (torch.from_numpy(array) for array in batch(step))
        x = images.permute(0, 3, 1, 2)

        def closure(x: Any = x, y: Any = y) -> Any:
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss = torch.mean((net(x) - y) ** 2)
            loss.backward()
            return loss

        if "lbfgs" in optimizers:
            losses.append(optimizers["lbfgs"].step(closure).item())
            continue
        losses.append(closure().item())
        for optimizer in optimizers.values():
            optimizer.step()
    return losses


# --- Our side ---------------------------------------------------------------------------------------------------------


def continued(saved: dict[str, Any], make: Callable[[str, Any], Any]) -> tuple[dict[str, Any], list[float]]:
    """The steps in between, on a module: a checkpoint comes in and one goes out."""
    net = Twin()
    layout = interop.load_weights(net, saved["model"])
    states = {name: interop.from_torch(state, layout=layout) for name, state in saved["optimizers"].items()}
    optimizers = {name: make(name, interop.groups(net, state)) for name, state in states.items()}
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(states[name])
    whole = optim.SGD(net)  # which never steps, but differentiates for all
    losses = []
    for step in range(STEPS, 2 * STEPS):
        if len(optimizers) == 1:
            (optimizer,) = optimizers.values()
            losses.append(float(optimizer.step(in_module, net, *batch(step))))
            continue
        whole.zero_grad()
        losses.append(float(whole.backward(loss_fn, *batch(step))))
        for optimizer in optimizers.values():
            optimizer.step()
    back = {name: interop.to_torch(each.state_dict(), layout=layout) for name, each in optimizers.items()}
    return {"model": interop.weights(net, layout, tensors=True), "optimizers": back}, losses


def continued_in_one(saved: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """The same with one optimizer for both of PyTorch's."""
    net = Twin()
    layout = interop.load_weights(net, saved["model"])
    states = saved["optimizers"]
    state = interop.from_torch({"Muon": states["muon"], None: states["adamw"]}, layout=layout)
    optimizer = optim.AdamW(interop.groups(net, state))
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        if group.get("algorithm") is not None:
            group["ns_dtype"] = None
    losses = [float(optimizer.step(in_module, net, *batch(step))) for step in range(STEPS, 2 * STEPS)]
    back = interop.to_torch(optimizer.state_dict(), layout=layout)
    model = interop.weights(net, layout, tensors=True)
    return {"model": model, "optimizers": {"muon": back["Muon"], "adamw": back[None]}}, losses


def in_module(*args: Any) -> Any:
    """The loss of what an optimizer of parameters is given: its own parameters are not an argument."""
    net, x, y = args[-3:]
    return loss_fn(net, x, y)


def continued_in_their_axes(saved: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """The same for what works on arrays as a whole: it trains PyTorch's arrays, and the loss turns them into ours."""
    net = Twin(bias=False)
    layout = interop.load_weights(net, saved["model"])
    graphdef, rest = nnx.split(net)
    state = saved["optimizers"]["adafactor"]
    names = state["param_groups"][0]["param_names"]
    theirs = interop.weights(net, layout)
    statistics = {name: theirs[name] for name in theirs if name not in names}

    def loss_of_theirs(params: Any, x: Any, y: Any) -> Any:
        module = nnx.merge(graphdef, rest, copy=True)
        interop.load_weights(module, params | statistics)
        return loss_fn(module, x, y)

    optimizer = optim.Adafactor({name: jnp.asarray(theirs[name]) for name in names})
    optimizer.load_state_dict(state)
    losses = [float(optimizer.step(loss_of_theirs, *batch(step))) for step in range(STEPS, 2 * STEPS)]
    model = {**saved["model"], **{name: np.asarray(array) for name, array in optimizer.params.items()}}
    back = interop.to_torch(optimizer.state_dict(), layout=dict.fromkeys(names))
    return {"model": model, "optimizers": {"adafactor": back}}, losses


OURS: dict[str, Callable[[Any], Any]] = {
    "adamw": optim.AdamW,
    "sgd": optim.SGD,
    "muon": lambda groups: optim.Muon(groups, ns_dtype=None),
    "lbfgs": optim.LBFGS,
}


@pytest.mark.parametrize("name", MAKE)
def test_a_network_comes_here_and_goes_back(name: str, torch: Any) -> None:
    bias = name != "Adafactor"  # which scales gradients of rounding up
    stayed = twin_of_pytorch(torch, bias)
    expected = train(torch, stayed, MAKE[name](torch, stayed), 0, 3 * STEPS)

    before = twin_of_pytorch(torch, bias)
    optimizers = MAKE[name](torch, before)
    losses = train(torch, before, optimizers, 0, STEPS)
    states = {key: optimizer.state_dict() for key, optimizer in optimizers.items()}
    torch.save({"model": before.state_dict(), "optimizers": states}, "run.pt")

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax relies on both
        if name == "Adafactor":
            back, more = continued_in_their_axes(interop.load("run.pt"))
        elif "in one" in name:
            back, more = continued_in_one(interop.load("run.pt"))
        else:
            back, more = continued(interop.load("run.pt"), lambda key, groups: OURS[key](groups))

    after = twin_of_pytorch(torch, bias)
    interop.save("model.pt", back["model"])
    after.load_state_dict(torch.load("model.pt", weights_only=True))
    optimizers = MAKE[name](torch, after)
    for key, optimizer in optimizers.items():
        optimizer.load_state_dict(back["optimizers"][key])
    last = train(torch, after, optimizers, 2 * STEPS, 3 * STEPS)

    np.testing.assert_allclose(losses + more + last, expected, rtol=1e-9, atol=1e-9)
    for (key, one), (_, other) in zip(after.named_parameters(), stayed.named_parameters(), strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=1e-9, atol=1e-9, err_msg=key)
