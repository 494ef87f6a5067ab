"""``torch.optim`` for JAX: the optimizers, groups and state dicts of PyTorch over pure, compiled updates."""

from optimjax import functional, lr_scheduler, optimizer, plot, schedules, swa_utils
from optimjax.algorithms.adadelta import Adadelta
from optimjax.algorithms.adafactor import Adafactor
from optimjax.algorithms.adagrad import Adagrad
from optimjax.algorithms.adam import Adam
from optimjax.algorithms.adamax import Adamax
from optimjax.algorithms.adamw import AdamW
from optimjax.algorithms.asgd import ASGD
from optimjax.algorithms.lbfgs import LBFGS
from optimjax.algorithms.muon import Muon
from optimjax.algorithms.nadam import NAdam
from optimjax.algorithms.radam import RAdam
from optimjax.algorithms.rmsprop import RMSprop
from optimjax.algorithms.rprop import Rprop
from optimjax.algorithms.sgd import SGD
from optimjax.algorithms.sparse_adam import SparseAdam
from optimjax.clip import clip_grad_norm, clip_grad_norm_, clip_grad_value, clip_grad_value_
from optimjax.files import load, save
from optimjax.grouping import group_parameters
from optimjax.optimizer import Optimizer
from optimjax.parameter import Parameter
from optimjax.source import named_parameters, parameters

__version__ = "0.1.0.dev0"

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
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
    "group_parameters",
    "load",
    "lr_scheduler",
    "named_parameters",
    "optimizer",
    "parameters",
    "plot",
    "save",
    "schedules",
    "swa_utils",
]
