"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embcomp.testing.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Up to 4 ranks on this machine; they start when first asked for."""
    with WorkerPool(size=4) as pool:
        yield pool
