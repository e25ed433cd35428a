"""Bytes and placement of a config before anything is allocated.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.planning.config_plan import (
        ROLES_OF_WEIGHTS as ROLES_OF_WEIGHTS,
        ConfigPlan as ConfigPlan,
        TableBytes as TableBytes,
        TableSize as TableSize,
        config_to_plan as config_to_plan,
        most_train_bytes as most_train_bytes,
        plan_config as plan_config,
        plan_lines as plan_lines,
        read_sizes as read_sizes,
        sizes_of_dataset as sizes_of_dataset,
        table_specs as table_specs,
        total_line as total_line,
        training_plans as training_plans,
    )

_HOMES = dict.fromkeys(
    (
        "ConfigPlan",
        "TableBytes",
        "ROLES_OF_WEIGHTS",
        "TableSize",
        "config_to_plan",
        "most_train_bytes",
        "plan_config",
        "plan_lines",
        "read_sizes",
        "sizes_of_dataset",
        "table_specs",
        "total_line",
        "training_plans",
    ),
    "embcomp.planning.config_plan",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
