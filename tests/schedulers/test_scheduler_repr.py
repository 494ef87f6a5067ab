"""A scheduler shows its arguments, its epoch and its rates."""

from typing import Any

import jax.numpy as jnp
from scheduler_cases import Warm, build, contents, every_case, follow, make

import optimjax as optim

SHOWN = {
    "lambda": "LambdaLR(lr_lambda=warm_up) at epoch 2: lr [0.0428571, 0.0158571, 0.000428571]",
    "lambda of each group": "LambdaLR(lr_lambda=[Decay, <lambda>, warm_up]) at epoch 2: lr [",
    "multi-step": "MultiStepLR(milestones=[3, 50, 50, 120], gamma=0.3) at epoch 2: lr [0.1, 0.037, 0.001]",
    "cosine": "CosineAnnealingLR(T_max=30, eta_min=0) at epoch 2: lr [0.0989074, 0.0365957, 0.000989074]",
    "constant": "ConstantLR(factor=0.333333, total_iters=5) at epoch 2: lr [",
    "cyclic of each group": (
        "CyclicLR(base_lr=[0.01, 0.02, 0], max_lr=[0.3, 0.1, 0.2], step_size_up=9, step_size_down=9, "
        "mode='triangular2', gamma=1, scale_mode='cycle', cycle_momentum=True, base_momentum=[0.7, 0.75, 0.8], "
        "max_momentum=[0.9, 0.95, 0.85]) at epoch 2: lr ["
    ),
    "cyclic scale_fn": "scale_fn=Decay, scale_mode='iterations'",
    "one cycle": "OneCycleLR(max_lr=0.4, total_steps=200, anneal_strategy='cos', cycle_momentum=True) at epoch 2: lr [",
    "plateau abs": (
        "ReduceLROnPlateau(mode='min', factor=0.5, patience=2, threshold=0.01, threshold_mode='abs', cooldown=2, "
        "min_lr=[0.001, 0.0001, 0], eps=1e-08) at epoch 2: lr ["
    ),
    "sequence of a chain": """SequentialLR(
    ChainedScheduler(
        ConstantLR(factor=0.15, total_iters=31),
        ExponentialLR(gamma=0.977),
        StepLR(step_size=7, gamma=0.1),
    ),
    CosineAnnealingWarmRestarts(T_0=9, T_mult=1, eta_min=0),
    milestones=[40],
) at epoch 2: lr [""",
    "chain of one": """ChainedScheduler(
    CosineAnnealingLR(T_max=30, eta_min=0),
): lr [0.0989074, 0.0365957, 0.000989074]""",
}


@every_case
def test_a_scheduler_shows_its_arguments_its_epoch_and_its_rates(case: str) -> None:
    optimizer = build()
    scheduler = make(optim.lr_scheduler, case)(optimizer)
    follow(optimizer, scheduler, 2)
    before = contents(optimizer, scheduler)
    shown = repr(scheduler)
    assert SHOWN.get(case, f"{type(scheduler).__name__}(") in shown
    assert f": lr [{scheduler.get_last_lr()[0]:g}, " in shown
    assert "object at" not in shown
    assert contents(optimizer, scheduler) == before


def test_showing_another_number_and_arrays() -> None:
    optimizer = build([jnp.asarray(0.25), jnp.full((1,), 0.5)])
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert repr(scheduler) == "ExponentialLR(gamma=0.5) at epoch 0: lr [0.25, 0.5]"
    decay = optim.lr_scheduler.StepLR(optimizer, 3, key="weight_decay")
    assert repr(decay) == "StepLR(step_size=3, gamma=0.1, key='weight_decay') at epoch 0: weight_decay [0, 0]"
    scheduler.get_last_lr()[0].delete()
    assert repr(scheduler) == "ExponentialLR(gamma=0.5) at epoch 0: lr [<ArrayImpl>, 0.5]"
    assert repr(optim.swa_utils.SWALR(build(), [0.1, 0.1, 0.1])) == (
        "SWALR(swa_lr=0.1, anneal_epochs=10, anneal_strategy='cos') at epoch 0: lr [0.1, 0.037, 0.001]"
    )


def test_showing_what_is_half_built_or_odd() -> None:
    for name in sorted(set(optim.lr_scheduler.__all__) - {"find_lr", "preview"}):
        cls = getattr(optim.lr_scheduler, name)
        assert repr(cls.__new__(cls)) == f"{name}()"

    class Odd(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, *args: Any, width: Any = 3, other: int = 4, **kwargs: Any):
            self.width, self._other, self._last_lr = width, other, None
            self.last_epoch = self.args = object()

        def _arguments_elsewhere(self) -> Any:
            raise RuntimeError("not yet")

    class Hidden:
        def __repr__(self) -> str:
            raise RuntimeError("not shown")

    assert repr(Odd(None)).startswith("Odd(width=3, other=4) at epoch <object obj")
    assert repr(Odd(None, width=Hidden())).startswith("Odd(width=<Hidden instance at 0x")
    assert repr(Warm(build(), 7)) == "Warm(warm_up=7) at epoch 0: lr [0.05, 0.0148, 0.0003]"
