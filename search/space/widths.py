"""Candidates as widths of whole tables, for what can score nothing else."""

from __future__ import annotations

from embcomp.backends import Full
from embcomp.backends.base import BackendConfig
from embcomp.backends.low_dim import LowDim
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed
from embcomp.search.space.options import Option
from embcomp.search.space.space import Space
from embcomp.tables.specs import TableSpec


def widths_of(space: Space) -> list[list[int]]:
    """For each unit, the width that each of its options stands for.

    Raises:
        ConfigError: for an option that is more than a width.
    """
    odd = [
        f"{unit.name}: {option.label}"
        for unit in space.units
        for option in unit.options
        if not _is_width(option)
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ConfigError(
            "evaluator supernet knows widths of whole tables, so every choice must be full or "
            f"low_dim with a width, in fp32 rows; got {listed(odd[:3])}{more}. Take evaluator "
            "training for these"
        )
    return [
        [_width(option.config, unit.tables[0]) for option in unit.options] for unit in space.units
    ]


def _is_width(option: Option) -> bool:
    config = option.config
    if option.row_type != "fp32":
        return False
    return isinstance(config, Full) or (isinstance(config, LowDim) and not config.kept)


def _width(config: BackendConfig, table: TableSpec) -> int:
    return config.columns(table) if isinstance(config, LowDim) else table.embedding_dim
