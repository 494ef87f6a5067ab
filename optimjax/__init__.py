"""``torch.optim`` for JAX: the optimizers, groups and state dicts of PyTorch over pure, compiled updates."""

from typing import TYPE_CHECKING

from optimjax import functional, interop, lr_scheduler, optimizer, plot, schedules, swa_utils
from optimjax._facade.clip import clip_grad_norm, clip_grad_norm_, clip_grad_value, clip_grad_value_
from optimjax._facade.files import load, save
from optimjax._params.grouping import group_parameters
from optimjax._params.muon_groups import muon_groups
from optimjax._params.parameter import Parameter
from optimjax._params.source import named_parameters, parameters
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
from optimjax.interop.optax import FromOptax
from optimjax.optimizer import Optimizer
from optimjax.sweeps import sweep

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
    "FromOptax",
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
    "interop",
    "load",
    "lr_scheduler",
    "muon_groups",
    "named_parameters",
    "optimizer",
    "parameters",
    "plot",
    "save",
    "schedules",
    "swa_utils",
    "sweep",
]


def __dir__() -> list[str]:
    """Public names, for tab completion: the modules that they come from are in the namespace as well."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if not TYPE_CHECKING:  # for a type checker, a module with this function has every attribute

    def __getattr__(name: str) -> None:
        """Say where a name is to be found that is written otherwise, or is in one of the modules."""
        message = f"module {__name__!r} has no attribute {name!r}"
        if name.startswith("_"):  # tools ask for many of these
            raise AttributeError(message)
        places = {
            "optim": __all__,
            "the pure function optim.functional": functional.__all__,
            "optim.interop.optax": interop.optax.__all__,
            "optim.lr_scheduler": lr_scheduler.__all__,
            "optim.schedules": schedules.__all__,
            "optim.swa_utils": swa_utils.__all__,
        }
        found = [
            f"{place}.{public}"
            for place, names in places.items()
            for public in names
            if public.replace("_", "").lower() == name.replace("_", "").lower()
        ]
        raise AttributeError(f"{message}: you may mean {', or '.join(found)}" if found else message)
