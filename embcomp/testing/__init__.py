"""Public checks for compression methods: what a new one must pass, and the means to run it.

Adding a method to the tests is one line: a `BackendCase` in the list that `CHECKS` and the
sharded checks are run over.
"""

from __future__ import annotations

from embcomp.testing.cases import BackendCase
from embcomp.testing.conformance import CHECKS, check_backend
from embcomp.testing.workers import RanksFailed, WorkerPool

__all__ = ["CHECKS", "BackendCase", "RanksFailed", "WorkerPool", "check_backend"]
