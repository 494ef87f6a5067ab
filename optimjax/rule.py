"""What one needs to write an algorithm: the contract, the kinds of hyperparameters and of slots, shared arithmetic.

See the page "Adding an algorithm". Together with :class:`optimjax.Optimizer` nothing else is needed, outside of the
package as inside.
"""

from optimjax._core.algorithm import factory
from optimjax._core.contract import Fixed, Flags, Hyper, Moment, Rule, Slot, Square, Weights
from optimjax._core.guard import Options
from optimjax._core.hyperparameters import (
    Beta,
    Betas,
    BetasAlike,
    Capturable,
    Decay,
    Differentiable,
    Epsilon,
    Flag,
    Foreach,
    Fused,
    Ignored,
    Kind,
    LearningRate,
    NonNegative,
    Number,
    Numeric,
    Pair,
    Share,
    Skippable,
    Structural,
    Switch,
    one_of,
)
from optimjax._core.numerics import (
    at_least_float32,
    bias_correction,
    coupled_decay,
    decay,
    maximum,
    sqrt,
    where,
)

__all__ = [
    "Beta",
    "Betas",
    "BetasAlike",
    "Capturable",
    "Decay",
    "Differentiable",
    "Epsilon",
    "Fixed",
    "Flag",
    "Flags",
    "Foreach",
    "Fused",
    "Hyper",
    "Ignored",
    "Kind",
    "LearningRate",
    "Moment",
    "NonNegative",
    "Number",
    "Numeric",
    "Options",
    "Pair",
    "Rule",
    "Share",
    "Skippable",
    "Slot",
    "Square",
    "Structural",
    "Switch",
    "Weights",
    "at_least_float32",
    "bias_correction",
    "coupled_decay",
    "decay",
    "factory",
    "maximum",
    "one_of",
    "sqrt",
    "where",
]
