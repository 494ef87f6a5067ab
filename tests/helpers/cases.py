"""The table of algorithms that the tests run through: one record each.

A test that needs to treat algorithms differently asks a field of the record, never the algorithm's name.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import stand_ins

import optimjax as optim
from optimjax import functional as F

__all__ = ["CASES", "EVERY", "Bad", "Case", "Descent"]


@dataclass(frozen=True)
class Bad:
    """Hyperparameters that PyTorch refuses, with its message."""

    options: Mapping[str, Any]
    message: str  # PyTorch's, to the letter
    added: str = ""  # what our message says after it
    since: tuple[int, int] = (2, 13)  # the version of PyTorch that refuses them first


@dataclass(frozen=True)
class Descent:
    """How an algorithm is run to an optimum.

    Attributes:
      first, last: learning rate of the first and of the last step; it decays exponentially in between.
      steps: how many.
      options: the other options.
    """

    first: float = 0.05
    last: float = 1e-6
    steps: int = 50_000
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One algorithm.

    Attributes:
      optimizer: the class.
      factory: its functional face.
      torch: the name of the class in ``torch.optim``, or the one that it would have there.
      base: options that every test uses; the parameters move visibly under them.
      full: further options, under which the algorithm keeps every array it can keep.
      grid: for each option of the flag combinations its values.
      refused: whether PyTorch refuses a combination of the grid.
      bad: options that raise ``ValueError``.
      other: for each hyperparameter a value other than in ``base``.
      needs: for a hyperparameter without an effect of its own, the options that it needs to have one.
      ignored: for each option that is accepted for PyTorch's sake a value other than its default; it changes nothing.
      state_at_construction: whether the state exists before the first gradient.
      kept: how many arrays of the parameter's size are kept under the base options, and under the full ones.
      temporary: the most temporary memory that a compiled update may take which updates parameters in place, too, as a
        share of the parameters.
      steps: updates after which all of the arithmetic has been at work.
      scalar_slots: state that is one number for a parameter: float64 if the parameter is, else float32.
      reduced_slots: state of a shape of its own, which parameters with fewer axes, or with more, do not have.
      by_rounding: hyperparameters that change the order of the arithmetic, and so the results by rounding alone.
      seen_in: for a hyperparameter that changes no parameter, the slot that it changes.
      towards: for a hyperparameter that cannot be scaled towards 0, such as a factor above 1, what it can be scaled
        towards.
      rate_message: how PyTorch refuses a learning rate.
      complex_message: how PyTorch refuses complex parameters, if it does; it may begin with what it has to say of them.
      sparse: whether gradients are sparse. The classes are then stand-ins that take dense ones, too.
      updates_empty: whether PyTorch updates empty arrays; we always do.
      matrices: whether all parameters must have two axes.
      beyond: options that PyTorch lacks.
      difference: half that of two learning rates, for a derivative; where state is float32, it must be larger.
      descent: the way to an optimum.
      takes_loss: whether it takes a loss function in place of gradients.
      stand_in: for an algorithm that PyTorch lacks: given PyTorch, the class that it is compared with.
    """

    optimizer: type[optim.Optimizer]
    factory: Callable[..., F.Algorithm]
    torch: str
    base: Mapping[str, Any]
    full: Mapping[str, Any]
    grid: Mapping[str, tuple[Any, ...]]
    bad: tuple[Bad, ...]
    other: Mapping[str, Any]
    kept: tuple[int, int] = (0, 0)
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignored: Mapping[str, Any] = field(default_factory=dict)
    refused: Callable[[Mapping[str, Any]], bool] = lambda options: False
    state_at_construction: bool = False
    temporary: float = 0.01
    steps: int = 3
    scalar_slots: tuple[str, ...] = ()
    reduced_slots: tuple[str, ...] = ()
    by_rounding: tuple[str, ...] = ()
    seen_in: Mapping[str, str] = field(default_factory=dict)
    towards: Mapping[str, float] = field(default_factory=dict)
    rate_message: str = "Invalid learning rate: {}"
    complex_message: str | None = None
    sparse: bool = False
    updates_empty: bool = True
    matrices: bool = False
    beyond: tuple[str, ...] = ()
    difference: float = 1e-6
    descent: Descent = field(default_factory=Descent)
    takes_loss: bool = False
    stand_in: Callable[[Any], Any] | None = None

    def reference(self, torch: Any) -> Any:
        """PyTorch's class."""
        return getattr(torch.optim, self.torch) if self.stand_in is None else self.stand_in(torch)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The full product of the grid, less what PyTorch refuses."""
        for values in itertools.product(*self.grid.values()):
            options = dict(zip(self.grid, values, strict=True))
            if not self.refused(options):
                yield {**self.base, **options}

    def variants(self) -> list[dict[str, Any]]:
        """Few options for tests that need not see every combination: no slot more than needed, and all slots."""
        return [dict(self.base), {**self.base, **self.full}]

    def torch_gradient(self, torch: Any, grad: Any) -> Any:
        """A PyTorch tensor as PyTorch's optimizer takes it for a gradient."""
        return stand_ins.torch_naming_all(torch, grad) if self.sparse else grad

    def scaled(self, name: str, value: Any, factor: Any) -> Any:
        """Another legal value of a hyperparameter; the factor is in (0, 1]."""
        end = self.towards.get(name, 0)
        return jax.tree.map(lambda v: end + (v - end) * factor, value)

    def ours(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, and those that PyTorch lacks as every test uses them."""
        return {name: self.base[name] for name in self.beyond if name in self.base} | dict(options)

    def theirs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that PyTorch has."""
        return {name: value for name, value in options.items() if name not in self.beyond}

    @property
    def numeric(self) -> list[str]:
        """The options whose values are not compiled in."""
        return [name for name in self.other if name in self.optimizer.definition.hyperparameters.numeric]

    @property
    def structural(self) -> list[str]:
        """The options whose values are."""
        return [name for name in self.other if name not in self.numeric]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape like this one of parameters that the algorithm takes."""
        return (*shape[:1], math.prod(shape[1:])) if shape and self.matrices else (1, 1) if self.matrices else shape

    def fit(self, tree: Any) -> Any:
        """The tree with its arrays in such shapes."""
        return jax.tree.map(lambda x: x.reshape(self.shape(x.shape)), tree)

    def shapes(self, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> list[tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes like these of parameters that PyTorch takes."""
        return [
            (
                self.shape(shape if self.updates_empty else tuple(max(size, 1) for size in shape)),
                dtype if self.complex_message is None else np.zeros((), dtype).real.dtype,
            )
            for shape, dtype in shapes
        ]

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
    kept=(0, 1),
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
    descent=Descent(1e-3, 1e-3, options={"momentum": 0.9}),
)

