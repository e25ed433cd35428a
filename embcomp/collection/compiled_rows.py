"""Look-ups of many tables in one compiled call, forward and backward, on the CPU.

An unsharded collection of TorchRec's calls torch for each key, which for narrow rows and many keys takes far
longer than reading them. The sums are the same to the bit; rows that are not float32, other devices, and what
torch traces or compiles are left to torch, as is everything where there is no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from embcomp.io.compiled_library import optional_library
from embcomp.layers.host_values import reads_by_address

_KEY = np.dtype(
    [(name, "<u8") for name in ("rows", "ids", "offsets", "weights", "out")]
    + [(name, "<i8") for name in ("num_rows", "row_stride", "width", "out_stride", "bags", "size")]
)


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled code, built where it is not there yet; None where it cannot be."""
    pointer, integer, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found = optional_library(
        "embcomp.collection",
        "rows.cpp",
        {
            "embcomp_read_rows": (short, [pointer, integer, short]),
            "embcomp_add_rows": (None, [pointer, pointer, integer, short]),
            "embcomp_rows_key_bytes": (integer, []),
        },
        flags=["-ffp-contract=off"],
    )
    assert found is None or found.embcomp_rows_key_bytes() == _KEY.itemsize
    return found


def are_readable(tables: Sequence[Tensor], *others: Tensor | None) -> bool:
    """Whether compiled code can read rows of these tensors, with these beside them, just now.

    Args:
        tables: (rows, columns) each.
        others: ids, offsets, weights.
    """
    return (
        reads_by_address(*tables, *others)
        and all(each.dtype == torch.float32 and each.stride()[1:] == (1,) for each in tables)
        and library() is not None
    )


@dataclass(frozen=True, kw_only=True)
class KeyRead:
    """Where a key's rows are from, and where its sums go.

    Args:
        table: its place among the tables.
        first: the first of the table's columns that is used.
        width: how many are.
        output: the place among the outputs of the one that it is part of.
        into: the output's first column that it takes.
    """

    table: int
    first: int = 0
    width: int
    output: int = 0
    into: int = 0


@dataclass(frozen=True, kw_only=True)
class ReadBags:
    """The values of a batch by key and bag.

    Args:
        counts: values of each key; keys come one after another.
        bags: bags of each key; of an output's keys all alike.
        size: values of each bag, where all of a key's have equally many; else 0.
        offsets: (sum of bags + 1,) int64 where each bag begins, where `size` is 0.
        ids: (sum of counts,) int64 the row of each value; None where value n of a key has row n.
        weights: (sum of counts,) float32.
    """

    counts: Sequence[int]
    bags: Sequence[int]
    size: int = 0
    offsets: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None


