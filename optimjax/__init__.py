"""``torch.optim`` for JAX: the optimizers, groups and state dicts of PyTorch over pure, compiled updates."""

from optimjax import functional, lr_scheduler, optimizer
from optimjax.algorithms.adam import Adam
from optimjax.algorithms.adamw import AdamW
from optimjax.algorithms.rmsprop import RMSprop
from optimjax.algorithms.sgd import SGD
from optimjax.optimizer import Optimizer
from optimjax.parameter import Parameter, named_parameters, parameters

__version__ = "0.1.0.dev0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Optimizer",
    "Parameter",
    "RMSprop",
    "functional",
    "lr_scheduler",
    "named_parameters",
    "optimizer",
    "parameters",
]
