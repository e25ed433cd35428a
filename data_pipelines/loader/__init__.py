"""From a prepared dataset to batches.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.data_pipelines.loader.parquet_loader import (
        DEFAULT_SHUFFLE_BUFFER as DEFAULT_SHUFFLE_BUFFER,
        STATE_VERSION as STATE_VERSION,
        ParquetLoader as ParquetLoader,
    )

_HOMES = dict.fromkeys(
    (
        "DEFAULT_SHUFFLE_BUFFER",
        "ParquetLoader",
        "STATE_VERSION",
    ),
    "embcomp.data_pipelines.loader.parquet_loader",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
