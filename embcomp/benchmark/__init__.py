"""Methods, budgets, seeds and models compared fairly: tuned alike, tested once, and written down.

Names are imported on first use, so that reading a benchmark's YAML does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.benchmark.api import benchmark as benchmark
    from embcomp.benchmark.benchmark_config import (
        BenchmarkConfig as BenchmarkConfig,
        load_benchmark as load_benchmark,
        parse_benchmark as parse_benchmark,
    )
    from embcomp.benchmark.benchmark_result import BenchmarkResult as BenchmarkResult
    from embcomp.benchmark.ledger import verify_ledger as verify_ledger

_HOMES = {
    "BenchmarkConfig": "embcomp.benchmark.benchmark_config",
    "BenchmarkResult": "embcomp.benchmark.benchmark_result",
    "benchmark": "embcomp.benchmark.api",
    "load_benchmark": "embcomp.benchmark.benchmark_config",
    "parse_benchmark": "embcomp.benchmark.benchmark_config",
    "verify_ledger": "embcomp.benchmark.ledger",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
