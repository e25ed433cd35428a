"""Methods that are trained in stages, as choices of a search: what a candidate can hold of them.

A candidate holds one such method, in one setting, though a training may hold several. Its stages have steps of their own, so scores on the way
mean other things than those of a method that is trained once.
"""

from __future__ import annotations

from embcomp.backends.base import BackendConfig
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.space.options import Unit
from embcomp.search.space.space import Space


def staged_methods(space: Space) -> list[BackendConfig]:
    """The methods of a space that are trained in stages, each once."""
    found: list[BackendConfig] = []
    for unit in space.units:
        found += [config for config in _staged(unit) if config not in found]
    return found


def check_stages(config: SearchConfig, space: Space) -> None:
    """Refuse what no training could do, before anything is trained.

    Raises:
        ConfigError: a candidate could hold two methods in stages, or its scores on the way or its
            latency would be asked for, or a method needs what is not installed.
    """
    methods = staged_methods(space)
    if not methods:
        return
    for method in methods:
        missing = method.missing()
        if missing is not None:
            raise ConfigError(f"groups: {method.name}: {missing}")
    names = listed(dict.fromkeys(method.name for method in methods))
    units = [unit for unit in space.units if _staged(unit)]
    if len(units) > 1 and len(methods) > 1:
        raise ConfigError(
            f"groups: {names} is trained in stages, and a candidate of a search holds one such method "
            f"in one setting, but {units[0].name!r} and {units[1].name!r} could take different "
            "ones. Tie the group (tied: true), or give it one setting only"
        )
    if config.fidelity.rungs is not None:
        raise ConfigError(
            f"fidelity.rungs: {names} is trained in stages, whose scores on the way do not compare "
            "with those of other candidates; leave rungs out (max_steps bounds each stage)"
        )
    if "latency" in config.objectives:
        raise ConfigError(
            f"objectives: {names} is trained in stages and serves another form than it begins "
            "with, so look-ups cannot be timed in the search; take bytes, and `embcomp export` the "
            "finals, which measures them"
        )


def _staged(unit: Unit) -> list[BackendConfig]:
    return [option.config for option in unit.options if len(option.config.stages()) > 1]


def check_latency(config: SearchConfig, space: Space) -> None:
    """Refuse to time look-ups of rows that are served in another type than they are trained in.

    Raises:
        ConfigError: where look-ups are timed and an option has such rows.
    """
    narrow = [
        f"{unit.name}: {option.label}"
        for unit in space.units
        for option in unit.options
        if option.row_type != "fp32"
    ]
    if narrow and "latency" in config.objectives:
        raise ConfigError(
            f"objectives: latency is that of rows as they are trained, in fp32, and {narrow[0]!r} "
            "is served in another type; take bytes, and `embcomp export` the points to time them"
        )
