"""What a table is and weighs: specifications, bytes, budgets, row types.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.tables.specs import (
        InitFn as InitFn,
        LookupKey as LookupKey,
        PhysicalTable as PhysicalTable,
        SkipEmptyShards as SkipEmptyShards,
        TableSpec as TableSpec,
        UniformInit as UniformInit,
        by_name as by_name,
        padded_dim as padded_dim,
        refuse_twice as refuse_twice,
        shared_name as shared_name,
        specs_from_configs as specs_from_configs,
        splits_by_rows as splits_by_rows,
    )

_HOMES = dict.fromkeys(
    (
        "InitFn",
        "LookupKey",
        "PhysicalTable",
        "SkipEmptyShards",
        "TableSpec",
        "UniformInit",
        "by_name",
        "padded_dim",
        "refuse_twice",
        "shared_name",
        "specs_from_configs",
        "splits_by_rows",
    ),
    "embcomp.tables.specs",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
