"""Neighbours, a module each, which imports its neighbour only when it is used."""

from optimjax.interop import optax, torch

__all__ = ["optax", "torch"]
