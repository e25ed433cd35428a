"""Learnt buffers as long as a vocabulary, whole on every rank or dealt out in chunks.

A table's part of such a buffer is sharded like the rows of a table that is split row-wise: every rank of a
group holds one chunk of consecutive ids, all chunks of one length. A state dict has it as a ShardedTensor of
the same name and shape, so that torch.distributed.checkpoint deals it out anew to any number of ranks, or
puts it together where nothing is sharded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from typing_extensions import override

from embcomp.errors import CheckpointError, ConfigError
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.named_parts import Long, part_name
from embcomp.layers.row_exchange import RowExchange


@dataclass(frozen=True, kw_only=True)
class HeldPart:
    """What a rank holds of a table's part of a buffer.

    Attributes:
        table: its name.
        size: rows of the whole part.
        chunk: rows that each rank has room for.
        start: where they begin in the rank's buffer.
        is_sharded: whether each rank holds another chunk, rather than all of it.
        rank: of the holder.
    """

    table: str
    size: int
    chunk: int
    start: int
    is_sharded: bool
    rank: int

    @property
    def first(self) -> int:
        """The first row of the part that is in this chunk; its end where none is."""
        return min(self.rank * self.chunk, self.size) if self.is_sharded else 0

    @property
    def rows(self) -> slice:
        """The rows of the part that are in this chunk."""
        return slice(self.first, min(self.first + self.chunk, self.size))

    @property
    def place(self) -> slice:
        """Where these rows are in the rank's buffer."""
        return slice(self.start, self.start + self.rows.stop - self.rows.start)

    def on_rank(self, rank: int) -> HeldPart:
        """The same on another rank."""
        return replace(self, rank=rank)


