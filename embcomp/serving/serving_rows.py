"""Physical rows of a serving module: stored tables in place of a trained TorchRec collection.

`kernel_rows` hands them to FBGEMM's inference kernel, one call for all tables of all types.
`TorchRows` reads the same bytes with plain torch operations, on any device and in exported
programs. Both take what `route` makes and return what `combine` wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import Self

from embcomp.collection.groups import Group
from embcomp.errors import EmbcompError
from embcomp.serving.artefact_tensors import ArtefactTensor
from embcomp.tables.row_types import RowType, padded_width, unpack


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """A physical table as an artefact holds it.

    Args:
        name: the physical table's.
        dim: weights of a row, without padding.
        row_type: how rows are stored.
        rows: the stored rows, not read yet.
    """

    name: str
    dim: int
    row_type: RowType
    rows: ArtefactTensor


def lookups(groups: Sequence[Group]) -> dict[str, str]:
    """The physical look-ups of some methods in order, and the table of each."""
    owners = {key: t.name for g in groups for t in g.backend.physical_tables for key in t.keys}
    return {key: owners[key] for group in groups for key in group.backend.keys}


def kernel_rows(groups: Sequence[Group], tables: Mapping[str, StoredTable]) -> nn.Module:
    """Rows in FBGEMM's inference kernel for the CPU: one kernel, or one for each mapped file.

    Args:
        groups: the methods whose look-ups are made here.
        tables: their physical tables, by name.
    """
    owners = lookups(groups)
    by_file: dict[object, dict[str, StoredTable]] = {}
    for key, name in owners.items():
        rows = tables[name].rows
        by_file.setdefault(rows.stored.file if rows.mapped else None, {})[key] = tables[name]
    kernels = [KernelRows(own) for own in by_file.values()]
    return kernels[0] if len(kernels) == 1 else SeveralKernels(kernels)


class KernelRows(nn.Module):
    """Rows in one kernel of FBGEMM.

    Args:
        owners: the physical table of each look-up; mapped ones are in one file.
    """

    def __init__(self, owners: Mapping[str, StoredTable]) -> None:
        super().__init__()
        stored = list({table.name: table for table in owners.values()}.values())
        mapped = stored[0].rows.mapped
        if mapped:  # the kernel wants the tables of one piece of memory in their order there
            stored.sort(key=lambda table: table.rows.stored.start)
        place = {table.name: n for n, table in enumerate(stored)}
        owners = (
            dict(sorted(owners.items(), key=lambda own: place[own[1].name])) if mapped else owners
        )
        self._keys = list(owners)
        self._dims = [table.dim for table in owners.values()]
        widths = [padded_width(table.dim, table.row_type) for table in stored]
        self._widths = [widths[place[table.name]] for table in owners.values()]
        self.kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[
                (
                    table.name,
                    table.rows.shape[0],
                    width,
                    SparseType(table.row_type),
                    EmbeddingLocation.HOST,
                )
                for table, width in zip(stored, widths)
            ],
            feature_table_map=[place[table.name] for table in owners.values()],
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.FATAL,  # a damaged code must not read other memory
            output_dtype=SparseType.FP32,
            row_alignment=1,
            device=torch.device("cpu"),
        )
        if mapped:
            self._serve_from_file(stored)
        else:
            self.kernel.initialize_weights()
            memory = self.kernel.split_embedding_weights(split_scale_shifts=False)
            for (own, _), table in zip(memory, stored):
                table.rows.read_into(own)
        self._columns = self._kept_columns()

    def _serve_from_file(self, stored: Sequence[StoredTable]) -> None:
        """Point the kernel, which reads all tables from one piece of memory, at the mapped file."""
        places = [table.rows.file_bytes() for table in stored]
        self.kernel.weights_physical_offsets = [start for _, start in places]
        self.kernel.initialize_logical_weights_placements_and_offsets()
        self.kernel.weights_host = places[0][0]
        self.kernel.weight_initialized = True

    def _kept_columns(self) -> Tensor | None:
        if self._widths == self._dims:
            return None
        kept: list[int] = []
        start = 0
        for dim, width in zip(self._dims, self._widths):
            kept += range(start, start + dim)
            start += width
        return torch.tensor(kept)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Sum the rows of every bag, weighted where the bags are: (B, sum of dims)."""
        if features.keys() != self._keys:
            features = features.permute([features.keys().index(key) for key in self._keys])
        values = self.kernel(
            features.values().to(torch.int64),
            features.offsets().to(torch.int64),
            features.weights_or_none(),
        )
        if self._columns is not None:
            values = values.index_select(1, self._columns)
        return KeyedTensor(keys=self._keys, length_per_key=self._dims, values=values)

    @property
    def keys(self) -> list[str]:
        """The look-ups in the order of the output."""
        return self._keys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _refuse_to_move(fn)
        return self  # nor is there anything that another float type could change


