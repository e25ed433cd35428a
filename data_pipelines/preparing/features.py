"""The features of a dataset to be, and a raw block's columns brought to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import polars as pl

from embcomp.data_pipelines.importers.base import WEIGHT, Layout, NumericColumn
from embcomp.data_pipelines.transforms import BUCKET, TRANSFORMS, bucket_expression
from embcomp.errors import DataError

HASH, VOCABULARY, IDS = "hash", "vocabulary", "ids"
WAYS = (VOCABULARY, HASH, IDS)
"""How values become ids: by a vocabulary of those in the train split, by a hash of their own, or as
they are, where raw rows hold ids."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A categorical feature: bucketed numbers come as text too; hashed ones have no vocabulary.

    One with `num_embeddings` holds ids already. The counts of one that is `counted_before` were taken by
    someone else.
    """

    name: str
    multi_valued: bool
    min_count: int
    bucketed: bool = False
    hashed: bool = False
    num_embeddings: int | None = None
    counted_before: bool = False

    @property
    def is_counted(self) -> bool:
        """Whether values are to be counted."""
        return not (self.hashed or self.counted_before)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the dataset will have, in its order."""

    numeric: tuple[NumericColumn, ...]
    categorical: tuple[Feature, ...]
    weighted: bool = False

    def columns(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return label, weight, numeric columns and categorical ones of a block as text or lists."""
        return frame.select(
            "label",
            *([WEIGHT] if self.weighted else []),
            *[column.name for column in self.numeric],
            *[self._values(f) for f in self.categorical],
        )

    @staticmethod
    def _values(feature: Feature) -> pl.Expr:
        if feature.bucketed:
            return bucket_expression(feature.name)
        values = pl.col(feature.name)
        if feature.num_embeddings is None or feature.multi_valued:
            return values
        # An id of 0 is a missing value, and counted as one.
        return pl.when(values != "0").then(values).alias(feature.name)

    @property
    def are_all_counted(self) -> bool:
        """Whether no vocabulary comes from elsewhere, and no feature holds ids already."""
        return not any(f.counted_before or f.num_embeddings for f in self.categorical)

    def counted_elsewhere(self) -> Features:
        """Return the features with counts of someone else for all that are counted."""
        categorical = [
            replace(each, counted_before=each.is_counted and each.num_embeddings is None)
            for each in self.categorical
        ]
        return replace(self, categorical=tuple(categorical))


def flat_values(bags: pl.Series) -> pl.Series:
    """Return the values of all bags in a row, none for an empty or a missing bag.

    Versions of polars disagree on what an empty bag explodes to, so none is left to explode.
    """
    return bags.filter(bags.list.len() > 0).explode(empty_as_null=False, keep_nulls=False)


def choose_features(
    layout: Layout,
    *,
    numeric: str | Mapping[str, str] | None,
    min_count: int | Mapping[str, int] | None,
    default_min_count: int,
    encode: str | Mapping[str, str] | None = None,
) -> Features:
    """Combine an importer's layout with the caller's choices.

    Args:
        numeric: a transform for all numeric columns or one by name; None keeps the importer's.
        min_count: likewise for categorical features.
        default_min_count: where neither the caller nor the layout has one.
        encode: `vocabulary` or `hash`, for all categorical features or by name.
    """
    chosen = _by_name(numeric, [c.name for c in layout.numeric], "numeric")
    transforms = {c.name: chosen.get(c.name, c.transform) for c in layout.numeric}
    for name, transform in transforms.items():
        if transform not in TRANSFORMS:
            raise DataError(
                f"numeric transform {transform!r} of {name} is unknown; there are "
                f"{', '.join(TRANSFORMS)}"
            )
    bucketed = [name for name, transform in transforms.items() if transform == BUCKET]
    counts = _by_name(min_count, bucketed + [c.name for c in layout.categorical], "min_count")
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"min_count of {name} is {count}; expected 1 or more")
    ways = _by_name(encode, bucketed + [c.name for c in layout.categorical], "encode")
    for name, way in ways.items():
        if way not in WAYS:
            raise DataError(f"encode of {name} is {way!r}; there are {', '.join(WAYS)}")
    sizes = {c.name: c.num_embeddings for c in layout.categorical}
    usual = {
        c.name: HASH if c.hashed else IDS if c.holds_ids else VOCABULARY for c in layout.categorical
    }
    ways = {**usual, **ways}
    for name, way in ways.items():
        if way == IDS and sizes.get(name) is None:
            raise DataError(
                f"values of {name!r} are said to be ids, but not how many there are; write "
                f"`num_embeddings` for it in the schema"
            )
    return Features(
        weighted=layout.weight is not None,
        numeric=tuple(
            NumericColumn(name=name, transform=transform)
            for name, transform in transforms.items()
            if transform != BUCKET
        ),
        categorical=tuple(
            [
                Feature(
                    name=name,
                    multi_valued=False,
                    min_count=counts.get(name, default_min_count),
                    bucketed=True,
                    hashed=ways.get(name) == HASH,
                )
                for name in bucketed
            ]
            + [
                Feature(
                    name=c.name,
                    multi_valued=c.multi_valued,
                    min_count=counts.get(c.name, c.min_count or default_min_count),
                    hashed=ways[c.name] == HASH,
                    num_embeddings=c.num_embeddings if ways[c.name] == IDS else None,
                )
                for c in layout.categorical
            ]
        ),
    )


Choice = TypeVar("Choice", int, str)


def _by_name(
    choice: Choice | Mapping[str, Choice] | None, names: list[str], what: str
) -> dict[str, Choice]:
    if choice is None:
        return {}
    if not isinstance(choice, Mapping):
        return dict.fromkeys(names, choice)
    unknown = sorted(set(choice) - set(names))
    if unknown:
        raise DataError(f"{what} names {unknown[0]!r}, which is none of {', '.join(names)}")
    return dict(choice)