class ShardableBuffers(LearnedBuffers):
    """Learnt buffers that ranks may hold between them.

    A subclass names the parts of its buffers (`store_by_table`), fills only what is held here
    (`held_parts`), and asks `exchange`, where there is one, for what is not.

    Attributes:
        exchange: asks the ranks that hold the rest; None while everything is here.
    """

    exchange: RowExchange | None = None

    def __init__(self) -> None:
        super().__init__()
        self._grains: dict[str, list[int]] = {}
        self._sharded: frozenset[str] = frozenset()

    def store_by_table(
        self, tensor: str, parts: Sequence[tuple[str, int]], grains: Sequence[int] | None = None
    ) -> None:
        """Say what a buffer is made of, table after table.

        Args:
            tensor: its name.
            parts: names of tables, and rows of the buffer.
            grains: for each table, the rows of which a chunk holds a multiple; 1 by default.
        """
        self.store_in_parts(tensor, parts)
        each = zip(parts, grains or [1] * len(parts), strict=True)
        self._grains[tensor] = [grain for (_, size), grain in each if size]

    def held_parts(self, tensor: str) -> list[HeldPart]:
        """What is here of each table's part of a buffer."""
        ranks = 1 if self.exchange is None else self.exchange.ranks
        rank = 0 if self.exchange is None else self.exchange.rank
        return self._laid_out(tensor, self._sharded, ranks, rank)

    def _laid_out(
        self, tensor: str, sharded: Collection[str], ranks: int, rank: int
    ) -> list[HeldPart]:
        parts = list(zip(self._parts[tensor], self._grains[tensor], strict=True))
        chunks = [
            -(-size // (ranks * grain)) * grain if table in sharded else size
            for (table, size), grain in parts
        ]
        return [
            HeldPart(
                table=table,
                size=size,
                chunk=chunk,
                start=start,
                is_sharded=table in sharded,
                rank=rank,
            )
            for ((table, size), _), chunk, start in zip(
                parts, chunks, accumulate(chunks, initial=0)
            )
        ]

    def larger_than(self, size: int) -> list[str]:
        """The tables of whose parts together take more bytes."""
        totals: dict[str, int] = {}
        for tensor in self._grains:
            for table, rows in self._parts[tensor]:
                totals[table] = totals.get(table, 0) + rows * self._row_bytes(tensor)
        return [table for table, total in totals.items() if total > size]

    def saved_bytes(self, ranks: int, above: int) -> int:
        """By how much less each rank holds once tables are sharded: see `shard`."""
        sharded = self.larger_than(above)
        saved = 0
        for tensor in self._grains:
            parts = self._laid_out(tensor, sharded, ranks, 0)
            saved += sum(part.size - part.chunk for part in parts) * self._row_bytes(tensor)
        return saved

    def sharded_bytes(self, ranks: int, above: int) -> int:
        """Bytes of each rank's chunks."""
        sharded = self.larger_than(above)
        return sum(
            part.chunk * self._row_bytes(tensor)
            for tensor in self._grains
            for part in self._laid_out(tensor, sharded, ranks, 0)
            if part.is_sharded
        )

    def _row_bytes(self, tensor: str) -> int:
        buffer = self._buffer(tensor)
        return torch.Size(buffer.shape[1:]).numel() * buffer.itemsize

    def _buffer(self, tensor: str) -> Tensor:
        found = self._buffers[tensor]
        assert found is not None
        return found

    @torch.no_grad()
    def shard(self, group: dist.ProcessGroup, above: int) -> list[str]:
        """Keep this rank's chunks alone of tables whose parts take more bytes; all ranks call it.

        Args:
            group: the ranks.
            above: bytes up to which a table's parts stay on every rank.

        Returns:
            The tables that are sharded.

        Raises:
            ConfigError: for buffers that are sharded already.
        """
        if self.exchange is not None:
            raise ConfigError(
                "expected codes that are whole on every rank; these are sharded already, and stay as "
                "they are"
            )
        tables = self.larger_than(above)
        exchange = RowExchange(group)
        if exchange.ranks == 1 or not tables:
            return []
        self.exchange, self._sharded = exchange, frozenset(tables)
        for tensor in self._grains:
            whole, parts = self._buffer(tensor), self.held_parts(tensor)
            own = whole.new_zeros(sum(part.chunk for part in parts), *whole.shape[1:])
            begins = accumulate((part.size for part in parts), initial=0)
            if not whole.is_meta:
                for part, begin in zip(parts, begins):
                    own[part.place] = whole[begin + part.rows.start : begin + part.rows.stop]
            self._buffers[tensor] = own
        self.places_changed()
        return tables

    def places_changed(self) -> None:
        """Called when rows have come to stand elsewhere in the buffers."""
        raise NotImplementedError

    @override
    def parts_of(self, tensor: str, whole: Long) -> dict[str, Long]:
        if self.exchange is None or tensor not in self._grains:
            return super().parts_of(tensor, whole)
        assert isinstance(whole, Tensor), "what is sharded is in memory"
        return {
            part_name(tensor, part.table): cast(Long, self._as_stored(part, whole))
            for part in self.held_parts(tensor)
        }

    def _as_stored(self, part: HeldPart, own: Tensor) -> Tensor:
        """A part as a state dict has it: a view of what is here."""
        if not part.is_sharded:
            return own[part.place]
        assert self.exchange is not None
        group, rank = self.exchange.group, self.exchange.rank
        shards = []
        for each in range(self.exchange.ranks):
            rows = part.on_rank(each).rows
            if rows.start < rows.stop:
                device = _device_of(own, each == rank, each)
                metadata = ShardMetadata(
                    shard_offsets=[rows.start, *(0 for _ in own.shape[1:])],
                    shard_sizes=[rows.stop - rows.start, *own.shape[1:]],
                    placement=f"rank:{dist.get_global_rank(group, each)}/{device}",
                )
                shards.append((each, metadata))
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(own[part.place], metadata) for each, metadata in shards if each == rank],
            ShardedTensorMetadata(
                shards_metadata=[metadata for _, metadata in shards],
                size=torch.Size([part.size, *own.shape[1:]]),
                tensor_properties=TensorProperties(dtype=own.dtype),
            ),
            process_group=group,
        )

    @override
    def _joined(
        self,
        tensor: str,
        own: dict[str, Tensor],
        prefix: str,
        missing: list[str],
        error_msgs: list[str],
    ) -> Tensor | None:
        if self.exchange is None or tensor not in self._grains:
            for name in self.names_of(tensor):
                if isinstance(own.get(prefix + name), ShardedTensor):
                    raise _other_ranks(prefix + name)
            return super()._joined(tensor, own, prefix, missing, error_msgs)
        here = self._buffer(tensor).detach()
        for part in self.held_parts(tensor):
            name = prefix + part_name(tensor, part.table)
            found = own.pop(name, None)
            wanted = (part.size, *here.shape[1:])
            if found is None:
                missing.append(name)
            elif _shape(found) != wanted:
                error_msgs.append(
                    f"size mismatch for {name}: copying a param with shape {_shape(found)} from "
                    f"checkpoint, the shape in current model is {wanted}."
                )
            elif not here.is_meta:
                _take(here[part.place], part, found, name)
        return None  # what came is in its place


def _take(into: Tensor, part: HeldPart, found: Tensor, name: str) -> None:
    """Copy this rank's rows of a part from a state dict's tensor, whole or sharded as they are here."""
    if not isinstance(found, ShardedTensor):
        into.copy_(found[part.rows])
        return
    shards = found.local_shards()
    held = [(s.metadata.shard_offsets[0], s.metadata.shard_sizes[0]) for s in shards]
    wanted = [(part.first, len(into))] if len(into) else []
    if not part.is_sharded or held != wanted:
        raise _other_ranks(name)
    for shard in shards:
        if shard.tensor.data_ptr() != into.data_ptr():
            into.copy_(shard.tensor)


def _other_ranks(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} came sharded over ranks in another way than it is held here; load the checkpoint with "
        "torch.distributed.checkpoint into this model's own state dict, which deals it out anew"
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if isinstance(tensor, ShardedTensor):
        return tuple(tensor.metadata().size)  # its size() warns that the class is old
    return tuple(tensor.shape)


def _device_of(own: Tensor, here: bool, rank: int) -> str:
    """Where a rank's chunk is, as TorchRec writes it for its shards."""
    if own.device.type != "cuda" or here:
        return str(own.device)
    return f"cuda:{rank % torch.cuda.device_count()}"


def shardable(module: torch.nn.Module) -> Iterator[ShardableBuffers]:
    """The buffers inside a module that ranks may hold between them."""
    for part in module.modules():
        if isinstance(part, ShardableBuffers):
            yield part
