"""The YAML of a training run, and what the names in it stand for.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.config.train_config import (
        MOST_EPOCHS as MOST_EPOCHS,
        BatchSize as BatchSize,
        DataConfig as DataConfig,
        Decay as Decay,
        DenseOptimizerConfig as DenseOptimizerConfig,
        EarlyStopConfig as EarlyStopConfig,
        Epsilon as Epsilon,
        InitConfig as InitConfig,
        Penalty as Penalty,
        PlateauConfig as PlateauConfig,
        RowOptimizerConfig as RowOptimizerConfig,
        RunConfig as RunConfig,
        StageConfig as StageConfig,
        TablesConfig as TablesConfig,
        TrainConfig as TrainConfig,
        Width as Width,
        load_config as load_config,
        parse_config as parse_config,
    )

_HOMES = dict.fromkeys(
    (
        "BatchSize",
        "DataConfig",
        "Decay",
        "DenseOptimizerConfig",
        "EarlyStopConfig",
        "Epsilon",
        "InitConfig",
        "MOST_EPOCHS",
        "Penalty",
        "PlateauConfig",
        "RowOptimizerConfig",
        "RunConfig",
        "StageConfig",
        "TablesConfig",
        "TrainConfig",
        "Width",
        "load_config",
        "parse_config",
    ),
    "embcomp.config.train_config",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
