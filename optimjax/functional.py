"""The functional core: one pure :class:`Algorithm` for each optimizer. Usually imported as ``F``."""

from optimjax._core.algorithm import Algorithm, factory
from optimjax._core.averaging import Averaging, ema, swa
from optimjax._core.partition import partition
from optimjax.algorithms.adadelta import adadelta
from optimjax.algorithms.adafactor import adafactor
from optimjax.algorithms.adagrad import adagrad
from optimjax.algorithms.adam import adam
from optimjax.algorithms.adamax import adamax
from optimjax.algorithms.adamw import adamw
from optimjax.algorithms.asgd import asgd
from optimjax.algorithms.lbfgs import lbfgs
from optimjax.algorithms.muon import muon
from optimjax.algorithms.nadam import nadam
from optimjax.algorithms.radam import radam
from optimjax.algorithms.rmsprop import rmsprop
from optimjax.algorithms.rprop import rprop
from optimjax.algorithms.sgd import sgd
from optimjax.algorithms.sparse_adam import sparse_adam

__all__ = [
    "Algorithm",
    "Averaging",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "ema",
    "factory",
    "lbfgs",
    "muon",
    "nadam",
    "partition",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sparse_adam",
    "swa",
]
