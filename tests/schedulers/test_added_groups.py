"""A group that is added in the middle of a run is scheduled from then on, and the other groups do not notice."""

import contextlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_cases import (
    EPOCHS,
    ORDERS,
    RATES,
    THROUGH,
    Case,
    Decay,
    build,
    build_torch,
    chain,
    every_case,
    follow,
    groups_of,
    make,
    outcome,
    rates_of,
    sequence,
    warm_up,
)

import optimjax as optim


@every_case
def test_a_group_added_mid_run_is_scheduled(case: str, torch: Any) -> None:
    """As in PyTorch, or, where that raises, the others as if nothing were, and the new one too."""

    def run(module: Any, optimizer: Any, params: Any, added: bool = True) -> Any:
        scheduler = make(module, case)(optimizer)
        follow(optimizer, scheduler, 10)
        if added:
            optimizer.add_param_group({"params": params, "lr": 0.25})
        return follow(optimizer, scheduler, 90, first=10)

    theirs = outcome(lambda: run(torch.optim.lr_scheduler, build_torch(torch), [torch.nn.Parameter(torch.ones(()))]))
    if "each group" in case or case == "plateau abs":  # there is no value for the new one
        with pytest.raises((ValueError, RuntimeError), match=r"(added|with) .*(add its own|modify the `min_lrs`)"):
            run(optim.lr_scheduler, build(), [jnp.ones(())])
        return
    ours = run(optim.lr_scheduler, build(), [jnp.ones(())])
    if isinstance(theirs, list):
        assert ours == theirs
    else:
        assert [rates[:3] for rates in ours] == run(optim.lr_scheduler, build(), [], added=False)
        assert ours[0][3] == 0.25
        assert len({rates[3] for rates in ours}) > 1


@every_case
def test_the_other_groups_do_not_notice_one_that_is_added(case: str) -> None:
    """Every value of theirs, momentum too, is what it would have been; the momentum of the new one cycles with them."""
    if "each group" in case or case == "plateau abs":  # there is no value for the new one
        return

    def run(added: bool) -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        trace = follow(optimizer, scheduler, 7, groups_of)
        if added:
            optimizer.add_param_group({"params": [jnp.ones(())], "lr": RATES[0]})
        return trace + follow(optimizer, scheduler, EPOCHS - 7, groups_of, first=7)

    alone, together = run(added=False), run(added=True)
    assert [groups[:3] for groups in together] == alone
    assert all(groups[3]["momentum"] == groups[0]["momentum"] for groups in together[8:])


def test_the_rates_of_a_group_added_mid_run() -> None:
    def run(case: str | Case) -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        follow(optimizer, scheduler, 10)
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        follow(optimizer, scheduler, 1)
        return [rates[3] for rates in follow(optimizer, scheduler, 60)], optimizer.param_groups

    assert run("lambda")[0] == [0.25 * warm_up(epoch) for epoch in range(11, 71)]
    restarts = optim.schedules.cosine_annealing_warm_restarts(0.25, 9)
    assert run("warm restarts")[0] == [restarts(epoch) for epoch in range(11, 71)]
    rates, groups = run("one cycle")
    assert rates == run("one cycle")[0]
    assert groups[3]["lr"] == groups[0]["lr"]
    assert groups[3]["momentum"] == groups[0]["momentum"] != 0.9
    assert run(sequence(["exponential", "lambda"], 20))[0][9:] == [0.25 * warm_up(epoch) for epoch in range(51)]
    assert run(sequence(["exponential", "plateau"], 11))[0][0] == 0.25


COSINE = "CosineAnnealingLR", dict(T_max=5, eta_min=0.01)


