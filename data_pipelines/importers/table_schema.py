"""The schema YAML: any CSV, TSV or Parquet file described in a few lines.

``yaml
name: shop
format: csv                  # csv, tsv or parquet; by the first file's suffix when left out
columns: [clicked, price]    # only for text without a header
label: {column: rating, positive: "> 3", negative: "< 3"}   # or just a column of 0 and 1
numeric: [{name: price, transform: log1p}]
categorical: [user, {name: tags, separator: "|"}, {name: item_id, column: item.id}]
group: user
weight: importance           # a number of 0 or more in each row
split: {kind: random, seed: 7, train: 0.8, valid: 0.1, test: 0.1}   # or {kind: time, column: day}
``

Conditions of a label compare numbers, or name words: `"== bought"`, `"!= bought"`, or a list such as
`[bought, kept]`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from embcomp.data_pipelines.importers.label_conditions import Condition, Rule
from embcomp.data_pipelines.sample_weights import WEIGHT_COLUMN
from embcomp.data_pipelines.schema import FIRST_ID, LARGEST_ID
from embcomp.data_pipelines.splits import SplitRule, TimeSplit
from embcomp.data_pipelines.transforms import TRANSFORMS
from embcomp.errors import ConfigError, DataError
from embcomp.io.yaml_reading import read_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelSchema(_Strict):
    """How the label follows from a column: rows that meet neither condition are left out."""

    column: str
    positive: Rule | None = None
    negative: Rule | None = None

    @field_validator("positive", "negative")
    @classmethod
    def _is_condition(cls, rule: Rule | None) -> Rule | None:
        if rule is not None:
            Condition.parse(rule)
        return rule

    @model_validator(mode="after")
    def _both_or_none(self) -> LabelSchema:
        if (self.positive is None) != (self.negative is None):
            raise ValueError("give both positive and negative, or none of them")
        return self

    @property
    def has_rule(self) -> bool:
        """Whether a rule makes the label, rather than a column that holds 0 and 1."""
        return self.positive is not None

    @property
    def has_words(self) -> bool:
        """Whether the column is to be read as text."""
        rules = [rule for rule in (self.positive, self.negative) if rule is not None]
        return any(Condition.parse(rule).words for rule in rules)

    def expressions(self, text: pl.Expr, number: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
        """Return the label (Float32, null when there is none) and whether to leave the row out.

        Args:
            text: the column as canonical text.
            number: the column as Float64, null where it is no number.
        """
        if self.positive is None or self.negative is None:
            # As float32, a number close to 1 would be 1.
            return pl.when(number.is_in([0.0, 1.0])).then(number).cast(pl.Float32), pl.lit(False)
        positive = Condition.parse(self.positive).holds(text, number)
        negative = Condition.parse(self.negative).holds(text, number)
        label = pl.when(positive).then(1).when(negative).then(0).cast(pl.Float32)
        return label, (text.is_not_null() & ~positive & ~negative).fill_null(False)


class NumericSchema(_Strict):
    """A numeric feature; `column` is its name in the raw table when that is another."""

    name: str
    column: str | None = None
    transform: str = "log1p"

    @field_validator("transform")
    @classmethod
    def _known(cls, transform: str) -> str:
        if transform not in TRANSFORMS:
            raise ValueError(f"{transform!r} is not a transform; there are {list(TRANSFORMS)}")
        return transform

    @property
    def source(self) -> str:
        """The column of the raw table."""
        return self.column or self.name


class CategoricalSchema(_Strict):
    """A categorical feature; a `separator` makes it multi-valued. Parquet lists are so as well.

    `column` is its name in the raw table when that is another. `encode: hash` makes ids hashes of values,
    without a vocabulary, for tables that are hashed anyway; `encode: ids` says that values are ids
    already, below `num_embeddings`.
    """

    name: str
    column: str | None = None
    separator: str | None = Field(default=None, min_length=1)
    multi_valued: bool = False
    min_count: int | None = Field(default=None, ge=1)
    encode: Literal["vocabulary", "hash", "ids"] = "vocabulary"
    num_embeddings: int | None = Field(default=None, ge=FIRST_ID, le=LARGEST_ID + 1)

    @model_validator(mode="after")
    def _counts_what_is_counted(self) -> CategoricalSchema:
        if self.encode == "hash" and self.min_count is not None:
            raise ValueError(
                f"{self.name!r} has a min_count, but nobody counts values that are hashed; give either "
                f"encode: hash or min_count"
            )
        if self.encode == "ids" and self.min_count is not None:
            raise ValueError(f"{self.name!r} has a min_count, but its values are ids, which stay")
        return self

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is so by default, so that the digests of earlier datasets stay."""
        content: dict[str, Any] = handler(self)
        if content["encode"] == "vocabulary":
            del content["encode"]
        if content["num_embeddings"] is None:
            del content["num_embeddings"]
        return content

    @property
    def is_bag(self) -> bool:
        """Whether the schema says that a row may hold several values."""
        return self.multi_valued or self.separator is not None

    @property
    def source(self) -> str:
        """The column of the raw table."""
        return self.column or self.name


