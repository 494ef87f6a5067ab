"""The table of algorithms that the tests run through: one record each.

A test that needs to treat algorithms differently asks a field of the record, never the algorithm's name.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import optimjax as optim
from optimjax import functional as F

__all__ = ["CASES", "Bad", "Case"]


@dataclass(frozen=True)
class Bad:
    """Hyperparameters that PyTorch refuses, with its message."""

    options: Mapping[str, Any]
    message: str  # PyTorch's, to the letter
    added: str = ""  # what our message says after it


@dataclass(frozen=True)
class Case:
    """One algorithm.

    Attributes:
      optimizer: the class.
      factory: its functional face.
      torch: the name of the class in ``torch.optim``.
      base: options that every test uses; the parameters move visibly under them.
      full: further options, under which the algorithm keeps every array it can keep.
      grid: for each option of the flag combinations its values.
      refused: whether PyTorch refuses a combination of the grid.
      bad: options that raise ``ValueError``.
      other: for each hyperparameter a value other than in ``base``.
      needs: for a hyperparameter without an effect of its own, the options that it needs to have one.
      ignored: for each option that is accepted for PyTorch's sake a value other than its default; it changes nothing.
      state_at_construction: whether the state exists before the first gradient.
      temporary: the most temporary memory that a compiled update may take, as a share of the parameters.
    """

    optimizer: type[optim.Optimizer]
    factory: Callable[..., F.Algorithm]
    torch: str
    base: Mapping[str, Any]
    full: Mapping[str, Any]
    grid: Mapping[str, tuple[Any, ...]]
    bad: tuple[Bad, ...]
    other: Mapping[str, Any]
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignored: Mapping[str, Any] = field(default_factory=dict)
    refused: Callable[[Mapping[str, Any]], bool] = lambda options: False
    state_at_construction: bool = False
    temporary: float = 0.01

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The full product of the grid, less what PyTorch refuses."""
        for values in itertools.product(*self.grid.values()):
            options = dict(zip(self.grid, values, strict=True))
            if not self.refused(options):
                yield {**self.base, **options}

    def variants(self) -> list[dict[str, Any]]:
        """Few options for tests that need not see every combination: no slot more than needed, and all slots."""
        return [dict(self.base), {**self.base, **self.full}]

    def __str__(self) -> str:
        return self.optimizer.__name__


LEARNING_RATE = (
    Bad({"lr": -1}, "Invalid learning rate: -1"),
    Bad({"lr": -math.inf}, "Invalid learning rate: -inf"),
)
NOT_A_NUMBER = Bad({"lr": math.nan}, "Invalid learning rate: nan")  # torch.optim.SGD lets it pass
WEIGHT_DECAY = Bad({"weight_decay": -0.5}, "Invalid weight_decay value: -0.5")
EPSILON = Bad({"eps": -1e-8}, "Invalid epsilon value: -1e-08")
MOMENTUM = Bad({"momentum": -0.1}, "Invalid momentum value: -0.1")
BETAS = (
    Bad({"betas": (1.0, 0.999)}, "Invalid beta parameter at index 0: 1.0"),
    Bad({"betas": (-0.1, 0.999)}, "Invalid beta parameter at index 0: -0.1"),
    Bad({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
)

SGD = Case(
    optimizer=optim.SGD,
    factory=F.sgd,
    torch="SGD",
    base={"lr": 0.05},
    full={"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    grid={
        "momentum": (0, 0.9),
        "dampening": (0, 0.3),
        "weight_decay": (0, 0.1),
        "nesterov": (False, True),
        "maximize": (False, True),
    },
    refused=lambda options: options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0),
    bad=(
        *LEARNING_RATE,
        MOMENTUM,
        WEIGHT_DECAY,
        Bad(
            {"nesterov": True},
            "Nesterov momentum requires a momentum and zero dampening",
            ", got momentum=0, dampening=0",
        ),
        Bad(
            {"nesterov": True, "momentum": 0.9, "dampening": 0.3},
            "Nesterov momentum requires a momentum and zero dampening",
            ", got momentum=0.9, dampening=0.3",
        ),
    ),
    other={"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    needs={"dampening": {"momentum": 0.9}, "nesterov": {"momentum": 0.9}},
    ignored={"foreach": True, "differentiable": True, "fused": True},
)

ADAM = Case(
    optimizer=optim.Adam,
    factory=F.adam,
    torch="Adam",
    base={"lr": 0.05},
    full={"amsgrad": True, "weight_decay": 0.1},
    grid={
        "weight_decay": (0, 0.1),
        "amsgrad": (False, True),
        "maximize": (False, True),
        "decoupled_weight_decay": (False, True),
    },
    bad=(*LEARNING_RATE, NOT_A_NUMBER, *BETAS, EPSILON, WEIGHT_DECAY),
    other={
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-2,
        "weight_decay": 0.1,
        "amsgrad": True,
        "maximize": True,
        "decoupled_weight_decay": True,
    },
    needs={"decoupled_weight_decay": {"weight_decay": 0.1}, "amsgrad": {"betas": (0.9, 0.5)}},
    ignored={"foreach": True, "capturable": True, "differentiable": True, "fused": True},
)

ADAMW = Case(
    optimizer=optim.AdamW,
    factory=F.adamw,
    torch="AdamW",
    base={"lr": 0.05},
    full={"amsgrad": True},
    grid={"weight_decay": (0, 0.1), "amsgrad": (False, True), "maximize": (False, True)},
    bad=(*LEARNING_RATE, NOT_A_NUMBER, *BETAS, EPSILON, WEIGHT_DECAY),
    other={"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    needs={"amsgrad": {"betas": (0.9, 0.5)}},
    ignored=ADAM.ignored,
)

RMSPROP = Case(
    optimizer=optim.RMSprop,
    factory=F.rmsprop,
    torch="RMSprop",
    base={"lr": 0.05},
    full={"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    temporary=1.01,  # with momentum and decay, XLA stores the decayed gradient for the three arrays that it enters
    grid={
        "momentum": (0, 0.9),
        "centered": (False, True),
        "weight_decay": (0, 0.1),
        "maximize": (False, True),
    },
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        EPSILON,
        MOMENTUM,
        WEIGHT_DECAY,
        Bad({"alpha": -0.1}, "Invalid alpha value: -0.1"),
    ),
    other={
        "lr": 0.1,
        "alpha": 0.9,
        "eps": 1e-2,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "centered": True,
        "maximize": True,
    },
    ignored={"capturable": True, "foreach": True, "differentiable": True},
)

ADAGRAD = Case(
    optimizer=optim.Adagrad,
    factory=F.adagrad,
    torch="Adagrad",
    base={"lr": 0.05},
    full={"initial_accumulator_value": 0.1, "lr_decay": 0.1, "weight_decay": 0.1},
    grid={
        "lr_decay": (0, 0.1),
        "weight_decay": (0, 0.1),
        "initial_accumulator_value": (0, 0.1),
        "maximize": (False, True),
    },
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        EPSILON,
        WEIGHT_DECAY,
        Bad({"lr_decay": -0.1}, "Invalid lr_decay value: -0.1"),
        Bad({"initial_accumulator_value": -0.1}, "Invalid initial_accumulator_value value: -0.1"),
    ),
    other={
        "lr": 0.1,
        "lr_decay": 0.1,
        "weight_decay": 0.1,
        "initial_accumulator_value": 0.1,
        "eps": 1e-2,
        "maximize": True,
    },
    ignored={"foreach": True, "differentiable": True, "fused": True},
    state_at_construction=True,
)

CASES = (SGD, ADAM, ADAMW, RMSPROP, ADAGRAD)
