"""The YAML of a training run, and what the names in it stand for.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.config.train_config import (
        DataConfig as DataConfig,
    )
    from embcomp.config.train_config import (
        DenseOptimizerConfig as DenseOptimizerConfig,
    )
    from embcomp.config.train_config import (
        EarlyStopConfig as EarlyStopConfig,
    )
    from embcomp.config.train_config import (
        InitConfig as InitConfig,
    )
    from embcomp.config.train_config import (
        PlateauConfig as PlateauConfig,
    )
    from embcomp.config.train_config import (
        RowOptimizerConfig as RowOptimizerConfig,
    )
    from embcomp.config.train_config import (
        RunConfig as RunConfig,
    )
    from embcomp.config.train_config import (
        StageConfig as StageConfig,
    )
    from embcomp.config.train_config import (
        TablesConfig as TablesConfig,
    )
    from embcomp.config.train_config import (
        TrainConfig as TrainConfig,
    )
    from embcomp.config.train_config import (
        load_config as load_config,
    )
    from embcomp.config.train_config import (
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
