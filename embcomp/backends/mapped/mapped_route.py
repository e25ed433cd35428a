"""The route of `mapped`: an id's packed codes name the rows that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.mapped.row_codes import (
    BLOCK,
    bits_for_rows,
    gather_codes,
    packed,
    stream_bytes,
)
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.fused_lookups import CodedRow, FusedRoutes
from embcomp.layers.hashing import hash_rows
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.routing import RepeatFeatures, common_count, per_value

Lines = Callable[[int, int], NDArray[np.integer]]
"""(stop - start, columns) rows of the ids from `start` to `stop`, -1 for none."""


@dataclass(frozen=True)
class HashedLines:
    """Rows that are hashes of (salt, id): `Lines`.

    Args:
        salts: of each column.
        rows: how many rows a column names; one number for all, or one for each.
    """

    salts: Sequence[int]
    rows: Sequence[int]

    def __call__(self, start: int, stop: int) -> NDArray[np.integer]:
        """The rows of a range of ids."""
        ids = torch.arange(start, stop, device="cpu")[:, None]
        own = torch.tensor(self.salts, device="cpu"), torch.tensor(self.rows, device="cpu")
        found: NDArray[np.integer] = hash_rows(ids, *own).numpy()
        return found


@dataclass(frozen=True, kw_only=True)
class MappedTable:
    """How the map of a table is stored.

    Args:
        name: the table.
        num_ids: its ids.
        rows: for each column, how many rows it names.
        firsts: for each column, where its rows begin in the physical table.
        skips: whether an id may have no row under a column; a code more stands for that.
        num_features: features that are looked up in the table.
        lines: what fills the codes where nobody has.
    """

    name: str
    num_ids: int
    rows: tuple[int, ...]
    firsts: tuple[int, ...]
    skips: bool
    num_features: int
    lines: Lines

    @property
    def bits(self) -> int:
        """Of a code, as many as the longest column needs."""
        return bits_for_rows(max(self.rows) + self.skips)

    @property
    def stored_bytes(self) -> int:
        """Of the codes, which stand id by id, those of an id together."""
        return stream_bytes(self.num_ids * len(self.rows), self.bits)


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column of a table's map as a look-up reads it."""

    byte: int  # where the table's codes begin
    place: int  # of the column among the codes of an id
    step: int  # codes of an id
    bits: int
    none: int  # the code that stands for no row; -1 where there is none
    first: int


_ABSENT = _Column(byte=0, place=0, step=0, bits=0, none=0, first=0)
"""Where a table has fewer columns than another: its code is 0, which stands for no row."""


def _lookups_of(
    tables: Sequence[MappedTable], *, side_by_side: bool
) -> tuple[list[list[_Column]], list[int]]:
    """The columns that each look-up reads, and the position of its feature."""
    lookups: list[list[_Column]] = []
    sources: list[int] = []
    byte = source = 0
    for table in tables:
        columns = [
            _Column(
                byte=byte,
                place=column,
                step=len(table.rows),
                bits=table.bits,
                none=rows if table.skips else -1,
                first=first,
            )
            for column, (rows, first) in enumerate(zip(table.rows, table.firsts))
        ]
        for _ in range(table.num_features):
            own = [[column] for column in columns] if side_by_side else [columns]
            lookups += own
            sources += [source] * len(own)
            source += 1
        byte += table.stored_bytes
    return lookups, sources


