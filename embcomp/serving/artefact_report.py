"""An artefact as `embcomp inspect` shows it: its tables' facts, with raw values for ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.schema import FILE_NAME, MISSING_ID, UNSEEN_ID, DatasetInfo
from embcomp.errors import DataError
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_folder import bytes_by_role, find_tensors
from embcomp.serving.artefact_integrity import check_vocabularies
from embcomp.serving.artefact_loading import load
from embcomp.serving.inspection import TableFacts, inspect_tables
from embcomp.serving.modules import (
    ServingEmbeddingBagCollection,
    ServingEmbeddingCollection,
    ServingModel,
)
from embcomp.serving.neighbours import Neighbour, Tables, nearest
from embcomp.tables.specs import TableSpec

_SPECIAL = {MISSING_ID: "(missing)", UNSEEN_ID: "(unseen)"}


@dataclass(frozen=True, kw_only=True)
class NamedNeighbour:
    """A neighbour and the raw value that its id stands for.

    Attributes:
        value: the raw value; the id itself where there is no vocabulary.
        neighbour: the id and how near it is.
    """

    value: str
    neighbour: Neighbour


@dataclass(frozen=True, kw_only=True)
class ArtefactReport:
    """What an artefact is and holds.

    Attributes:
        config: its description.
        bytes: of the tensors' file by part: tables, first_order, network.
        files: every file and its size.
        tables: facts by table.
        neighbours: for each value asked for, as `table=value`, what is near it.
    """

    config: ArtefactConfig
    bytes: Mapping[str, int]
    files: Mapping[str, int]
    tables: Sequence[TableFacts]
    neighbours: Mapping[str, Sequence[NamedNeighbour]]

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "embcomp_version": self.config.embcomp_version,
            "digest": self.config.digest,
            "row_type": self.config.row_type,
            "model": None if self.config.model is None else self.config.model.model_dump(),
            "dataset": None if self.config.dataset is None else self.config.dataset.model_dump(),
            "budget": self.config.budget,
            "bytes": dict(self.bytes),
            "files": dict(self.files),
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "neighbours": {
                asked: [
                    {"value": each.value, **dataclasses.asdict(each.neighbour)} for each in found
                ]
                for asked, found in self.neighbours.items()
            },
        }


def inspect_artefact(
    path: str | Path, *, neighbours: Sequence[str] = (), count: int = 10
) -> ArtefactReport:
    """Load an artefact, verify its bytes, and describe it.

    Args:
        path: the artefact's folder.
        neighbours: values to find the nearest others of, as `table=value`.
        count: how many of them.

    Raises:
        ArtefactError: the folder is no sound artefact.
        DataError: a value is not in the table's vocabulary.
    """
    folder = Path(path)
    config = ArtefactConfig.read(folder)
    loaded = load(folder, rows="torch", mmap=True)
    info = DatasetInfo.load(folder) if (folder / FILE_NAME).is_file() else None
    if info is not None:
        check_vocabularies(config, info, folder)
        hashed = [feature.name for feature in info.categorical if feature.is_hashed]
        if hashed:
            raise DataError(
                f"{folder}: ids of {hashed[0]!r} are hashes of its values, of which there is no list to look "
                "through; `embcomp inspect` shows artefacts whose features all have vocabularies"
            )
    tables = _tables_of(loaded)
    counts = {} if info is None else {n: torch.from_numpy(c) for n, c in id_counts(info).items()}
    return ArtefactReport(
        config=config,
        bytes=bytes_by_role(find_tensors(folder)),
        files={
            str(file.relative_to(folder)): file.stat().st_size
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
        tables=inspect_tables(tables, counts),
        neighbours={asked: _neighbours(tables, info, asked, count) for asked in neighbours},
    )


def _tables_of(loaded: nn.Module) -> Tables:
    """The embedding tables; a model without any has first-order ones."""
    if isinstance(loaded, ServingModel):
        tables = loaded.tables or loaded.first_order
        assert tables is not None
        return tables
    assert isinstance(loaded, (ServingEmbeddingBagCollection, ServingEmbeddingCollection))
    return loaded


def _neighbours(
    tables: Tables, info: DatasetInfo | None, asked: str, count: int
) -> list[NamedNeighbour]:
    name, equals, value = asked.partition("=")
    specs = {table.name: table for table in tables.plan.tables}
    if not equals or name not in specs:
        raise DataError(
            f"expected TABLE=VALUE with one of the tables {', '.join(specs)}; got {asked!r}"
        )
    words = _Vocabulary(info, specs[name])
    found = nearest(tables, specs[name], words.id_of(value), count)
    return [NamedNeighbour(value=words.value_of(each.id), neighbour=each) for each in found]


class _Vocabulary:
    """Raw values of a table's ids; without a vocabulary, ids are their own values."""

    def __init__(self, info: DatasetInfo | None, table: TableSpec) -> None:
        self._table = table
        self._values: dict[int, str] | None = None
        features = [] if info is None else info.categorical
        for feature in features:
            if feature.name in table.feature_names and feature.vocabulary:
                assert info is not None
                frame = pl.read_parquet(info.folder / feature.vocabulary)
                ids: np.ndarray = frame["id"].to_numpy()
                self._values = dict(zip(ids.tolist(), frame["value"].to_list()))
                break

    def id_of(self, value: str) -> int:
        if self._values is None:
            if value.lstrip("-").isdigit():
                return int(value)
            raise DataError(
                f"table {self._table.name!r} has no vocabulary here, so that values are ids; got "
                f"{value!r}"
            )
        for id_, known in [*_SPECIAL.items(), *self._values.items()]:
            if known == value:
                return id_
        raise DataError(
            f"{value!r} is not in the vocabulary of table {self._table.name!r}, so it would get "
            f"id {UNSEEN_ID}; ask for {self._table.name}='{_SPECIAL[UNSEEN_ID]}' instead"
        )

    def value_of(self, id_: int) -> str:
        if self._values is None:
            return str(id_)
        return _SPECIAL.get(id_) or self._values.get(id_, str(id_))
