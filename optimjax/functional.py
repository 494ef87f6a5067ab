"""The functional core: one pure :class:`Algorithm` for each optimizer. Usually imported as ``F``."""

from optimjax.algorithms.adagrad import adagrad
from optimjax.algorithms.adam import adam
from optimjax.algorithms.adamw import adamw
from optimjax.algorithms.rmsprop import rmsprop
from optimjax.algorithms.sgd import sgd
from optimjax.lift import Algorithm, factory

__all__ = ["Algorithm", "adagrad", "adam", "adamw", "factory", "rmsprop", "sgd"]
