"""Bytes: predicted from configs, counted on tensors. One meaning everywhere.

`serve_bytes` is what the tensors of the serving form take on disk. Training takes more: rows are
padded to the fused kernels' widths and carry optimizer state. Nothing here allocates a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from embcomp.tables.row_formats import row_bytes
from embcomp.tables.specs import PhysicalTable, padded_dim

Role = Literal["weights", "projection", "codes", "codebook", "mask", "remap"]
RowOptimizer = Literal["sgd", "rowwise_adagrad", "rowwise_rmsprop_ar", "adagrad", "adam"]


@dataclass(frozen=True, kw_only=True)
class TensorFootprint:
    """Bytes of one tensor of a compressed table.

    Args:
        name: the table that it belongs to, and its part in it where there are several.
        role: what it is for.
        rows: first dimension.
        columns: second dimension, without padding.
        itemsize: bytes of an element.
        train_columns: second dimension in training, padding included.
        lookup: whether it is a table looked up by id, with row-wise optimizer state. Other
            tensors are dense parameters, trained by the dense optimizer, or learnt buffers.
        trained: whether training holds it.
        served: whether the serving form holds it. Where the serving form is still to be learnt,
            a `served` tensor that is not `trained` stands for the most that it may take.
        served_row_bytes: bytes of a served row where rows are served in a type of their own.
        owners: what each table holds of it, in any unit, where several tables share it.
    """

    name: str
    role: Role
    rows: int
    columns: int
    itemsize: int
    train_columns: int
    lookup: bool = True
    trained: bool = True
    served: bool = True
    served_row_bytes: int | None = None
    owners: tuple[tuple[str, int], ...] = ()

    @property
    def serve_bytes(self) -> int:
        """Bytes on disk in the serving form."""
        if not self.served:
            return 0
        own = self.served_row_bytes
        return self.rows * (self.columns * self.itemsize if own is None else own)

    @property
    def train_weight_bytes(self) -> int:
        """Bytes of the trained tensor itself, padding included."""
        return self.rows * self.train_columns * self.itemsize if self.trained else 0

    def optimizer_bytes(self, optimizer: RowOptimizer) -> int:
        """Bytes of the row optimizer's float32 state."""
        if not (self.lookup and self.trained):
            return 0
        words = {"sgd": 0, "rowwise_adagrad": 1, "rowwise_rmsprop_ar": 2}
        per_row = words.get(optimizer, self.train_columns * (2 if optimizer == "adam" else 1))
        return 4 * self.rows * per_row


def vector_footprint(
    name: str, role: Role, cells: int, *, itemsize: int = 4, served: bool = False
) -> TensorFootprint:
    """A vector beside the rows, which training holds: a count, scores, thresholds.

    Args:
        name: the table that it belongs to, and its part in it.
        role: what it is for.
        cells: its length.
        itemsize: bytes of an element.
        served: whether the serving form holds it, too.
    """
    return TensorFootprint(
        name=name,
        role=role,
        rows=cells,
        columns=1,
        itemsize=itemsize,
        train_columns=1,
        lookup=False,
        served=served,
    )


@dataclass(frozen=True)
class Footprint:
    """Bytes of a group of tables: the sum of its tensors."""

    tensors: tuple[TensorFootprint, ...] = ()

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.tensors + other.tensors)

    @property
    def serve_bytes(self) -> int:
        """Bytes on disk in the serving form."""
        return sum(tensor.serve_bytes for tensor in self.tensors)

    @property
    def train_weight_bytes(self) -> int:
        """Bytes of the trained tensors, padding included."""
        return sum(tensor.train_weight_bytes for tensor in self.tensors)

    def optimizer_bytes(self, optimizer: RowOptimizer) -> int:
        """Bytes of the row optimizer's state."""
        return sum(tensor.optimizer_bytes(optimizer) for tensor in self.tensors)

    def train_bytes(self, optimizer: RowOptimizer = "rowwise_adagrad") -> int:
        """Bytes that training keeps: weights, padding and the row optimizer's state."""
        return self.train_weight_bytes + self.optimizer_bytes(optimizer)


def footprint_of(tables: Iterable[PhysicalTable], *, served: bool = True) -> Footprint:
    """The footprint of physical tables alone.

    Args:
        tables: the physical tables.
        served: whether the serving form holds them as they are.
    """
    return Footprint(
        tuple(
            TensorFootprint(
                name=table.name,
                role="codebook" if table.is_codebook else "weights",
                rows=table.num_embeddings,
                columns=table.embedding_dim,
                itemsize=table.data_type_bytes,
                train_columns=padded_dim(table.embedding_dim),
                served=served,
                served_row_bytes=None
                if table.row_type is None
                else row_bytes(table.embedding_dim, table.row_type),
            )
            for table in tables
        )
    )


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the given tensors' elements: what a safetensors file holds beside its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
