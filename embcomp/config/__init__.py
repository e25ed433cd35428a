"""The YAML of a training run, and what the names in it stand for.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.config.train_config import (
        DataConfig as DataConfig,
        DenseOptimizerConfig as DenseOptimizerConfig,
        EarlyStopConfig as EarlyStopConfig,
        InitConfig as InitConfig,
        PlateauConfig as PlateauConfig,
        RowOptimizerConfig as RowOptimizerConfig,
        RunConfig as RunConfig,
        StageConfig as StageConfig,
        TablesConfig as TablesConfig,
        TrainConfig as TrainConfig,
        load_config as load_config,
        parse_config as parse_config,
    )

_HOMES = dict.fromkeys(
    (
        "DataConfig",
        "DenseOptimizerConfig",
        "EarlyStopConfig",
        "InitConfig",
        "PlateauConfig",
        "RowOptimizerConfig",
        "RunConfig",
        "StageConfig",
        "TablesConfig",
        "TrainConfig",
        "load_config",
        "parse_config",
    ),
    "embcomp.config.train_config",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
