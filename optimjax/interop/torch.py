"""Checkpoints of PyTorch, both ways: the weights of models, and the state of optimizers.

See the page on PyTorch's checkpoints. PyTorch itself is needed only where tensors are asked for.
"""

from optimjax.interop._torch_file import load, save
from optimjax.interop._torch_flax import flax_layout
from optimjax.interop._torch_layout import Layout
from optimjax.interop._torch_state import from_torch, to_torch
from optimjax.interop._torch_weights import groups, load_weights, weights

__all__ = ["Layout", "flax_layout", "from_torch", "groups", "load", "load_weights", "save", "to_torch", "weights"]
