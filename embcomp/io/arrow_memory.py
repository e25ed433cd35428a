"""Arrow's allocator, where a process may not have any amount of memory."""

from __future__ import annotations

import os
import resource

_LIMITS = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
_POOL = "ARROW_DEFAULT_MEMORY_POOL"


def spare_arrow_memory() -> None:
    """Make Arrow take memory as it needs it, where `ulimit -d` or `-v` bounds what this process may ask for.

    Its own allocator reserves 1 GiB in its first allocation, which counts in full, used or not. Arrow looks at
    the environment once, so this comes before it; who has chosen an allocator keeps it.
    """
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in _LIMITS):
        os.environ.setdefault(_POOL, "system")
