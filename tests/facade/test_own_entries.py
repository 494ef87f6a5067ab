"""Groups and state may hold entries of a user's own, as SAM and Lookahead need them."""

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from losses import square

import optimjax as optim


class SAM(optim.Optimizer):
    """github.com/davda54/sam, its constructor to the letter; arithmetic without in-place methods."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any):
        assert rho >= 0.0, f"Invalid rho, should be non-negative: {rho}"

        defaults = dict(rho=rho, adaptive=adaptive, **kwargs)
        super().__init__(params, defaults)

        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def first_step(self, zero_grad: bool = False) -> None:
        norm = jnp.sqrt(sum(jnp.sum(p.grad**2) for g in self.param_groups for p in g["params"]))
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old_p"] = p.value
                p += p.grad * scale
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.value = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss


def test_sam_as_it_is_copied_from_everywhere(torch: Any) -> None:
    class TorchSAM(torch.optim.Optimizer):
        def __init__(self, params: Any, rho: float, **kwargs: Any):
            super().__init__(params, dict(rho=rho, **kwargs))
            self.base_optimizer = torch.optim.SGD(self.param_groups, **kwargs)
            self.param_groups = self.base_optimizer.param_groups

        @torch.no_grad()
        def move(self) -> None:
            norm = torch.stack([p.grad.norm(2) for g in self.param_groups for p in g["params"]]).norm(2)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))

    start = np.array([1.0, -2.0, 0.5], np.float32)
    w = torch.nn.Parameter(torch.tensor(start))
    theirs = TorchSAM([w], 0.05, lr=0.1, momentum=0.9)
    box = optim.Parameter(jnp.asarray(start))
    ours = SAM([box], optim.SGD, lr=0.1, momentum=0.9)

    def quartic(params: Any) -> Any:
        return jnp.sum(params[0] ** 4)

    def closure() -> Any:
        return ours.backward(quartic)

    for _ in range(4):
        ours.zero_grad()
        ours.step(closure)
        theirs.zero_grad()
        (w**4).sum().backward()
        theirs.move()
        theirs.zero_grad()
        (w**4).sum().backward()
        w.data = theirs.state[w]["old_p"]
        theirs.base_optimizer.step()
    np.testing.assert_allclose(box.value, w.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("first", ["Adam", "RMSprop", "Adafactor", "ASGD"])
def test_the_groups_of_one_optimizer_become_anothers(first: str) -> None:
    boxes = [optim.Parameter(jnp.ones((2, 2)), name="w"), optim.Parameter(jnp.ones((1, 2)), name="v")]
    before = getattr(optim, first)([(box.name, box) for box in boxes], lr=0.5)
    after = optim.SGD(before.param_groups, momentum=0.9)
    (group,) = after.param_groups
    assert group["lr"] == 0.5  # as in PyTorch, the group's own
    assert group["params"] == boxes
    assert group["param_names"] == ["w", "v"]
    assert set(before.param_groups[0]) <= set(group)
    after.step([{"w": jnp.ones((2, 2)), "v": jnp.ones((1, 2))}])
    np.testing.assert_array_equal(boxes[0].value, jnp.full((2, 2), 0.5))
    again = optim.SGD(boxes)
    again.load_state_dict(after.state_dict())
    assert again.param_groups[0].keys() - {"param_names"} >= group.keys() - {"param_names"}


@pytest.mark.parametrize(
    "own", [{"lr_scale": 0.5}, {"rho": 0.05, "adaptive": True}, {"layer": "embed"}, {"wd_mult": 0.0}]
)
def test_a_group_keeps_entries_of_ones_own(own: Any) -> None:
    optimizer = optim.AdamW([{"params": {"w": jnp.ones(2)}, **own}])
    assert optimizer.param_groups[0].items() >= own.items()
    other = optim.AdamW([{"params": {"w": jnp.ones(2)}}])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0].items() >= own.items()
    assert copy.deepcopy(optimizer).param_groups[0].items() >= own.items()
    repr(optimizer), optimizer._repr_html_()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weight_decy", "weight_decay"),
        ("weigth_decay", "weight_decay"),
        ("learning_rate", "lr"),
        ("beta", "betas"),
        ("beta1", "betas"),
        ("amsgrd", "amsgrad"),
        ("lrs", "lr"),
        ("maximise", "maximize"),
        ("epsilon", "eps"),
    ],
)
def test_a_misspelt_option_raises_with_the_one_that_is_meant(key: str, meant: str) -> None:
    optimizer = optim.AdamW({"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=rf"unknown option '{key}' of param_groups\[1\]: did you mean '{meant}'\?"):
        optimizer.add_param_group({"params": {"v": jnp.ones(2)}, key: 0.1})
    assert len(optimizer.param_groups) == 1


class Lookahead(optim.Optimizer):
    """timm's, as far as it keeps its slow weights in the state of the optimizer that it wraps."""

    def __init__(self, base_optimizer: Any, alpha: float = 0.5, k: int = 2):
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = base_optimizer.state
        self.alpha, self.k, self.count = alpha, k, 0

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self._base_optimizer.state[p]
                    state.setdefault("slow", p.value)
                    state["slow"] = state["slow"] + self.alpha * (p.value - state["slow"])
                    p.value = state["slow"]
        return loss

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._base_optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("base", ["Adam", "SGD"])
def test_slots_of_ones_own_are_saved_and_loaded(base: str) -> None:
    def make() -> Any:
        return Lookahead(getattr(optim, base)({"w": jnp.array([1.0, -2.0])}, lr=0.1))

    whole, begun = make(), make()
    for _ in range(6):
        whole.step(square)
    for _ in range(3):
        begun.step(square)
    resumed = make()
    resumed._base_optimizer.param_groups[0]["params"][0].value = begun._base_optimizer.params["w"]
    resumed.load_state_dict(begun.state_dict())
    resumed.count = 3
    for _ in range(3):
        resumed.step(square)
    np.testing.assert_array_equal(resumed._base_optimizer.params["w"], whole._base_optimizer.params["w"])


def test_state_of_another_algorithm_is_still_refused() -> None:
    adam, sgd = (cls({"w": jnp.ones(2)}) for cls in (optim.Adam, optim.SGD))
    adam.step(square)
    with pytest.raises(ValueError, match=r"has 'exp_avg', which SGD does not keep"):
        sgd.load_state_dict(adam.state_dict())
    assert not sgd.state


def test_own_slots_cross_and_come_back() -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    optimizer.step(square)
    (box,) = optimizer.param_groups[0]["params"]
    optimizer.state[box]["slow"] = box.value
    optimizer.load_functional_state(*optimizer.functional_state())
    assert set(optimizer.state[box]) == {"step", "exp_avg", "exp_avg_sq", "slow"}


def test_options_in_capitals() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'LR'.*did you mean 'lr'"):
        optim.AdamW([{"params": [jnp.ones(1)], "LR": 0.5}])