class MappedRoute(LearnedBuffers):
    """Looks up the rows of ids in packed codes.

    Attributes:
        codes: (bytes,) uint8 the maps of all tables, id by id.

    Args:
        keys: names of the look-ups, feature after feature.
        tables: in the order of the buffers.
        check: refuses ids that are out of range.
        side_by_side: whether each column is a look-up of its own; else a look-up has all rows of an id.
    """

    codes: Tensor

    def __init__(
        self,
        keys: Sequence[str],
        tables: Sequence[MappedTable],
        check: nn.Module,
        *,
        side_by_side: bool,
    ) -> None:
        super().__init__()
        self.check = check
        self._keys, self._tables = list(keys), list(tables)
        lookups, sources = _lookups_of(tables, side_by_side=side_by_side)
        self._lookups = lookups
        self._width = max(len(columns) for columns in lookups)
        self._widest = max(column.bits for columns in lookups for column in columns)
        self.copies = RepeatFeatures(self._keys, sources)
        filled = [each + [_ABSENT] * (self._width - len(each)) for each in lookups]
        flat = [column for each in filled for column in each]
        self._constants = Constant.stacked(
            Constant([8 * c.byte + c.place * c.bits for c in flat]),
            Constant([c.step * c.bits for c in flat]),
            Constant([(1 << c.bits) - 1 for c in flat]),
            Constant([c.none for c in flat]),
            Constant([c.first for c in flat]),
        )
        self._skips = any(c.none >= 0 for each in filled for c in each)
        self.store_in_parts("codes", [(table.name, table.stored_bytes) for table in tables])
        self.register_buffer(
            "codes", torch.zeros(sum(table.stored_bytes for table in tables), dtype=torch.uint8)
        )

    @override
    def reset_buffers(self) -> None:
        filled = np.empty(self.codes.shape[0], dtype=np.uint8)
        byte = 0
        for table in self._tables:
            none, columns = np.array(table.rows), len(table.rows)
            for start in range(0, table.num_ids, BLOCK):
                lines = table.lines(start, min(start + BLOCK, table.num_ids))[:, :columns]
                stream = packed(np.where(lines < 0, none, lines).reshape(-1), table.bits)
                at = byte + stream_bytes(start * columns, table.bits)
                filled[at : at + len(stream)] = stream
            byte += table.stored_bytes
        self.codes.copy_(torch.from_numpy(filled))

    def fused_routes(self) -> FusedRoutes | None:
        """The row that a code names; not where an id may have none, for which there is no code there."""
        if any(column.none >= 0 for columns in self._lookups for column in columns):
            return None
        self.ensure_filled()
        limits = self.check.limits
        assert isinstance(limits, list)
        by_key = {
            key: [self._coded(column) for column in columns]
            for key, columns in zip(self._keys, self._lookups)
        }
        return FusedRoutes(by_key=by_key, limits=limits)

    def _coded(self, column: _Column) -> CodedRow:
        return CodedRow(
            codes=self.codes[column.byte :],
            bits=column.bits,
            step=column.step,
            start=column.place,
            first=column.first,
        )

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        copies = self.copies(self.check(features))
        return widened(copies, self._keys, self.coded_rows(copies), self._width)

    def coded_rows(self, copies: KeyedJaggedTensor) -> Tensor:
        """The rows that codes name, -1 for none.

        Args:
            copies: the ids of each look-up.

        Returns:
            int64 (look-ups, count, columns) where all have equally many, else (N, columns).
        """
        self.ensure_filled()
        ids = copies.values().to(torch.int64)
        own = self._constants.on(ids.device).view(5, len(self._keys), self._width)
        count = common_count(copies)
        if count is None:
            starts, steps, masks, none, firsts = per_value(own.mT, copies).mT
        else:
            ids = ids.view(len(self._keys), count)
            starts, steps, masks, none, firsts = own.unsqueeze(2)
        codes = gather_codes(self.codes, ids.unsqueeze(-1) * steps + starts, masks, self._widest)
        rows = codes + firsts
        return torch.where(codes == none, -1, rows) if self._skips else rows


def widened(
    features: KeyedJaggedTensor, keys: list[str], rows: Tensor, width: int
) -> KeyedJaggedTensor:
    """The same bags of so many rows in the place of each id, of any shape."""
    weights = features.weights_or_none()
    return KeyedJaggedTensor(
        keys=keys,
        values=rows.reshape(-1),
        weights=None if weights is None else weights.repeat_interleave(width),
        lengths=features.lengths() * width,
        stride=features.stride(),
        length_per_key=[width * length for length in features.length_per_key()],
    )
