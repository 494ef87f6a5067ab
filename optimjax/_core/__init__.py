"""Pure arithmetic and plain data: the contract of an algorithm, and everything that needs no mutable parameter."""