ADAM = Case(
    optimizer=optim.Adam,
    factory=F.adam,
    torch="Adam",
    base={"lr": 0.05},
    full={"amsgrad": True, "weight_decay": 0.1},
    kept=(2, 3),
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
    kept=(2, 3),
    grid={"weight_decay": (0, 0.1), "amsgrad": (False, True), "maximize": (False, True)},
    bad=(*LEARNING_RATE, NOT_A_NUMBER, *BETAS, EPSILON, WEIGHT_DECAY),
    other={"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    needs={"amsgrad": {"betas": (0.9, 0.5)}},
    ignored=ADAM.ignored,
    descent=Descent(options={"weight_decay": 0}),
)

RMSPROP = Case(
    optimizer=optim.RMSprop,
    factory=F.rmsprop,
    torch="RMSprop",
    base={"lr": 0.05},
    full={"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    kept=(1, 3),
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
    kept=(1, 1),
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
    descent=Descent(1.0, 1.0),
)

ADAMAX = Case(
    optimizer=optim.Adamax,
    factory=F.adamax,
    torch="Adamax",
    base={"lr": 0.05},
    full={"weight_decay": 0.1},
    kept=(2, 2),
    grid={"weight_decay": (0, 0.1), "maximize": (False, True)},
    bad=(*LEARNING_RATE, NOT_A_NUMBER, EPSILON, *BETAS, WEIGHT_DECAY),
    other={"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1, "maximize": True},
    ignored={"foreach": True, "capturable": True, "differentiable": True},
)

NADAM = Case(
    optimizer=optim.NAdam,
    factory=F.nadam,
    torch="NAdam",
    base={"lr": 0.05},
    full={"weight_decay": 0.1, "momentum_decay": 0.5},
    kept=(2, 2),
    grid={
        "weight_decay": (0, 0.1),
        "momentum_decay": (0, 4e-3, 0.5),
        "maximize": (False, True),
        "decoupled_weight_decay": (False, True),
    },
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        EPSILON,
        *BETAS,
        WEIGHT_DECAY,
        Bad({"momentum_decay": -0.1}, "Invalid momentum_decay value: -0.1"),
    ),
    other={
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-2,
        "weight_decay": 0.1,
        "momentum_decay": 1.0,
        "maximize": True,
        "decoupled_weight_decay": True,
    },
    needs={"decoupled_weight_decay": {"weight_decay": 0.1}},
    ignored={"foreach": True, "capturable": True, "differentiable": True},
    scalar_slots=("mu_product",),
)

RADAM = Case(
    optimizer=optim.RAdam,
    factory=F.radam,
    torch="RAdam",
    base={"lr": 0.05},
    full={"weight_decay": 0.1},
    kept=(2, 2),
    grid={
        "weight_decay": (0, 0.1),
        "betas": ((0.9, 0.999), (0.8, 0.8), (0.9, 0.6)),  # rectified after 5 steps, after 6, never
        "maximize": (False, True),
        "decoupled_weight_decay": (False, True),
    },
    bad=(*LEARNING_RATE, NOT_A_NUMBER, EPSILON, *BETAS, WEIGHT_DECAY),
    other={
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-2,
        "weight_decay": 0.1,
        "maximize": True,
        "decoupled_weight_decay": True,
    },
    needs={"decoupled_weight_decay": {"weight_decay": 0.1}},
    ignored={"foreach": True, "capturable": True, "differentiable": True},
    steps=8,
    descent=Descent(3e-3, 1e-6),
)

ADADELTA = Case(
    optimizer=optim.Adadelta,
    factory=F.adadelta,
    torch="Adadelta",
    base={"lr": 1.0},
    full={"weight_decay": 0.1},
    temporary=1.01,  # with decay, parameter and slot each need what the other was: one is copied
    kept=(2, 2),
    grid={"weight_decay": (0, 0.1), "rho": (0.9, 1), "maximize": (False, True)},
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        Bad({"rho": -0.1}, "Invalid rho value: -0.1"),
        Bad({"rho": 1.1}, "Invalid rho value: 1.1"),
        EPSILON,
        WEIGHT_DECAY,
    ),
    other={"lr": 0.1, "rho": 0.5, "eps": 1e-2, "weight_decay": 0.1, "maximize": True},
    ignored={"foreach": True, "capturable": True, "differentiable": True},
    descent=Descent(10.0, 1e-3),
)

RPROP = Case(
    optimizer=optim.Rprop,
    factory=F.rprop,
    torch="Rprop",
    base={"lr": 0.05},
    full={"etas": (0.3, 1.5), "step_sizes": (0.01, 0.2)},
    kept=(2, 2),
    grid={
        "etas": ((0.5, 1.2), (0.3, 1.5)),
        "step_sizes": ((1e-6, 50), (0.01, 0.2)),
        "maximize": (False, True),
    },
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        Bad({"etas": (0.0, 1.2)}, "Invalid eta values: 0.0, 1.2"),
        Bad({"etas": (1.0, 1.2)}, "Invalid eta values: 1.0, 1.2"),
        Bad({"etas": (0.5, 1.0)}, "Invalid eta values: 0.5, 1.0"),
        Bad({"etas": (0.5, math.nan)}, "Invalid eta values: 0.5, nan"),
    ),
    other={"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.08, 0.1), "maximize": True},
    towards={"etas": 1},
    ignored={"capturable": True, "foreach": True, "differentiable": True},
    descent=Descent(0.01, 0.01, options={"step_sizes": (1e-12, 1)}),
)

ASGD = Case(
    optimizer=optim.ASGD,
    factory=F.asgd,
    torch="ASGD",
    base={"lr": 0.05, "t0": 0.0},
    full={"lambd": 0.1, "alpha": 1.0, "weight_decay": 0.1},
    kept=(1, 1),
    grid={
        "lambd": (1e-4, 0.1),
        "alpha": (0.75, 1.0),
        "t0": (1e6, 20.5),
        "weight_decay": (0, 0.1),
        "maximize": (False, True),
    },
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        WEIGHT_DECAY,
        Bad({"lambd": -0.1}, "Invalid lambd value: -0.1", since=(2, 15)),
        Bad({"alpha": -0.1}, "Invalid alpha value: -0.1", since=(2, 15)),
    ),
    other={"lr": 0.1, "lambd": 0.5, "alpha": 2.0, "t0": 1.0, "weight_decay": 0.1, "maximize": True},
    needs={"alpha": {"lambd": 2.0}},
    ignored={"foreach": True, "differentiable": True, "capturable": True},
    scalar_slots=("eta", "mu"),
    seen_in={"t0": "ax"},
    difference=1e-4,
    descent=Descent(1e-3, 1e-3, options={"lambd": 0}),
)

