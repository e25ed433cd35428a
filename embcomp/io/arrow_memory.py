"""Arrow's allocator, where a process may not have any amount of memory."""

from __future__ import annotations

import resource

_LIMITS = (resource.RLIMIT_DATA, resource.RLIMIT_AS)


def spare_arrow_memory() -> None:
    """Make Arrow take memory as it needs it, where `ulimit -d` or `-v` bounds what this process may ask for.

    Its own allocator reserves 1 GiB in its first allocation, which counts in full, used or not.
    """
    if all(resource.getrlimit(limit)[0] == resource.RLIM_INFINITY for limit in _LIMITS):
        return
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
