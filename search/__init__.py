"""Methods and widths for each table within a byte budget: spaces, samplers, trials, results.

Names are imported on first use, as `embcomp`'s own are: reading a search's YAML should not wait for
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.search.api import (
        Prepared as Prepared,
        prepare_search as prepare_search,
        search as search,
    )
    from embcomp.search.config.search_config import (
        SearchConfig as SearchConfig,
        load_search as load_search,
        parse_search as parse_search,
    )
    from embcomp.search.evaluators.base import Evaluator as Evaluator
    from embcomp.search.reporting.results import SearchResult as SearchResult
    from embcomp.search.samplers.base import CandidateSampler as CandidateSampler

_HOMES = {
    "Evaluator": "embcomp.search.evaluators.base",
    "Prepared": "embcomp.search.api",
    "SearchConfig": "embcomp.search.config.search_config",
    "SearchResult": "embcomp.search.reporting.results",
    "CandidateSampler": "embcomp.search.samplers.base",
    "load_search": "embcomp.search.config.search_config",
    "parse_search": "embcomp.search.config.search_config",
    "prepare_search": "embcomp.search.api",
    "search": "embcomp.search.api",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES, {"Source": "CandidateSampler"})
