"""The oldest versions of other packages that can work, and the error for what is older."""

import functools
import re
import sys

__all__ = ["OLDEST", "check_version"]

# As in pyproject.toml, which is not there once the package is installed.
OLDEST = {"jax": "0.8.1", "flax": "0.12.1"}


@functools.cache  # of what has returned: what raises does so again
def check_version(package: str) -> None:
    """Raise where a package that has been imported is too old.

    An installer sees to that; a package that was installed by hand, or found first on the path, gets by it.

    Raises:
      ImportError: it is too old; the message says which version is needed.
    """
    found = sys.modules[package].__version__
    if _numbers(found) < _numbers(OLDEST[package]):
        raise ImportError(
            f"optimjax needs {package} {OLDEST[package]} or newer, and this is {package} {found}: "
            f"pip install --upgrade {package}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