class SeveralKernels(nn.Module):
    """Look-ups in several kernels.

    Args:
        kernels: them.
    """

    def __init__(self, kernels: Sequence[KernelRows]) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(kernels)
        self._keys = [kernel.keys for kernel in kernels]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Sum the rows of every bag, weighted where the bags are: (B, sum of dims)."""
        keys = features.keys()
        found = [
            kernel(features.permute([keys.index(key) for key in own]))
            for kernel, own in zip(self.kernels, self._keys)
        ]
        return KeyedTensor(
            keys=[key for part in found for key in part.keys()],
            length_per_key=[width for part in found for width in part.length_per_key()],
            values=torch.cat([part.values() for part in found], dim=1),
        )


class TorchRows(nn.Module):
    """Rows as plain tensors.

    Args:
        groups: the methods whose look-ups are made here.
        tables: their physical tables, by name.
    """

    def __init__(self, groups: Sequence[Group], tables: Mapping[str, StoredTable]) -> None:
        super().__init__()
        self._owners = lookups(groups)
        names = list(dict.fromkeys(self._owners.values()))
        self._formats = {name: (tables[name].dim, tables[name].row_type) for name in names}
        self._buffer = {name: f"stored_{n}" for n, name in enumerate(names)}
        for name in names:
            self.register_buffer(self._buffer[name], tables[name].rows.tensor())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `module.half()` must not change what is stored: rows are moved, never cast.
        device = fn(torch.zeros(0)).device
        for name, stored in self._buffers.items():
            assert stored is not None
            self._buffers[name] = stored.to(device)
        return self

    @property
    def buffer_names(self) -> dict[str, str]:
        """The buffer that holds each physical table."""
        return dict(self._buffer)

    def rows_of(self, table: str, ids: Tensor) -> Tensor:
        """(N, dim) float32 rows of a physical table for (N,) ids."""
        stored = self._buffers[self._buffer[table]]
        assert stored is not None
        return unpack(stored.index_select(0, ids), *self._formats[table])

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Sum the rows of every bag, weighted where the bags are: (B, sum of dims)."""
        batch = features.stride()
        found: dict[str, Tensor] = {}
        for key, jagged in features.to_dict().items():
            rows = self.rows_of(self._owners[key], jagged.values().to(torch.int64))
            weights = jagged.weights_or_none()
            if weights is not None:
                rows = rows * weights.unsqueeze(1)
            bags = torch.arange(batch, device=rows.device).repeat_interleave(
                jagged.lengths().to(torch.int64), output_size=len(rows)
            )
            found[key] = rows.new_zeros(batch, rows.shape[1]).index_add(0, bags, rows)
        return KeyedTensor(
            keys=list(self._owners),
            length_per_key=[self._formats[name][0] for name in self._owners.values()],
            values=torch.cat([found[key] for key in self._owners], dim=1),
        )

    def rectangle(
        self, keys: Sequence[str], ids: Tensor, *, skips: bool = False
    ) -> dict[str, Tensor]:
        """Rows of look-ups that all have as many ids, in bags of one size.

        Args:
            keys: the look-ups.
            ids: (look-ups, bags, bag size) int64.
            skips: whether negative ids stand for zeros.

        Returns:
            For each look-up, (bags, dim) sums.
        """
        found: dict[str, Tensor] = {}
        for table in dict.fromkeys(self._owners[key] for key in keys):
            own = [n for n, key in enumerate(keys) if self._owners[key] == table]
            picked = ids if len(own) == len(keys) else torch.stack([ids[n] for n in own])
            flat = picked.reshape(-1)
            rows = self.rows_of(table, flat.clamp(min=0) if skips else flat)
            if skips:
                rows = torch.where(flat.unsqueeze(1) >= 0, rows, 0.0)
            bags = rows.view(*picked.shape, rows.shape[1])
            summed = bags.squeeze(2) if picked.shape[2] == 1 else bags.sum(dim=2)
            found |= {keys[n]: part for n, part in zip(own, summed)}
        return found


@dataclass(frozen=True, kw_only=True)
class HeldTable:
    """A physical table in memory, or mapped there.

    Args:
        dim: weights of a row, without padding.
        row_type: how rows are stored.
        rows: the stored rows.
    """

    dim: int
    row_type: RowType
    rows: Tensor


class FusedRows(TorchRows):
    """Rows that compiled code reads where they lie, and torch where that cannot."""

    def tables(self) -> dict[str, HeldTable]:
        """The physical tables by name."""
        found = {}
        for name, (dim, row_type) in self._formats.items():
            rows = self._buffers[self._buffer[name]]
            assert rows is not None
            found[name] = HeldTable(dim=dim, row_type=row_type, rows=rows)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _refuse_to_move(fn)
        return self


def _refuse_to_move(fn: Callable[[Tensor], Tensor]) -> None:
    moved = fn(torch.zeros(0))
    if moved.device.type != "cpu":
        raise EmbcompError(
            f"an artefact that was loaded for the CPU cannot be moved to {moved.device}; "
            f'load it there: embcomp.load(path, device="{moved.device}")'
        )
