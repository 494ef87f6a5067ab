"""A scheduler may set any number of the groups, not only the learning rate."""

from typing import Any

import jax.numpy as jnp
import pytest
from scheduler_cases import build, every_case, follow, groups_of, make, rates_of

import optimjax as optim


@pytest.mark.parametrize("key", ["weight_decay", "momentum"])
@every_case
def test_any_number_of_the_groups_is_scheduled_alike(case: str, key: str) -> None:
    ours, rates = build(key=key), build()
    scheduler, reference = make(optim.lr_scheduler, case, key=key)(ours), make(optim.lr_scheduler, case)(rates)
    trace = follow(ours, scheduler, 100, lambda optimizer: [group[key] for group in optimizer.param_groups])
    assert trace == follow(rates, reference, 100)
    assert scheduler.get_last_lr() == reference.get_last_lr()
    assert rates_of(ours) == [0.5] * 3


@pytest.mark.parametrize("case", ["cyclic", "one cycle"])
def test_the_momentum_is_not_cycled_twice(case: str) -> None:
    optimizer = build()
    before = groups_of(optimizer)
    with pytest.raises(ValueError, match="key='momentum' needs cycle_momentum=False"):
        make(optim.lr_scheduler, case)(optimizer, key="momentum")
    assert groups_of(optimizer) == before


@pytest.mark.parametrize("key", ["rate", "nesterov", "foreach", "params", "betas"])
def test_a_key_that_is_no_number_is_refused(key: str) -> None:
    optimizer = optim.NAdam([jnp.ones(())]) if key == "betas" else build()
    before = groups_of(optimizer)
    for case in ("exponential", "cyclic", "one cycle", "plateau"):
        with pytest.raises((TypeError, KeyError), match=key):
            make(optim.lr_scheduler, case)(optimizer, key=key)
    assert groups_of(optimizer) == before


def test_two_numbers_of_one_optimizer(compilations: Any) -> None:
    """Side by side, in a chain, and in a sequence; the step compiles nothing for it."""

    def run(arrange: Any) -> Any:
        optimizer = optim.AdamW([jnp.ones(3)], lr=1.0, weight_decay=0.5)
        rate = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        decay = optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, key="weight_decay")
        schedulers, trace, compiled = arrange([rate, decay]), [], []
        for _ in range(12):
            trace.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
            optimizer.step([jnp.ones(3)])
            for scheduler in schedulers:
                scheduler.step()
            compiled.append(compilations())
        assert compiled[1] == compiled[-1]
        assert schedulers[0].get_last_lr() == [optimizer.param_groups[0]["lr"]]
        return trace

    trace = run(list)
    assert [rate for rate, _ in trace] == pytest.approx([0.9**epoch for epoch in range(12)])
    expected = [optim.schedules.cosine_annealing(0.5, 20)(epoch) for epoch in range(12)]
    assert [decay for _, decay in trace] == pytest.approx(expected)
    assert run(lambda both: [optim.lr_scheduler.ChainedScheduler(both)]) == trace
    in_turn = run(lambda both: [optim.lr_scheduler.SequentialLR(both[0].optimizer, both, [5])])
    assert in_turn[:5] == [(rate, 0.5) for rate, _ in trace[:5]]
    assert in_turn[5:] == [(in_turn[4][0], decay) for _, decay in trace[:7]]
