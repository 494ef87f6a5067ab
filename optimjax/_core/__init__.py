"""Pure arithmetic and plain data: the contract of an algorithm, and everything that needs no mutable parameter."""

import jax  # noqa: F401  # so that its version can be looked at before anything asks for what it may not have

from optimjax._core.versions import check_version

check_version("jax")
