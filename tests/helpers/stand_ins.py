"""Stand-ins for algorithms that take sparse gradients: the tests of the common table hand them dense ones.

A dense gradient becomes a sparse one that names every entry.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

import optimjax as optim

__all__ = ["SparseAdam", "naming_all", "sparse_adam", "torch_naming_all"]


def naming_all(grads: Any) -> Any:
    """The gradients, each with its rows as entries, a scalar as the only one; what is not dense stays as it is."""

    def one(grad: Any) -> Any:
        if isinstance(grad, BCOO) or not hasattr(grad, "ndim"):
            return grad
        entries = jnp.asarray(grad) if grad.ndim else jnp.asarray(grad)[None]
        indices = jnp.arange(len(grad))[:, None] if grad.ndim else jnp.zeros((1, 0), int)
        return BCOO((entries, indices), shape=grad.shape)

    return jax.tree.map(one, grads, is_leaf=lambda x: isinstance(x, BCOO))


def torch_naming_all(torch: Any, grad: Any) -> Any:
    """The same for a PyTorch tensor."""
    if grad.is_sparse:
        return grad
    entries = grad if grad.ndim else grad[None]
    indices = torch.arange(len(grad))[None] if grad.ndim else torch.zeros((0, 1), dtype=int)
    return torch.sparse_coo_tensor(indices, entries, grad.shape, check_invariants=True)


class SparseAdam(optim.SparseAdam):
    """The class, and by its factory below the function, that take dense gradients, too."""

    def step(self, grads: Any = None, *args: Any) -> Any:
        if grads is not None and not callable(grads):
            return super().step(naming_all(grads), *args)
        boxes = self._parameters()
        held = [box.grad for box in boxes]
        try:
            if grads is not None:
                self.zero_grad()
            loss = None if grads is None else self.backward(grads, *args)
            for box in boxes:
                box.grad = naming_all(box.grad)
            super().step()
        finally:
            for box, grad in zip(boxes, held, strict=True):
                box.grad = grad
        return loss

    @classmethod
    def _algorithm(cls, values: Any) -> Any:
        return ByDense(cls.definition, values)


class ByDense(optim.functional.Algorithm):
    def update(self, params: Any, grads: Any, state: Any, **overrides: Any) -> Any:
        return super().update(params, naming_all(grads), state, **overrides)


sparse_adam = optim.functional.factory(SparseAdam)
