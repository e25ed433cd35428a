"""A vocabulary with other ids, without the values that are dropped; read and written a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.data_pipelines.schema import FIRST_ID
from embcomp.io.parquet_batches import batches_of

_AT_ONCE = 1 << 16  # values


@dataclass(frozen=True)
class RenumberedVocabulary:
    """The vocabulary of a feature after ids were numbered anew.

    Args:
        path: the one that there was.
        new_ids: (n,) the new ids of old ones; those of dropped values are below `FIRST_ID`.
    """

    path: Path
    new_ids: Callable[[Tensor], Tensor]

    def values(self) -> int:
        """How many values are left."""
        parts = self._parts(["id"])
        return sum(int((self._ids_of(part) >= FIRST_ID).sum()) for part in parts)

    def write(self, path: Path) -> None:
        """Write what is left to another file, with its columns and in its order."""
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            schema = file.schema_arrow.remove_metadata()
        place = schema.get_field_index("id")
        schema = schema.set(place, pa.field("id", pa.int32()))
        with RowGroupWriter(path, schema) as writer:
            for part in self._parts(None):
                ids = self._ids_of(part)
                table = pa.Table.from_batches([part])
                column = pa.array(ids.to(torch.int32).numpy())
                renumbered = table.set_column(place, "id", column).filter((ids >= FIRST_ID).numpy())
                writer.write(renumbered.cast(schema))

    def _ids_of(self, part: pa.RecordBatch) -> Tensor:
        return self.new_ids(torch.from_numpy(part["id"].to_numpy().astype("int64")))

    def _parts(self, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            yield from batches_of(file, _AT_ONCE, columns)
