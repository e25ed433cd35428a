"""Candidates as widths of whole tables, for what can score nothing else."""

from __future__ import annotations

from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed
from embcomp.search.space.options import Option, Unit
from embcomp.search.space.space import Space


def widths_of(space: Space) -> list[list[int]]:
    """For each unit, the width that each of its options stands for.

    Raises:
        ConfigError: for an option that is more than a width.
    """
    odd = [
        f"{unit.name}: {option.label}"
        for unit in space.units
        for option in unit.options
        if not _is_width(option, unit)
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ConfigError(
            "evaluator supernet knows widths of whole tables, so every choice must be full or "
            f"low_dim with a width, in fp32 rows; got {listed(odd[:3])}{more}. Take evaluator "
            "training for these"
        )
    return [
        [option.config.columns(unit.tables[0]) or 0 for option in unit.options]
        for unit in space.units
    ]


def _is_width(option: Option, unit: Unit) -> bool:
    config = option.config
    return option.row_type == "fp32" and not any(
        config.columns(table) is None or config.is_pruned(table) for table in unit.tables
    )
