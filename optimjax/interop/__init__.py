"""Neighbours, a module each, which imports its neighbour only when it is used."""

from optimjax.interop import optax

__all__ = ["optax"]