class RowReads:
    """Look-ups of some keys.

    Args:
        keys: the look-ups, in order.
        widths: columns of each output.
    """

    def __init__(self, keys: Sequence[KeyRead], widths: Sequence[int]) -> None:
        self._tables = np.array([key.table for key in keys], dtype=np.int64)
        self._firsts = 4 * np.array([key.first for key in keys], dtype=np.int64)
        self._outputs = np.array([key.output for key in keys], dtype=np.int64)
        self._intos = 4 * np.array([key.into for key in keys], dtype=np.int64)
        self._widths = np.array([key.width for key in keys], dtype=np.int64)
        self._columns = list(widths)
        self._by_table = np.argsort(self._tables, kind="stable")
        self._used = np.zeros(max(self._tables, default=-1) + 1, dtype=np.int64)
        np.add.at(self._used, self._tables, 1)
        firsts = {int(output): n for n, output in reversed(list(enumerate(self._outputs)))}
        self._sizing = [firsts[output] for output in range(len(widths))]

    def sums(self, tables: Sequence[Tensor], bags: ReadBags) -> list[Tensor]:
        """The rows of each bag, added up, weighted where values are: for each output, (bags, columns).

        Args:
            tables: float32, as `are_readable` allows; gradients reach them.
            bags: the batch.

        Raises:
            IndexError: an id is that of no row.
        """
        if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
            return list(_Sums.apply(self, bags, *tables))
        return self.read(tables, bags)

    def read(self, tables: Sequence[Tensor], bags: ReadBags) -> list[Tensor]:
        """`sums` without a gradient."""
        found = [
            torch.empty(bags.bags[key], width) for key, width in zip(self._sizing, self._columns)
        ]
        keys = self._described(tables, found, bags)
        built = library()
        assert built is not None
        if not built.embcomp_read_rows(_address(keys), len(keys), torch.get_num_threads()):
            raise IndexError("an id is that of no row")
        return found

    def add(
        self, shapes: Sequence[torch.Size], grads: Sequence[Tensor], bags: ReadBags
    ) -> list[Tensor]:
        """The gradients of tables of these shapes for gradients of the outputs."""
        grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        whole = bags.ids is None and self._covers(shapes, bags)
        make = torch.empty if whole else torch.zeros
        found = [make(shape) for shape in shapes]
        keys = self._described(found, grads, bags)[self._by_table]
        starts = np.concatenate(([0], np.cumsum(self._used)))
        built = library()
        assert built is not None
        built.embcomp_add_rows(
            _address(keys), _address(starts), len(self._used), torch.get_num_threads()
        )
        return found

    def _covers(self, shapes: Sequence[torch.Size], bags: ReadBags) -> bool:
        """Whether every number of tables whose rows are values' own is some key's."""
        read = np.zeros(len(shapes), dtype=np.int64)
        np.add.at(read, self._tables, np.array(bags.counts, dtype=np.int64) * self._widths)
        return [int(n) for n in read] == [shape.numel() for shape in shapes]

    def _described(
        self, tables: Sequence[Tensor], outputs: Sequence[Tensor], bags: ReadBags
    ) -> np.ndarray:
        """The keys as the compiled code reads them."""
        keys = np.zeros(len(self._tables), dtype=_KEY)
        counts = np.array(bags.counts, dtype=np.int64)
        values = 8 * (np.cumsum(counts) - counts)
        keys["bags"], keys["width"], keys["size"] = bags.bags, self._widths, bags.size
        starts = np.array([table.data_ptr() for table in tables], dtype=np.int64)
        keys["rows"] = starts[self._tables] + self._firsts
        keys["num_rows"] = np.array([len(table) for table in tables])[self._tables]
        keys["row_stride"] = np.array([table.stride(0) for table in tables])[self._tables]
        ends = np.array([output.data_ptr() for output in outputs], dtype=np.int64)
        keys["out"] = ends[self._outputs] + self._intos
        keys["out_stride"] = np.array([out.stride(0) for out in outputs])[self._outputs]
        if bags.ids is not None:
            keys["ids"] = bags.ids.data_ptr() + values
        if bags.weights is not None:
            keys["weights"] = bags.weights.data_ptr() + values // 2
        if bags.offsets is not None:
            number = keys["bags"]
            keys["offsets"] = bags.offsets.data_ptr() + 8 * (np.cumsum(number) - number)
        return keys


class _Sums(torch.autograd.Function):
    """Rows added up in bags."""

    @staticmethod
    @override
    def forward(ctx: Any, reads: RowReads, bags: ReadBags, *tables: Tensor) -> Any:
        ctx.reads, ctx.shapes = reads, [table.shape for table in tables]
        _save(ctx, bags)
        return tuple(reads.read(tables, bags))

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = _Grads.apply(ctx.reads, _saved(ctx), ctx.shapes, *grads)
        wanted = ctx.needs_input_grad[2:]
        return None, None, *[own if wants else None for own, wants in zip(found, wanted)]


class _Grads(torch.autograd.Function):
    """Gradients of bags added to those of rows: what `_Sums` is the gradient of."""

    @staticmethod
    @override
    def forward(
        ctx: Any, reads: RowReads, bags: ReadBags, shapes: Sequence[torch.Size], *grads: Tensor
    ) -> Any:
        ctx.reads = reads
        _save(ctx, bags)
        return tuple(reads.add(shapes, grads, bags))

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tables = [grad.contiguous() for grad in grads]
        return None, None, None, *_Sums.apply(ctx.reads, _saved(ctx), *tables)


def _save(ctx: Any, bags: ReadBags) -> None:
    """Keep a batch for the gradient, which notices when someone writes to it meanwhile."""
    ctx.save_for_backward(bags.offsets, bags.ids, bags.weights)
    ctx.bags = replace(bags, offsets=None, ids=None, weights=None)


def _saved(ctx: Any) -> ReadBags:
    offsets, ids, weights = ctx.saved_tensors
    return replace(ctx.bags, offsets=offsets, ids=ids, weights=weights)


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)
