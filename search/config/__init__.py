"""The YAML of a search.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.search.config.search_config import (
        COSTS as COSTS,
        OBJECTIVES as OBJECTIVES,
        ONE_OBJECTIVE as ONE_OBJECTIVE,
        QUALITIES as QUALITIES,
        SearchConfig as SearchConfig,
        is_search as is_search,
        load_search as load_search,
        parse_search as parse_search,
    )

_HOMES = dict.fromkeys(
    (
        "COSTS",
        "OBJECTIVES",
        "ONE_OBJECTIVE",
        "QUALITIES",
        "SearchConfig",
        "is_search",
        "load_search",
        "parse_search",
    ),
    "embcomp.search.config.search_config",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
