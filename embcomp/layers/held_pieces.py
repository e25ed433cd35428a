"""The rows of a physical table where they lie, to copy some of them onto others, or clear them, between two steps.

Fused optimizers own the rows of a sharded model: what writes to them writes into the shards of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from embcomp.errors import ConfigError
from embcomp.layers.host_values import reads_wait


def local_pieces(weight: Tensor | ShardedTensor) -> list[tuple[Tensor, list[int]]]:
    """The parts of a table on this rank, with the row and column where each begins."""
    if isinstance(weight, ShardedTensor):
        return [(s.tensor, s.metadata.shard_offsets) for s in weight.local_shards()]
    return [(weight, [0, 0])]


@dataclass(frozen=True, kw_only=True)
class TablePieces:
    """A physical table as it lies on this rank.

    Args:
        pieces: parts of it, with the row and column where each begins.
        size: rows and columns of the whole.
        group: the ranks that have the rest; None where all of it is here.
    """

    pieces: Sequence[tuple[Tensor, Sequence[int]]]
    size: tuple[int, int]
    group: dist.ProcessGroup | None

    @torch.no_grad()
    def copy_rows(self, sources: Tensor, targets: Tensor, chosen: Tensor) -> None:
        """Copy rows onto others; all ranks that share the table call it with the same values.

        Args:
            sources: (N,) int64 rows to read.
            targets: (N,) int64 rows to write; no source is among those chosen, and what comes twice has
                the same source.
            chosen: (N,) bool which copies to make.
        """
        if self.group is None:
            ((weight, _),) = self.pieces
            if not reads_wait(weight.device):
                sources, targets = sources[chosen], targets[chosen]
                weight[targets] = weight[sources]
            else:  # what is not chosen writes what is there
                rows = torch.where(chosen.unsqueeze(1), weight[sources], weight[targets])
                weight[targets] = rows
            return
        sources, targets = sources[chosen], targets[chosen]
        if not sources.shape[0]:
            return
        values = torch.zeros(sources.shape[0], self.size[1], device=sources.device)
        for piece, (row, column) in self.pieces:
            inside = (sources >= row) & (sources < row + piece.shape[0])
            found = piece[sources[inside] - row].to(values.dtype)
            values[inside, column : column + piece.shape[1]] = found
        dist.all_reduce(values, group=self.group)
        for piece, (row, column) in self.pieces:
            inside = (targets >= row) & (targets < row + piece.shape[0])
            own = values[inside, column : column + piece.shape[1]]
            piece[targets[inside] - row] = own.to(piece.dtype)

    @torch.no_grad()
    def clear_rows(self, targets: Tensor, chosen: Tensor) -> None:
        """Set rows to zero; all ranks that share the table call it with the same values.

        Args:
            targets: (N,) int64 rows, none of them twice.
            chosen: (N,) bool which of them to clear.
        """
        for piece, (row, _) in self.pieces:
            rows = piece.shape[0]
            inside = chosen & (targets >= row) & (targets < row + rows)
            clears = torch.zeros(rows + 1, dtype=torch.bool, device=piece.device)
            clears[torch.where(inside, targets - row, rows)] = True
            piece.masked_fill_(clears[:-1].unsqueeze(1), 0)


@contextmanager
def between_steps(device: torch.device) -> Iterator[None]:
    """Within it, a stream that runs ahead of training, as pipelines' do, writes what training reads.

    Args:
        device: where the rows are.
    """
    if device.type != "cuda":
        yield
        return
    ahead, training = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    ahead.wait_stream(training)
    yield
    training.wait_stream(ahead)


@runtime_checkable
class WritesRows(Protocol):
    """A route that writes to rows between two steps."""

    def write_rows(self, holder: nn.Module) -> None:
        """Write what the last step asks for; all ranks call it.

        Args:
            holder: the collection that holds the rows, sharded or not.
        """


class HeldPieces:
    """Finds the pieces of physical tables in what holds them.

    Those of a sharded collection are looked up once: the tensors stay as long as it does.
    """

    def __init__(self) -> None:
        self._known: dict[str, TablePieces] = {}
        self._of: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}, "_of": None}

    def find(self, holder: nn.Module, table: str, method: str) -> TablePieces:
        """A table's pieces.

        Args:
            holder: TorchRec's collection.
            table: the physical table.
            method: who wants to write, for errors.

        Raises:
            ConfigError: where rows lie behind a cache, past which nothing can be written.
        """
        if not isinstance(holder, ShardedEmbeddingBagCollection):
            weight = holder.embedding_bags[table].weight  # type: ignore[union-attr, index]
            assert isinstance(weight, Tensor)
            rows, columns = weight.shape
            return TablePieces(pieces=[(weight.detach(), (0, 0))], size=(rows, columns), group=None)
        if self._of is not holder:
            self._known, self._of = {}, holder
        if table not in self._known:
            self._known[table] = _sharded_pieces(holder, table, method)
        return self._known[table]


def _sharded_pieces(holder: ShardedEmbeddingBagCollection, table: str, method: str) -> TablePieces:
    kernel = holder.module_sharding_plan[table].compute_kernel
    if "cach" in kernel or "key_value" in kernel:
        raise ConfigError(
            f"{method}: rows of table {table!r} lie behind a cache ({kernel}), past which it cannot "
            "write; give the planner constraints that keep them in a device's own memory"
        )
    weight = holder.state_dict()[f"embedding_bags.{table}.weight"]
    if not isinstance(weight, ShardedTensor):
        rows, columns = weight.shape
        return TablePieces(pieces=[(weight.detach(), (0, 0))], size=(rows, columns), group=None)
    rows, columns = weight.metadata().size
    group = weight._process_group
    alone = dist.get_world_size(group) == 1 and len(weight.local_shards()) == 1
    return TablePieces(
        pieces=[(piece.detach(), offsets) for piece, offsets in local_pieces(weight)],
        size=(rows, columns),
        group=None if alone else group,
    )