ADAFACTOR = Case(
    optimizer=optim.Adafactor,
    factory=F.adafactor,
    torch="Adafactor",
    base={"lr": 0.3},  # the largest relative step up to the eleventh, 1 / sqrt(step) from then on
    full={"eps": (0.01, 0.5), "weight_decay": 0.1},
    grid={
        "beta2_decay": (-0.8, 0),
        "eps": ((None, 1e-3), (0.5, 1.5)),
        "d": (1.0, 1.5),
        "weight_decay": (0, 0.1),
        "maximize": (False, True),
    },
    bad=(
        Bad({"lr": -1}, "Learning rate should be >= 0 but is: -1"),
        Bad({"lr": math.nan}, "Learning rate should be >= 0 but is: nan"),
        Bad({"beta2_decay": 0.8}, "beta2_decay should be <= 0 but is: 0.8"),
        Bad({"eps": (-0.1, 1e-3)}, "epsilon1 should be >= 0 but is: -0.1"),
        Bad({"eps": (None, -0.1)}, "epsilon2 should be >= 0 but is: -0.1"),
        Bad({"d": 0.9}, "Clipping threshold d should be >= 1 but is: 0.9"),
        Bad({"weight_decay": -0.5}, "weight_decay should be >= 0 but is: -0.5"),
    ),
    other={
        "lr": 0.1,
        "beta2_decay": -0.2,
        "eps": (0.5, 2.0),
        "d": 2.0,
        "weight_decay": 0.1,
        "maximize": True,
    },
    towards={"d": 1},
    ignored={"foreach": True},
    reduced_slots=("row_var", "col_var", "variance"),
    steps=4,
    temporary=1.01,  # the update, which is stored for its root mean square
    rate_message="Learning rate should be >= 0 but is: {}",
    complex_message="Adafactor does not support complex parameters",
    updates_empty=False,
)

