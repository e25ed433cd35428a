"""How far compressed tables are from the full ones: all rows, and the neighbours of a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.layers.block_work import RowBlock, Work, row_blocks
from embcomp.layers.row_sources import RowSource
from embcomp.layers.spread_rows import spread_ids
from embcomp.tables.specs import TableSpec

NEIGHBOURS = 10
_QUERIES = 64
_AMONG = 1 << 13
_SINGLE = 1e-12  # a row so long has squares that float32 can add up

LookUp = Callable[[str, Tensor], Tensor]
"""Embeddings (N, embedding_dim) of (N,) ids of the table of that name."""


@dataclass(frozen=True, kw_only=True)
class TableError:
    """What compression has cost a table.

    Attributes:
        error: root of the squared error's share of the rows' squares, by how often ids are looked
            up, or over all ids alike where nobody counted: 0 is exact, 1 as bad as zeros.
        worst_row: the id whose embedding has moved farthest.
        worst_error: how far.
        recall: share of the 10 nearest neighbours by cosine that are still among them, of 64 ids
            among at most 8,192, both spread evenly over the table.
    """

    error: float
    worst_row: int
    worst_error: float
    recall: float


def measure(
    table: TableSpec,
    rows: RowSource,
    look_up: LookUp,
    *,
    counts: Tensor | None,
    work: Work,
) -> TableError:
    """Compare all rows of a table.

    Args:
        table: the table.
        rows: (num_embeddings, embedding_dim) what they were.
        look_up: gives what they are now.
        counts: (num_embeddings,) how often each id is looked up.
        work: reads every block.
    """

    def compare(block: RowBlock) -> dict[str, Tensor]:
        own = rows.read(block.start, block.stop)
        now = look_up(table.name, torch.arange(block.start, block.stop)).cpu()
        squares = _squares(now - own)
        mass = torch.ones(len(block)).double()
        if counts is not None and bool(counts.any()):
            mass = counts[block.start : block.stop].double()
        worst = squares.argmax()
        return {
            "lost": (mass * squares).sum(),
            "whole": (mass * _squares(own)).sum(),
            "worst": squares[worst],
            "row": worst + block.start,
        }

    blocks = row_blocks(table.name, len(rows), rows.shape[1])
    lost = whole = worst = 0.0
    row = 0
    for found in work.map(f"errors-{table.name}", compare, blocks):
        lost += float(found["lost"])
        whole += float(found["whole"])
        if float(found["worst"]) > worst:
            worst, row = float(found["worst"]), int(found["row"])
    return TableError(
        error=(lost / whole) ** 0.5 if whole > 0 else 0.0,
        worst_row=row,
        worst_error=worst**0.5,
        recall=_recall(table, rows, look_up),
    )


def _squares(rows: Tensor) -> Tensor:
    """(n,) float64 squares of the rows' lengths."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if not _SINGLE < float(lengths.max()) < float("inf"):  # squares that float32 does not have
        lengths = torch.linalg.vector_norm(rows.double(), dim=1)
    return lengths.double().square()


def _recall(table: TableSpec, rows: RowSource, look_up: LookUp) -> float:
    ids = spread_ids(len(rows), _AMONG)
    if len(ids) < 2:
        return 1.0
    queries = spread_ids(len(ids), _QUERIES)
    before = _nearest(rows.take(ids).float(), queries)
    after = _nearest(look_up(table.name, ids).float().cpu(), queries)
    kept = (before.unsqueeze(2) == after.unsqueeze(1)).any(2)
    return float(kept.double().mean())


def _nearest(rows: Tensor, queries: Tensor) -> Tensor:
    """(Q, 10) the nearest other rows of some of them by cosine."""
    directions = torch.nn.functional.normalize(rows, dim=1)
    cosines = directions[queries] @ directions.T
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    return cosines.topk(min(NEIGHBOURS, len(rows) - 1), dim=1).indices


@dataclass(frozen=True, kw_only=True)
class CompressedTable:
    """A line of a report.

    Attributes:
        table: its name.
        place: where it was: the path of its collection in a model, or a tensor's name.
        method: the method that holds it now.
        rows: its ids.
        columns: its width.
        full_bytes: what it took.
        bytes: what it takes; what several tables share is shared out by their rows.
        error: how far it is from what it was.
    """

    table: str
    place: str
    method: str
    rows: int
    columns: int
    full_bytes: int
    bytes: int
    error: TableError


def table_lines(tables: Sequence[CompressedTable]) -> list[list[str]]:
    """The cells of a report, its headings first."""
    heads = ["table", "method", "rows", "dim", "bytes", "of full", "error", "worst row", "recall"]
    lines = [heads]
    for each in tables:
        error = each.error
        lines.append(
            [
                each.table,
                each.method,
                f"{each.rows:,}",
                str(each.columns),
                f"{each.bytes:,}",
                f"{each.bytes / each.full_bytes:.1%}",
                f"{error.error:.4f}",
                f"{error.worst_row} ({error.worst_error:.3g})",
                f"{error.recall:.2f}",
            ]
        )
    return lines


def bytes_by_table(
    sizes: Sequence[tuple[Sequence[TableSpec], int]],
) -> dict[str, int]:
    """Bytes of groups shared out to their tables by what they took before; sums stay exact.

    Args:
        sizes: the tables of each group, and its bytes.
    """
    found: dict[str, int] = {}
    for tables, size in sizes:
        left, whole = size, sum(table.full_bytes for table in tables)
        for table in tables:
            own = left * table.full_bytes // whole if whole else 0
            found[table.name] = own
            left, whole = left - own, whole - table.full_bytes
    return found
