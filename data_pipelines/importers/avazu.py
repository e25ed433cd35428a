"""Avazu click logs (Kaggle CTR challenge): a CSV with a header, whose `hour` is YYMMDDHH.

`id` is unique per row and carries nothing; `hour` as it stands occurs in one split only under a
chronological split, so it becomes hour of day and weekday.
"""

from __future__ import annotations

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
    RawFile,
)
from embcomp.data_pipelines.importers.delimited import ColumnType, Delimited
from embcomp.data_pipelines.importers.text import Parsed, TextTable, read_head, split_lines
from embcomp.data_pipelines.splits import ChronologicalSplit, SplitRule
from embcomp.errors import DataError

COLUMNS = [
    "id",
    "click",
    "hour",
    "C1",
    "banner_pos",
    "site_id",
    "site_domain",
    "site_category",
    "app_id",
    "app_domain",
    "app_category",
    "device_id",
    "device_ip",
    "device_model",
    "device_type",
    "device_conn_type",
    "C14",
    "C15",
    "C16",
    "C17",
    "C18",
    "C19",
    "C20",
    "C21",
]
UNLABELLED = [name for name in COLUMNS if name != "click"]
TIME_FEATURES = ("hour", "weekday")


@dataclass(frozen=True, kw_only=True)
class AvazuImporter(Importer):
    """Avazu `train` (or `train.csv`, `train.gz`); weekday 1 is Monday."""

    name: ClassVar[str] = "avazu"
    title: ClassVar[str] = "Avazu CSV with the header id,click,hour,..."

    @property
    @override
    def default_min_count(self) -> int:
        return 5

    @property
    @override
    def default_split(self) -> SplitRule:
        # Rows are in the order of time, and a model in use has seen the past only.
        return ChronologicalSplit()

    @override
    def find(self, folder: Path) -> list[Path]:
        found = super().find(folder)
        return [p for p in found if p.name.startswith("train")] or found

    @override
    def open(self, files: Sequence[RawFile]) -> AvazuTable:
        return AvazuTable(files)

    @override
    def open_to_score(self, files: Sequence[RawFile]) -> AvazuTable:
        return AvazuTable(files, to_score=True)


class AvazuTable(TextTable):
    """Avazu lines; to be scored, files may lack `click`, as the challenge's `test` does."""

    def __init__(self, files: Sequence[RawFile], *, to_score: bool = False) -> None:
        names = (*TIME_FEATURES, *COLUMNS[3:])
        layout = Layout(categorical=tuple(CategoricalColumn(name=name) for name in names))
        super().__init__(files, layout, header_lines=1)
        self.to_score = to_score
        self.formats = [self._format(file) for file in self.files]
        self.has_labels = any("click" in each.schema for each in self.formats)

    def _format(self, file: RawFile) -> Delimited:
        head = read_head(file.path, 1)
        names = head[0].decode("utf-8", "replace").split(",") if head else []
        if names != COLUMNS and not (self.to_score and names == UNLABELLED):
            raise DataError(
                f"{file.path} does not start with Avazu's header: expected {','.join(COLUMNS)}"
                f", got {','.join(names)[:200]!r}"
            )
        kinds: dict[str, ColumnType] = {"click": "int", "hour": "int"}
        return Delimited(
            columns=tuple((name, kinds.get(name, "text")) for name in names),
            separator=",",
            lenient=("click",) if self.to_score else (),
        )

    @override
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
        parsed = self.formats[file].parse(data, rows, self.numberings)
        names = parsed.frame.columns
        label = pl.col("click").cast(pl.Float32).alias("label") if "click" in names else NO_LABEL
        stamp = pl.col("hour").cast(pl.String)
        # Polars wants minutes where there are hours.
        time = pl.concat_str(pl.lit("20"), stamp, pl.lit("00")).str.strptime(
            pl.Datetime, "%Y%m%d%H%M", strict=False
        )
        frame = parsed.frame.with_columns(time.alias("__time__"), label)
        wrong = frame.get_column("__time__").is_null()
        if wrong.any():
            offsets = parsed.positions
            rest = wrong.arg_true().to_numpy()
            for at in rest.tolist():
                offset = at if offsets is None else int(offsets[at])
                text = (
                    split_lines(data)[offset]
                    .split(b",")[names.index("hour")]
                    .decode("utf-8", "replace")
                )
                parsed.bad.append((offset, f"hour is {text!r}, expected YYMMDDHH"))
            parsed.bad.sort()
            keep = (~wrong).to_numpy()
            parsed.positions = keep.nonzero()[0] if offsets is None else offsets[keep]
            frame = frame.filter(~wrong)
        parsed.frame = frame.select(
            "label",
            pl.col("__time__").dt.hour().cast(pl.String).alias("hour"),
            pl.col("__time__").dt.weekday().cast(pl.String).alias("weekday"),
            pl.col(COLUMNS[3:]),
        )
        return parsed