class TableSchema(_Strict):
    """The content of a schema YAML."""

    name: str
    label: LabelSchema
    numeric: tuple[NumericSchema, ...] = ()
    categorical: tuple[CategoricalSchema, ...] = ()
    group: str | None = None
    weight: str | None = None
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

    @field_validator("separator", "quote")
    @classmethod
    def _is_one_byte(cls, mark: str | None) -> str | None:
        if mark is not None and (not mark.isascii() or mark in "\r\n"):
            raise ValueError(f"{mark!r} cannot part fields; take an ASCII character")
        return mark

    @field_validator("columns")
    @classmethod
    def _are_unique(cls, columns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        double = sorted({name for name in columns or () if (columns or ()).count(name) > 1})
        if double:
            raise ValueError(f"columns named twice: {double}")
        return columns

    @property
    def time(self) -> str | None:
        """The raw column that rows are split by."""
        return self.split.column if isinstance(self.split, TimeSplit) else None

    @property
    def sources(self) -> list[str]:
        """The raw columns that are wanted, each once."""
        more = [name for name in (self.time, self.weight) if name is not None]
        return list(dict.fromkeys([self.label.column, *self._feature_sources, *more]))

    @property
    def number_sources(self) -> list[str]:
        """The raw columns that have to hold numbers."""
        label = [] if self.label.has_words else [self.label.column]
        weight = [] if self.weight is None else [self.weight]
        return list(dict.fromkeys([*(c.source for c in self.numeric), *label, *weight]))

    @property
    def _feature_sources(self) -> list[str]:
        return [c.source for c in self.numeric] + [c.source for c in self.categorical]

    @property
    def feature_names(self) -> list[str]:
        """Names of all features, numeric ones first."""
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
        if self.label.column in self._feature_sources:
            raise ValueError(
                f"{self.label.column!r} is the label and a feature too: a model would read off "
                "what it is to predict"
            )
        self._check_weight(names)
        if self.group is not None and self.group not in {c.name for c in self.categorical}:
            raise ValueError(f"group {self.group!r} is not one of the categorical features")
        return self

    def _check_weight(self, names: list[str]) -> None:
        """Raise where the weights are something else too."""
        if self.weight is None:
            return
        other = "a feature" if self.weight in self._feature_sources else None
        other = "the label" if self.weight == self.label.column else other
        if other is not None:
            raise ValueError(
                f"{self.weight!r} is the weight and {other} too; copy the column under another name "
                f"if it is meant to be both"
            )
        if WEIGHT_COLUMN in names:
            raise ValueError(
                f"{WEIGHT_COLUMN!r} is the prepared weight's name; no feature may have it: "
                f"{{name: NEW, column: {WEIGHT_COLUMN}}}"
            )

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an absent weight, so that the digests of earlier datasets stay."""
        content: dict[str, Any] = handler(self)
        if content["weight"] is None:
            del content["weight"]
        return content


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
