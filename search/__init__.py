"""Methods and widths for each table within a byte budget: spaces, samplers, trials, results.

Names are imported on first use, as `embcomp`'s own are: reading a search's YAML should not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embcomp.search.api import Prepared, prepare_search, search
    from embcomp.search.config.search_config import SearchConfig, load_search, parse_search
    from embcomp.search.evaluators.base import Evaluator
    from embcomp.search.reporting.results import SearchResult
    from embcomp.search.samplers.base import Source

__all__ = [
    "Evaluator",
    "Prepared",
    "SearchConfig",
    "SearchResult",
    "Source",
    "load_search",
    "parse_search",
    "prepare_search",
    "search",
]

_HOMES = {
    "Evaluator": "evaluators",
    "Prepared": "api",
    "SearchConfig": "config",
    "SearchResult": "results",
    "Source": "sources",
    "load_search": "config",
    "parse_search": "config",
    "prepare_search": "api",
    "search": "api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'embcomp.search' has no attribute {name!r}; it has {__all__}")
    value = vars(import_module(f"embcomp.search.{_HOMES[name]}"))[name]
    globals()[name] = value
    return value
