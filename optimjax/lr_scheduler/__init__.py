"""Learning rate schedulers that write the groups of an optimizer, with PyTorch's names, signatures and values.

Values are computed on the host in double precision by PyTorch's own (mostly recursive) formulas, so they agree float
for float; a step of the optimizer afterwards compiles nothing. Any number of the groups can be scheduled, not only the
learning rate: ``key="weight_decay"``. For the same as pure functions see :mod:`optimjax.schedules`.

Differs from PyTorch 2.13 (and from 2.14 and 2.15, where these are the same; compared in November 2026):

1. ``load_state_dict`` undoes what building the scheduler did to the groups, so that a run resumes exactly whether the
   scheduler was built before or after the optimizer's state was loaded. A state dict that does not fit raises.
2. A group added to the optimizer later is scheduled, from the learning rate that it was added with: where PyTorch's
   formula is recursive, that is multiplied as the other rates are from then on.
3. ``SequentialLR`` and ``ChainedScheduler`` take ``ReduceLROnPlateau`` (``step(metric)``), and sequences and chains at
   any place. What PyTorch does not take begins at the base rate when its turn comes.
4. ``SequentialLR`` with a ``last_epoch`` continues there, as every other scheduler does. PyTorch's begins with the
   rates of epoch 0 (pytorch#162591, whose mend, pytorch#171515, is not in 2.15). Milestones must ascend. One of 0 gives
   the first scheduler no turn, as in PyTorch since pytorch#185872.
5. A step, or loading, that fails leaves schedulers and groups as they were.
6. ``ConstantLR(factor=0)``, and a ``OneCycleLR`` whose first phase is one step long (``pct_start * total_steps == 1``),
   work; PyTorch divides by zero. A period or a length that is zero or negative, where that has no meaning, raises at
   once.
"""

from optimjax.lr_scheduler.base import LRScheduler
from optimjax.lr_scheduler.composed import ChainedScheduler, SequentialLR
from optimjax.lr_scheduler.cosine import CosineAnnealingLR, CosineAnnealingWarmRestarts
from optimjax.lr_scheduler.cycles import CyclicLR, OneCycleLR
from optimjax.lr_scheduler.factors import (
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)
from optimjax.lr_scheduler.finder import find_lr
from optimjax.lr_scheduler.plateau import ReduceLROnPlateau
from optimjax.lr_scheduler.preview import preview

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
    "find_lr",
    "preview",
]

_LRScheduler = LRScheduler  # the name from before PyTorch 2.0, which schedulers of one's own still derive from
