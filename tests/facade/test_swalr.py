"""SWALR is PyTorch's, resumes, and refuses what PyTorch refuses."""

import copy
from typing import Any

import jax.numpy as jnp
import pytest

import optimjax as optim
from optimjax import swa_utils


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [0, 1, 5])
@pytest.mark.parametrize("swa_lr", [0.05, [0.02, 0.3]])
def test_swalr_is_pytorchs(strategy: str, epochs: int, swa_lr: Any, torch: Any) -> None:
    def trace(lib: Any, utils: Any, parameter: Any) -> Any:
        groups = [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.4}]
        optimizer = lib.SGD(groups, lr=1.0)
        scheduler = utils.SWALR(optimizer, swa_lr, anneal_epochs=epochs, anneal_strategy=strategy)
        rates = []
        for _ in range(12):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates, set(scheduler.state_dict())

    ours = trace(optim, swa_utils, lambda: optim.Parameter(jnp.ones(())))
    assert ours == trace(torch.optim, torch.optim.swa_utils, lambda: torch.nn.Parameter(torch.ones(())))


def test_swalr_resumes_and_refuses() -> None:
    def make() -> Any:
        optimizer = optim.SGD([jnp.ones(2)], lr=0.4)
        return optimizer, swa_utils.SWALR(optimizer, 0.1, anneal_epochs=4)

    whole, scheduler = make()
    other, restored = make()
    for index in range(6):
        if index == 2:
            saved = copy.deepcopy((whole.state_dict(), scheduler.state_dict()))
            other.load_state_dict(saved[0])
            restored.load_state_dict(saved[1])
        for each in (scheduler, restored)[: 1 + (index >= 2)]:
            each.optimizer.step([jnp.ones(2)])
            each.step()
    assert scheduler.get_last_lr() == restored.get_last_lr() == [0.1]
    before = dict(whole.param_groups[0])
    for wrong in ({"anneal_strategy": "sin"}, {"anneal_epochs": -1}, {"swa_lr": [1.0, 2.0]}):
        with pytest.raises(ValueError, match=r"anneal_|swa_lr"):
            swa_utils.SWALR(whole, **{"swa_lr": 0.2, **wrong})
        assert whole.param_groups[0] == before


def test_a_group_added_later_gets_the_rate_of_the_others() -> None:
    optimizer = optim.SGD([jnp.ones(2)], lr=0.4)
    scheduler = swa_utils.SWALR(optimizer, 0.1, anneal_epochs=2)
    optimizer.add_param_group({"params": [jnp.ones(3)], "lr": 0.8})
    for _ in range(4):
        optimizer.step([[jnp.ones(2)], [jnp.ones(3)]])
        scheduler.step()
    assert [group["swa_lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert scheduler.get_last_lr() == [0.1, 0.1]
