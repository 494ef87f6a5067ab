"""``torch.optim`` for JAX: the optimizers, groups and state dicts of PyTorch over pure, compiled updates."""

from optimjax import functional, lr_scheduler, optimizer
from optimjax.algorithms.adagrad import Adagrad
from optimjax.algorithms.adam import Adam
from optimjax.algorithms.adamw import AdamW
from optimjax.algorithms.rmsprop import RMSprop
from optimjax.algorithms.sgd import SGD
from optimjax.clip import clip_grad_norm, clip_grad_norm_, clip_grad_value, clip_grad_value_
from optimjax.optimizer import Optimizer
from optimjax.parameter import Parameter
from optimjax.source import named_parameters, parameters

__version__ = "0.1.0.dev0"

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Optimizer",
    "Parameter",
    "RMSprop",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value",
    "clip_grad_value_",
    "functional",
    "lr_scheduler",
    "named_parameters",
    "optimizer",
    "parameters",
]