SPARSE_ADAM = Case(
    optimizer=stand_ins.SparseAdam,
    factory=stand_ins.sparse_adam,
    torch="SparseAdam",
    base={"lr": 0.05},
    full={},
    kept=(2, 2),
    grid={"betas": ((0.9, 0.999), (0.5, 0.9)), "eps": (1e-8, 1e-2), "maximize": (False, True)},
    bad=(
        *LEARNING_RATE,
        NOT_A_NUMBER,
        Bad({"lr": 0}, "Invalid learning rate: 0"),
        Bad({"lr": 0.0}, "Invalid learning rate: 0.0"),
        EPSILON,
        Bad({"eps": 0}, "Invalid epsilon value: 0"),
        *BETAS,
    ),
    other={"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "maximize": True},
    complex_message="SparseAdam does not support complex parameters",
    sparse=True,
    temporary=math.inf,  # grows with the entries that are named, which here are all; see test_sparse_programs.py
)

MUON = Case(
    optimizer=optim.Muon,
    factory=F.muon,
    torch="Muon",
    base={"lr": 0.05, "ns_dtype": None},
    full={"adjust_lr_fn": "match_rms_adamw", "nesterov": False},
    kept=(1, 1),
    grid={
        "weight_decay": (0, 0.1),
        "momentum": (0, 0.95),
        "nesterov": (False, True),
        "adjust_lr_fn": (None, "original", "match_rms_adamw"),
    },
    bad=(
        Bad({"lr": -1}, "Learning rate should be >= 0 but is: -1"),
        Bad({"lr": math.nan}, "Learning rate should be >= 0 but is: nan"),
        Bad({"momentum": -0.1}, "momentum should be >= 0 but is: -0.1"),
        Bad({"weight_decay": -0.5}, "weight decay should be >= 0 but is: -0.5"),
        Bad({"adjust_lr_fn": "rms"}, "Adjust learning rate function rms is not supported"),
    ),
    other={
        "lr": 0.1,
        "weight_decay": 0.5,
        "momentum": 0.5,
        "nesterov": False,
        "ns_coefficients": (3.0, -3.2, 1.2),
        "eps": 10.0,
        "ns_steps": 3,
        "adjust_lr_fn": "match_rms_adamw",
        "ns_dtype": "bfloat16",
        "matrix_axes": ((1,), (0,)),
        "blocks": 3,
        "gram": True,
    },
    needs={
        "momentum": {"eps": 10.0},  # of a longer column the length has no effect
        "nesterov": {"eps": 10.0},
    },
    temporary=math.inf,  # the products; see test_muon.py
    rate_message="Learning rate should be >= 0 but is: {}",
    complex_message="Muon does not support complex parameters",
    matrices=True,
    beyond=("ns_dtype", "matrix_axes", "blocks", "gram"),
    by_rounding=("gram",),
    descent=Descent(0.05, 1e-7, options={"weight_decay": 0}),
)

LBFGS = Case(
    optimizer=optim.LBFGS,
    factory=F.lbfgs,
    torch="LBFGS",
    base={"line_search_fn": "strong_wolfe"},
    full={},
    grid={},
    bad=(*LEARNING_RATE, NOT_A_NUMBER),
    other={
        "lr": 0.1,
        "max_iter": 3,
        "max_eval": 4,
        "tolerance_grad": 1.0,
        "tolerance_change": 1.0,
        "history_size": 1,
        "line_search_fn": None,
    },
    descent=Descent(1.0, 1.0, steps=20, options={"line_search_fn": "strong_wolfe", "tolerance_change": 0}),
    takes_loss=True,
)

CASES = (SGD, ADAM, ADAMW, RMSPROP, ADAGRAD, ADAMAX, NADAM, RADAM, ADADELTA, RPROP, ASGD, ADAFACTOR, SPARSE_ADAM, MUON)
EVERY = (*CASES, LBFGS)  # LBFGS takes no gradients but a loss function: see the files test_lbfgs*.py
