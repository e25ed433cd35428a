"""What a search may choose from, as its YAML says it: methods with values for their settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from embcomp.config.sections import PositiveInt, Section
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import bind_dataclass, config_error, did_you_mean, listed

if TYPE_CHECKING:
    from embcomp.backends.base import BackendConfig
    from embcomp.tables.row_types import RowType

ROW_TYPE = "row_type"
"""The key of a choice that is no setting of its method."""


class ChoiceConfig(Section):
    """A method, and the values that its settings may take: a list is searched, a value is fixed.

    A bare string is short for a method without settings. `width: auto` is short for the powers of
    two up to the embedding's width, and that width. `row_type` is of any method: what its rows are
    served in.

    Attributes:
        method: its name.
        settings: the values of its settings.
        row_types: the types that its rows may be served in.
    """

    method: str
    settings: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    row_types: Annotated[tuple[str, ...], Field(min_length=1)] = ("fp32",)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_searched(cls, value: Any) -> Any:
        from embcomp.backends import BACKENDS
        from embcomp.tables.row_types import check_row_type

        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping) or "method" not in value:
            raise config_error(f"expected a mapping with the key 'method', got {value!r}")
        options = dict(value)
        method = options.pop("method")
        if not isinstance(method, str) or method not in BACKENDS:
            hint = did_you_mean(str(method), BACKENDS)
            raise config_error(f"unknown method {method!r}{hint}; they are {listed(BACKENDS)}")
        settings = {}
        for key, given in options.items():
            values = given if isinstance(given, list | tuple) else [given]
            if not values:
                raise config_error(f"{key}: the list is empty, so there is nothing to choose")
            repeated = [x for i, x in enumerate(values) if x in values[:i]]
            if repeated:
                raise config_error(f"{key}: {repeated[0]!r} appears twice")
            settings[key] = tuple(values)
        row_types = settings.pop(ROW_TYPE, ("fp32",))
        try:
            row_types = tuple(check_row_type(each) for each in row_types)
        except ConfigError as error:
            raise config_error(f"{ROW_TYPE}: {error}") from None
        # One value of each at a time: enough to refuse a wrong key or a value out of range.
        for key, values in settings.items():
            for one in values:
                if (key, one) != ("width", "auto"):
                    bind_dataclass(BACKENDS[method], {key: one})
        return {"method": method, "settings": settings, "row_types": row_types}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        lists = {key: list(values) for key, values in self.settings.items()}
        own = {} if self.row_types == ("fp32",) else {ROW_TYPE: list(self.row_types)}
        return {"method": self.method, **lists, **own}

    @property
    def is_searched(self) -> bool:
        """Whether anything has several values."""
        return any(len(values) > 1 for values in (*self.settings.values(), self.row_types))

    def grid(self, embedding_dim: int) -> dict[str, tuple[Any, ...]]:
        """All settings, `auto` written out, fixed ones as lists of one; then the row types."""
        grid = dict(self.settings)
        if grid.get("width") == ("auto",):
            powers = [1 << k for k in range(embedding_dim.bit_length())]
            grid["width"] = tuple(
                sorted({*(p for p in powers if p <= embedding_dim), embedding_dim})
            )
        return {**grid, ROW_TYPE: self.row_types}

    def configs(self, embedding_dim: int) -> dict[tuple[int, ...], tuple[BackendConfig, RowType]]:
        """The method's config and row type for each combination, by positions in the grid."""
        from embcomp.backends import BACKENDS
        from embcomp.tables.row_types import check_row_type

        grid = self.grid(embedding_dim)
        found = {}
        for place in itertools.product(*(range(len(values)) for values in grid.values())):
            options = {key: values[i] for (key, values), i in zip(grid.items(), place)}
            row_type = check_row_type(options.pop(ROW_TYPE))
            config = bind_dataclass(BACKENDS[self.method], options)
            config.require_size()
            found[place] = (config, row_type)
        return found


class RowBand(Section):
    """Tables by their number of rows.

    Attributes:
        min_rows: tables with fewer rows are not meant.
        max_rows: tables with more rows are not meant.
    """

    min_rows: PositiveInt = 1
    max_rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> RowBand:
        if self.max_rows is not None and self.max_rows < self.min_rows:
            raise config_error(f"min_rows {self.min_rows} is above max_rows {self.max_rows}")
        return self


class GroupConfig(Section):
    """Tables that have the same choices.

    Attributes:
        tables: `all` that no other group names, a list of names, or a band of rows.
        choices: what a table may be stored as.
        tied: whether all tables of the group take the same choice.
    """

    tables: Literal["all"] | tuple[str, ...] | RowBand = "all"
    choices: Annotated[tuple[ChoiceConfig, ...], Field(min_length=1)]
    tied: bool = False