@pytest.mark.parametrize(
    ("case", "begin"),
    [(COSINE, 0), (chain([COSINE]), 0), (sequence([COSINE, "step"], 40), 0), (sequence(["step", COSINE], 3), 3)],
    ids=["alone", "in a chain", "first of a sequence", "second of a sequence"],
)
@pytest.mark.parametrize("epoch", range(1, 12))
def test_a_group_added_anywhere_to_a_cosine(case: Case, begin: int, epoch: int, torch: Any) -> None:
    def run(module: Any, optimizer: Any, param: Any, **rates: float) -> list[Any]:
        scheduler = make(module, case)(optimizer)
        follow(optimizer, scheduler, begin + epoch)
        optimizer.add_param_group({"params": [param], "lr": 0.25, **rates})
        trace: list[Any] = []
        with contextlib.suppress(ValueError):  # of PyTorch, at the bottom
            for _ in range(24):
                trace += follow(optimizer, scheduler, 1)
        return trace

    theirs = run(torch.optim.lr_scheduler, build_torch(torch), torch.nn.Parameter(torch.ones(())))
    ours = run(optim.lr_scheduler, build(), jnp.ones(()))
    assert ours[: len(theirs)] == theirs
    assert len(theirs) < len(ours) == 24
    added = np.array(ours)[:, 3]
    if 5 < epoch < 10:  # on the way up, where PyTorch has values: far above, until the next bottom
        assert np.max(added) > 0.25
        added = added[16 - epoch :]
    np.testing.assert_array_less(added, 0.25 + 1e-9)
    np.testing.assert_array_less(0.01 - 1e-9, added)
    if epoch == 5:
        own = optim.schedules.cosine_annealing(0.25, 5, 0.01)
        np.testing.assert_allclose(added[1:], [own(at) for at in range(6, 29)], rtol=1e-9)
    like = {"lr": ours[0][0], "initial_lr": RATES[0]}
    both = np.array(run(optim.lr_scheduler, build(), jnp.ones(()), **like))
    np.testing.assert_allclose(both[:, 3], both[:, 0], rtol=1e-9)


@pytest.mark.parametrize("case", ["cyclic", "one cycle", "lambda", "plateau", "sequence of cycles"])
@pytest.mark.parametrize("through", THROUGH[1:], ids=["pickle", "JSON"])
def test_a_group_added_after_resuming(case: str, through: Any) -> None:
    def run(resume: bool) -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        follow(optimizer, scheduler, 10)
        if resume:
            saved = through([optimizer.state_dict(), scheduler.state_dict()])
            optimizer = build()
            scheduler = make(optim.lr_scheduler, case)(optimizer)
            optimizer.load_state_dict(saved[0] | {"state": {}})
            scheduler.load_state_dict(saved[1])
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        return follow(optimizer, scheduler, 90, groups_of, first=10)

    assert run(resume=True) == run(resume=False)


def test_a_group_added_alongside_a_list_of_lambdas() -> None:
    """There is no function for it: the error says where to give one, and no epoch is lost."""
    optimizer = build()
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, [Decay(0.9), Decay(0.8), Decay(0.7)])
    follow(optimizer, scheduler, 2)
    optimizer.add_param_group({"params": [jnp.ones(())], "lr": 1.0})
    before = rates_of(optimizer)
    with pytest.raises(ValueError, match=r"Expected 4 scheduler\.lr_lambdas, but got 3: .* add its own"):
        scheduler.step()
    assert rates_of(optimizer) == before
    assert scheduler.last_epoch == 2
    scheduler.lr_lambdas.append(Decay(0.6))
    scheduler.step()
    assert scheduler.last_epoch == 3
    assert rates_of(optimizer) == [
        rate * factor**3 for rate, factor in zip((*RATES, 1.0), (0.9, 0.8, 0.7, 0.6), strict=True)
    ]


@every_case
def test_a_run_with_an_added_group_resumes(case: str) -> None:
    def start() -> Any:
        optimizer = build()
        scheduler = make(optim.lr_scheduler, case)(optimizer)
        follow(optimizer, scheduler, 5)
        optimizer.add_param_group({"params": [jnp.ones(())], "lr": 0.25})
        follow(optimizer, scheduler, 5, first=5)
        return optimizer, scheduler

    if "each group" in case or case == "plateau abs":
        return
    optimizer, scheduler = start()
    for order in ORDERS:
        other = build((*RATES, 0.25))
        saved = [optimizer.state_dict(), [scheduler.state_dict()]]
        built = order(other, [make(optim.lr_scheduler, case)], saved)
        assert follow(other, built, 30, first=10) == follow(*start(), 30, first=10)
