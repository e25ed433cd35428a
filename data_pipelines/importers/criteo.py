"""Criteo click logs: the Kaggle Display Advertising Challenge and the 1TB logs.

Tab-separated lines of a label, 13 integer counts and 26 hashed categories, without a header; any field
but the label may be empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl
from typing_extensions import override

from embcomp.data_pipelines.importers.base import (
    NO_LABEL,
    CategoricalColumn,
    Importer,
    Layout,
    NumericColumn,
    RawFile,
)
from embcomp.data_pipelines.importers.compressed import SUFFIXES
from embcomp.data_pipelines.importers.delimited import ColumnType, Delimited, without_absent
from embcomp.data_pipelines.importers.text import Parsed, TextTable
from embcomp.data_pipelines.splits import ChronologicalSplit, SplitRule
from embcomp.errors import DataError

NUMERIC = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))


@dataclass(frozen=True, kw_only=True)
class CriteoImporter(Importer):
    """Criteo Kaggle `train.txt`, or the 1TB logs' `day_0` ... `day_23`, plain or compressed."""

    name: ClassVar[str] = "criteo"
    title: ClassVar[str] = "Criteo TSV: label, 13 integers, 26 categories"

    @property
    @override
    def default_min_count(self) -> int:
        return 10

    @property
    @override
    def default_split(self) -> SplitRule:
        # Rows are in the order of time, and a model in use has seen the past only.
        return ChronologicalSplit()

    @override
    def find(self, folder: Path) -> list[Path]:
        texts = [p for p in super().find(folder) if p.suffix in ("", ".txt", ".tsv", *SUFFIXES)]
        found = [p for p in texts if re.match(r"(train|day_)", p.name)] or texts
        if not found:
            raise DataError(f"{folder} holds no text files; expected {self.title}")
        # Natural order: day_2 comes before day_10.
        found.sort(key=lambda p: [int(t) if t.isdigit() else 0 for t in re.split(r"(\d+)", p.name)])
        return found

    @override
    def open(self, files: Sequence[RawFile]) -> CriteoTable:
        return CriteoTable(files)

    @override
    def open_to_score(self, files: Sequence[RawFile]) -> CriteoTable:
        return CriteoTable(files, to_score=True)


class CriteoTable(TextTable):
    """Criteo lines; to be scored, files may lack the label, as the challenge's `test.txt` does."""

    def __init__(self, files: Sequence[RawFile], *, to_score: bool = False) -> None:
        layout = Layout(
            numeric=tuple(NumericColumn(name=name) for name in NUMERIC),
            categorical=tuple(CategoricalColumn(name=name) for name in CATEGORICAL),
        )
        super().__init__(files, layout)
        columns: list[tuple[str, ColumnType]] = [("label", "int")]
        columns += [(name, "whole") for name in NUMERIC]
        columns += [(name, "text") for name in CATEGORICAL]
        whole = Delimited(columns=tuple(columns), separator="\t")
        self.formats = [whole] * len(self.files)
        if to_score:
            self.to_score = True
            self.formats = without_absent(whole, "label", self.files)
            self.has_labels = any("label" in each.schema for each in self.formats)

    @override
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
        parsed = self.formats[file].parse(data, rows, self.numberings)
        label = pl.col("label").cast(pl.Float32) if "label" in parsed.frame.columns else NO_LABEL
        parsed.frame = parsed.frame.with_columns(label)
        return parsed
