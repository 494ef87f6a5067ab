"""Neighbours, a module each, which imports its neighbour only when it is used."""
