"""The schema YAML: any CSV, TSV or Parquet file described in a few lines.

```yaml
name: shop
format: csv                  # csv, tsv or parquet; by the first file's suffix when left out
columns: [clicked, price]    # only for text without a header
label: {column: rating, positive: "> 3", negative: "< 3"}   # or just a column of 0 and 1
numeric: [{name: price, transform: log1p}]
categorical: [user, {name: tags, separator: "|"}]
group: user
split: {kind: random, seed: 7, train: 0.8, valid: 0.1, test: 0.1}
```
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from embcomp.data_pipelines.splits import SplitRule
from embcomp.data_pipelines.transforms import TRANSFORMS
from embcomp.errors import ConfigError, DataError
from embcomp.io.yaml_reading import read_yaml

_CONDITION = re.compile(r"\s*(<=|>=|==|!=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelSchema(_Strict):
    """How the label follows from a column: rows that meet neither condition are left out."""

    column: str
    positive: str | None = None
    negative: str | None = None

    @field_validator("positive", "negative")
    @classmethod
    def _is_condition(cls, text: str | None) -> str | None:
        if text is not None and not _CONDITION.fullmatch(text):
            raise ValueError(f"{text!r} is not a condition such as '> 3' or '== 1'")
        return text

    @model_validator(mode="after")
    def _both_or_none(self) -> LabelSchema:
        if (self.positive is None) != (self.negative is None):
            raise ValueError("give both positive and negative, or none of them")
        return self

    @property
    def has_rule(self) -> bool:
        return self.positive is not None

    def expressions(self) -> tuple[pl.Expr, pl.Expr]:
        """Return the label (Float32, null when there is none) and whether to leave the row out."""
        value = pl.col(self.column).cast(pl.Float64)
        if self.positive is None or self.negative is None:
            return value.cast(pl.Float32), pl.lit(False)
        positive, negative = _condition(value, self.positive), _condition(value, self.negative)
        label = pl.when(positive).then(1).when(negative).then(0).cast(pl.Float32)
        return label, (value.is_not_null() & ~positive & ~negative).fill_null(False)


class NumericSchema(_Strict):
    """A numeric feature."""

    name: str
    transform: str = "log1p"

    @field_validator("transform")
    @classmethod
    def _known(cls, transform: str) -> str:
        if transform not in TRANSFORMS:
            raise ValueError(f"{transform!r} is not a transform; there are {list(TRANSFORMS)}")
        return transform


class CategoricalSchema(_Strict):
    """A categorical feature; a `separator` makes it multi-valued. Parquet lists are so as well."""

    name: str
    separator: str | None = Field(default=None, min_length=1)
    multi_valued: bool = False
    min_count: int | None = Field(default=None, ge=1)

    @property
    def is_bag(self) -> bool:
        return self.multi_valued or self.separator is not None


class TableSchema(_Strict):
    """The content of a schema YAML."""

    name: str
    label: LabelSchema
    numeric: tuple[NumericSchema, ...] = ()
    categorical: tuple[CategoricalSchema, ...] = ()
    group: str | None = None
    min_count: int = Field(default=1, ge=1)
    split: SplitRule | None = None
    format: Literal["csv", "tsv", "parquet"] | None = None
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    quote: str | None = Field(default='"', min_length=1, max_length=1)
    columns: tuple[str, ...] | None = None
    null_values: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, content: object) -> object:
        if not isinstance(content, dict):
            return content
        content = dict(content)
        if isinstance(content.get("label"), str):
            content["label"] = {"column": content["label"]}
        for key in ("numeric", "categorical"):
            if isinstance(content.get(key), list):
                content[key] = [{"name": x} if isinstance(x, str) else x for x in content[key]]
        return content

    @property
    def feature_names(self) -> list[str]:
        return [c.name for c in self.numeric] + [c.name for c in self.categorical]

    @model_validator(mode="after")
    def _names_agree(self) -> TableSchema:
        names = self.feature_names
        if not names:
            raise ValueError("there are no features; list some under numeric or categorical")
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"features named twice: {double}")
        if "label" in names:
            raise ValueError("'label' is the prepared label's name; no feature may have it")
        if self.label.column in names:
            raise ValueError(
                f"{self.label.column!r} is the label and a feature too: a model would read off "
                "what it is to predict"
            )
        if self.group is not None and self.group not in {c.name for c in self.categorical}:
            raise ValueError(f"group {self.group!r} is not one of the categorical features")
        return self


def load_schema(path: Path) -> TableSchema:
    """Read a schema YAML.

    Raises:
        DataError: it is missing, is not YAML, or has an unknown key or a wrong value; the text
            names each and suggests the nearest valid key.
    """
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise DataError(f"schema {error}") from None
    try:
        return TableSchema.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_problem(item)}" for item in error.errors()]
        raise DataError(f"schema {path} is wrong:\n" + "\n".join(lines)) from None


_MODELS: dict[str, type[BaseModel]] = {
    "label": LabelSchema,
    "numeric": NumericSchema,
    "categorical": CategoricalSchema,
}


def _problem(item: object) -> str:
    error = dict(item)  # type: ignore[call-overload]
    place = [str(part) for part in error["loc"]]
    where = ".".join(place) or "(top)"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    if place[0] == "split":
        return f"{where}: unknown key {place[-1]!r}"
    model = TableSchema if len(place) == 1 else _MODELS[place[0]]
    known = list(model.model_fields)
    near = difflib.get_close_matches(place[-1], known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{where}: unknown key; {hint}valid keys are {', '.join(known)}"


def _condition(value: pl.Expr, text: str) -> pl.Expr:
    match = _CONDITION.fullmatch(text)
    assert match is not None, "validated when the schema was read"
    operator, number = match.group(1), float(match.group(2))
    return {
        "<": value < number,
        "<=": value <= number,
        ">": value > number,
        ">=": value >= number,
        "==": value == number,
        "!=": value != number,
    }[operator]
