"""How many processor cores there are to use."""

import os

__all__ = ["usable_cores"]


def usable_cores() -> int:
    """Those of this process, which a container or ``taskset`` may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
