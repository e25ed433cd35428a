"""Which split a row belongs to, decided by its position in the raw input or by its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import Self

from embcomp.errors import DataError

SPLITS = ("train", "valid", "test")


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Shares(_Rule):
    train: float = Field(default=0.8, gt=0, le=1)
    valid: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        total = self.train + self.valid + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"train, valid and test must sum to 1, they sum to {total:.6g}")
        return self

    def bounds(self) -> list[Fraction]:
        """Where train and valid end, as shares of all rows; exact, as 0.7 + 0.1 is no 0.8."""
        train, valid = exact(self.train), exact(self.valid)
        # Shares may miss 1 by a rounding, which must not make a row of a split without a share.
        last = train + valid if self.test else Fraction(1)
        return [train if self.valid else last, last]

    def limits(self, total: int) -> list[int]:
        """Return how many of `total` rows come before the end of train, and of valid."""
        return [round(bound * total) for bound in self.bounds()]


class RandomSplit(_Shares):
    """Each row draws its split from a hash of the seed and its position."""

    kind: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, lt=2**63)

    def codes(self, first: int, rows: int, total: int, file_split: str | None) -> np.ndarray:
        """Return the split of each row, drawn by its position; see `SplitRule`."""
        drawn = uniform(self.seed, first, rows)
        bounds = [float(bound) for bound in self.bounds()]
        return np.searchsorted(bounds, drawn, side="right").astype(np.int8)


class ChronologicalSplit(_Shares):
    """The first rows are train, the next valid, the last test."""

    kind: Literal["chronological"] = "chronological"

    def codes(self, first: int, rows: int, total: int, file_split: str | None) -> np.ndarray:
        """Return the split of each row by its share of `total`; see `SplitRule`."""
        limits = self.limits(total)
        return np.searchsorted(limits, np.arange(first, first + rows), side="right").astype(np.int8)


class TimeSplit(_Shares):
    """The earliest rows are train, the next valid, the last test, by a column of the raw table.

    Rows of one time stay together, in the earlier split. Rows keep the order of the input.
    """

    kind: Literal["time"] = "time"
    column: str

    def codes(self, first: int, rows: int, total: int, file_split: str | None) -> np.ndarray:
        """Raise a DataError: times tell the split, and `codes_of` asks for them."""
        raise DataError("rows are split by a column, so their positions do not tell their split")

    def codes_of(self, times: np.ndarray, last: Sequence[float]) -> np.ndarray:
        """Return (rows,) int8 of (rows,) float64 times, given the last ones of train and valid."""
        return np.searchsorted(np.asarray(last), times, side="left").astype(np.int8)


class FileSplit(_Rule):
    """The caller gave the files of each split."""

    kind: Literal["files"] = "files"

    def codes(self, first: int, rows: int, total: int, file_split: str | None) -> np.ndarray:
        """Return the split that the caller gave the file; see `SplitRule`."""
        if file_split not in SPLITS:
            raise DataError(f"a file has split {file_split!r}; expected one of {list(SPLITS)}")
        return np.full(rows, SPLITS.index(file_split), dtype=np.int8)


SplitRule = Annotated[
    RandomSplit | ChronologicalSplit | TimeSplit | FileSplit, Field(discriminator="kind")
]
"""A split rule: `codes(first, rows, total, file_split)` gives, for rows `first`...`first + rows`
of an input of `total` rows, the index in `SPLITS` as (rows,) int8. Positions count every raw row,
bad and dropped ones included, so a split does not move when one row turns out to be malformed."""


def uniform(seed: int, first: int, rows: int) -> np.ndarray:
    """Return (rows,) float64 in [0, 1): splitmix64 of the seed and the rows' positions."""
    with np.errstate(over="ignore"):
        start = np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = np.arange(first + 1, first + rows + 1, dtype=np.uint64)
        z = z * np.uint64(0x9E3779B97F4A7C15) + start
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def exact(share: float) -> Fraction:
    """Return the decimal number that a share was written as: 0.29 of 100 rows is 29 of them."""
    return Fraction(str(share))


def parse_split(rule: object) -> RandomSplit | ChronologicalSplit | TimeSplit | FileSplit:
    """Make a rule from itself, from its kind's name, or from a mapping with a `kind`."""
    content = {"kind": rule} if isinstance(rule, str) else rule
    try:
        parsed: RandomSplit | ChronologicalSplit | TimeSplit | FileSplit = TypeAdapter(
            SplitRule
        ).validate_python(content)
    except ValidationError as error:
        problems = "; ".join(item["msg"] for item in error.errors())
        raise DataError(
            f"split {rule!r} is not a rule ({problems}); expected kind random (train, valid, "
            f"test, seed), chronological (train, valid, test), time (column, train, valid, test) "
            f"or files"
        ) from None
    return parsed
