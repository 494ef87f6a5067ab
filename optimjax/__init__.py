"""``torch.optim`` for JAX: the optimizers, groups and state dicts of PyTorch over pure, compiled updates."""

from optimjax import functional, lr_scheduler, optimizer, schedules, swa_utils
from optimjax.algorithms.adadelta import Adadelta
from optimjax.algorithms.adafactor import Adafactor
from optimjax.algorithms.adagrad import Adagrad
from optimjax.algorithms.adam import Adam
from optimjax.algorithms.adamax import Adamax
from optimjax.algorithms.adamw import AdamW
from optimjax.algorithms.asgd import ASGD
from optimjax.algorithms.nadam import NAdam
from optimjax.algorithms.radam import RAdam
from optimjax.algorithms.rmsprop import RMSprop
from optimjax.algorithms.rprop import Rprop
from optimjax.algorithms.sgd import SGD
from optimjax.algorithms.sparse_adam import SparseAdam
from optimjax.clip import clip_grad_norm, clip_grad_norm_, clip_grad_value, clip_grad_value_
from optimjax.optimizer import Optimizer
from optimjax.parameter import Parameter
from optimjax.source import named_parameters, parameters

__version__ = "0.1.0.dev0"

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "Optimizer",
    "Parameter",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value",
    "clip_grad_value_",
    "functional",
    "lr_scheduler",
    "named_parameters",
    "optimizer",
    "parameters",
    "schedules",
    "swa_utils",
]
