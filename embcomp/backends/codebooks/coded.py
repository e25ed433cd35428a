"""Codes and codewords: a row is made of the codewords that its packed codes name.

Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011. The codewords
are the physical table, so that TorchRec shards and trains them, while the codes stand in the route.
Codes that nobody has learnt are hashes of the ids, which makes it a compositional hash embedding.

It is the form in which vector quantisation (`lr2vq`, `pq`) is fine-tuned and served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.base import Backend, FollowedForm, FollowInputs
from embcomp.backends.codebooks.bit_packing import (
    gather_bits,
    pack_bits,
    pack_parts,
    packed_bytes,
)
from embcomp.backends.codebooks.clustering import Codebooks, Latents, encode
from embcomp.backends.codebooks.codewords_compiled import gather_codes, is_readable
from embcomp.backends.codebooks.followed_codes import followed_codes
from embcomp.backends.codebooks.subvectors import Decode, SubvectorLayout
from embcomp.backends.codebooks.vector_quantized import (
    VectorQuantized,
    code_bytes,
    mean_init_std,
    padded_codes,
)
from embcomp.backends.full import RangeCheck
from embcomp.backends.stages import Stage
from embcomp.io.constraints import Ge, Le
from embcomp.layers.block_work import RowBlock
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.fused_lookups import CodedRow, FusedRoutes
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.routing import RepeatFeatures, beside_ids, per_value, renamed
from embcomp.layers.row_exchange import RowPlaces
from embcomp.layers.row_sources import RowSource
from embcomp.layers.shardable_buffers import HeldPart, ShardableBuffers
from embcomp.tables.specs import TableSpec

FREEZE = Stage(
    name="codes",
    purpose="freeze the codes and train the codewords",
    epochs=1,
    learning_rate=0.01,
    keeps="best_or_start",
)
"""The last stage of methods that end in codes."""

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Coded(VectorQuantized):
    """Frozen codes into learnt codewords. Ids must lie in `[0, num_embeddings)`.

    Args:
        latent_dim: width of a codeword that a projection widens to `subvector_dim`; None stores
            codewords as they are used.
    """

    latent_dim: Annotated[int | None, Ge(1), Le(2**16)] = None

    name: ClassVar[str] = "coded"

    @property
    @override
    def stored_latent(self) -> int | None:
        return None if self.latent_dim is None else min(self.latent_dim, self.width)

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        layout = self.layout(tables)
        scales = None
        if self.scaled:
            means = [mean_init_std(layout.members(unit)) for unit in range(len(layout.units))]
            scales = [t.init_std / means[layout.unit_of(n)] for n, t in enumerate(tables)]
        decode = Decode(layout, latent_dim=self.stored_latent, scales=scales)
        return Backend(
            physical_tables=self.physical_tables(tables),
            keys=layout.keys,
            route=CodedRoute(layout, count=self.codewords, bits=self.bits, seed=self.seed),
            combine=decode,
        )

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        return FollowedForm(config=self, tensors={"route.codes": followed_codes(self, past)})


class CodedRoute(ShardableBuffers):
    """Looks up the codes of ids, one key for each sub-vector.

    Args:
        layout: the group's sub-vectors.
        count: codewords in a codebook.
        bits: of a code.
        seed: salts the codes that nobody has learnt.
        book_size: codewords from the first of a codebook to that of the next, `count` by default.
        checks: whether to refuse ids out of range, unless that has been done.
    """

    codes: Tensor

    def __init__(
        self,
        layout: SubvectorLayout,
        *,
        count: int,
        bits: int,
        seed: int,
        book_size: int | None = None,
        checks: bool = True,
    ) -> None:
        super().__init__()
        self._layout, self._count, self._bits, self._seed = layout, count, bits, seed
        self._keys = layout.keys
        self.check = RangeCheck(layout.tables) if checks else nn.Identity()
        sources: list[int] = []
        steps: list[int] = []
        offsets: list[int] = []
        source = 0
        for n, table in enumerate(layout.tables):
            positions = layout.positions(table)
            for _ in table.feature_names:
                sources += [source] * positions
                steps += [positions] * positions
                offsets += [place * (book_size or count) for place in layout.places(n)]
                source += 1
        self.copies = RepeatFeatures(self._keys, sources)
        self._sources, self._steps_of, self._offsets_of = sources, steps, offsets
        self._steps, self._offsets = Constant(steps), Constant(offsets)
        positions_of = [layout.positions(table) for table in layout.tables]
        sizes = [
            (table.name, code_bytes(table.num_embeddings * positions, bits))
            for table, positions in zip(layout.tables, positions_of)
        ]
        # Eight ids' codes end with a byte.
        self.store_by_table("codes", sizes, [positions * bits for positions in positions_of])
        packed = torch.zeros(sum(size for _, size in sizes), dtype=torch.uint8)
        self.register_buffer("codes", packed)
        self.places_changed()

    @override
    def places_changed(self) -> None:
        parts = self.held_parts("codes")
        firsts = [part.start * 8 // self._bits for part in parts]
        starts: list[int] = []
        owners: list[int] = []
        for n, (table, first) in enumerate(zip(self._layout.tables, firsts)):
            positions = range(self._layout.positions(table))
            owners += [n] * len(table.feature_names)
            starts += [first + position for _ in table.feature_names for position in positions]
        self._starts = Constant(starts)
        self._constants = Constant.stacked(self._steps, self._starts, self._offsets)
        of_keys = self._sources, starts, self._steps_of, self._offsets_of
        self._compiled = tuple(np.array(each, dtype=np.int64) for each in of_keys)
        if self.exchange is None:
            return
        steps = [self._layout.positions(table) for table in self._layout.tables]
        ids = [self._ids_in(part.chunk, step) for part, step in zip(parts, steps)]
        self._places = RowPlaces(
            self.exchange,
            chunks=[ids[n] if parts[n].is_sharded else 0 for n in owners],
            starts=[firsts[n] for n in owners],
            steps=[steps[n] for n in owners],
        )
        self._instances = Constant(range(len(owners)))
        self._positions = Constant([position for n in owners for position in range(steps[n])])

    def _ids_in(self, size: int, positions: int) -> int:
        """The ids whose codes are whole within so many bytes."""
        return size * 8 // (positions * self._bits)

    def fused_routes(self) -> FusedRoutes:
        """The codeword that a code names, for each sub-vector."""
        self.ensure_filled()
        cpu = torch.device("cpu")
        starts, steps, offsets = (
            each.on(cpu).tolist() for each in (self._starts, self._steps, self._offsets)
        )
        by_key = {
            key: [CodedRow(codes=self.codes, bits=self._bits, step=step, start=start, first=first)]
            for key, start, step, first in zip(self._keys, starts, steps, offsets)
        }
        return FusedRoutes(by_key=by_key, limits=RangeCheck(self._layout.tables).limits)

    def reset_buffers(self) -> None:
        """Codes that are hashes of (seed, table, position, id)."""
        for table, part in zip(self._layout.tables, self.held_parts("codes")):
            own = self.codes[part.place]
            own.copy_(pack_parts(self._hashes(table, part), self._bits, len(own) * 8 // self._bits))

    def _hashes(self, table: TableSpec, part: HeldPart) -> Iterator[Tensor]:
        """The codes of a table that are held here, and zeros to the end of their last byte."""
        count, positions = torch.tensor(self._count), self._layout.positions(table)
        salts = torch.tensor([table_salt(self._seed, table.name, p) for p in range(positions)])
        first = self._ids_in(part.first, positions)
        left = (part.rows.stop - part.rows.start) * 8 // self._bits
        for start in range(first, table.num_embeddings, _ROWS_AT_ONCE):
            ids = torch.arange(start, min(start + _ROWS_AT_ONCE, table.num_embeddings))
            codes = hash_rows(ids.unsqueeze(1), salts, count).view(-1)[:left]
            left -= len(codes)
            yield codes
            if not left:
                return
        yield torch.zeros(left, dtype=torch.int64)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.ensure_filled()
        features = self.check(features)
        if self.exchange is not None:
            return self._from_all_ranks(features)
        own_ids = features.values()
        if own_ids.dtype == torch.int64 and is_readable(own_ids, self.codes):
            return self._by_compiled_code(features)
        copies = self.copies(features)
        ids, (steps, starts, offsets) = beside_ids(copies, self._constants)
        codes = gather_bits(self.codes, ids * steps + starts, self._bits)
        return renamed(copies, self._keys, (codes + offsets).view(-1))

    def _by_compiled_code(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same in one pass over the ids, none of which is copied first."""
        sources, starts, steps, firsts = self._compiled
        counts = features.length_per_key()
        rows = gather_codes(
            self.codes,
            self._bits,
            features.values(),
            counts,
            sources=sources,
            starts=starts,
            steps=steps,
            firsts=firsts,
        )
        return self.copies.around(features, rows)

    def _from_all_ranks(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same where other ranks hold codes: each id's are asked for once, and come together."""
        ids = features.values().to(torch.int64)
        instances = per_value(self._instances.on(ids.device), features)
        codes = self._places.ask(instances, ids, self._codes_from).to(torch.int64)
        copies = self.copies(
            renamed(features, features.keys(), torch.arange(len(ids), device=ids.device))
        )
        constants = (self._positions, self._offsets)
        positions, offsets = (per_value(each.on(ids.device), copies) for each in constants)
        return renamed(copies, self._keys, codes[copies.values(), positions] + offsets)

    def _codes_from(self, places: Tensor) -> Tensor:
        """Codes from places (n,) on, of as many sub-vectors as any table has: (n, most)."""
        most = max(self._layout.positions(table) for table in self._layout.tables)
        last = len(self.codes) * 8 // self._bits - 1  # a narrow table's are followed by others'
        wanted = places.unsqueeze(1) + torch.arange(most, device=places.device)
        codes = gather_bits(self.codes, wanted.clamp_(max=last), self._bits)
        return codes.to(torch.uint8 if self._bits <= 8 else torch.uint16)


def write_codes(config: Coded, latents: Latents, codebooks: Codebooks) -> RowSource:
    """The buffer of a `CodedRoute`: the nearest codewords of all rows, block by block.

    Args:
        config: of the route.
        latents: the rows.
        codebooks: of the group.
    """
    layout, bits = config.layout(latents.tables), config.bits
    places = {table.name: n for n, table in enumerate(latents.tables)}
    blocks = [block for table in latents.tables for block in latents.blocks(table)]

    def codes_of(block: RowBlock) -> int:
        """A block's codes; those of a table end with a byte."""
        table = latents.tables[places[block.table]]
        if block.stop < table.num_embeddings:
            return len(block) * layout.positions(table)
        positions = layout.positions(table)
        whole = padded_codes(table.num_embeddings * positions, bits)
        return whole - block.start * positions

    def packed(block: RowBlock) -> Tensor:
        rows = latents.rows[block.table].read(block.start, block.stop).float()
        codes = encode(layout, places[block.table], rows, codebooks).reshape(-1)
        padding = codes.new_zeros(codes_of(block) - len(codes))
        return pack_bits(torch.cat([codes, padding]), bits)

    sizes = [packed_bytes(codes_of(block), bits) for block in blocks]
    return latents.work.write("codes", packed, blocks, (sum(sizes),), torch.uint8, sizes=sizes)


def codebook_rows(
    config: VectorQuantized, tables: Sequence[TableSpec], words: Tensor
) -> dict[str, Tensor]:
    """Codewords as the rows of the physical tables that hold them.

    Args:
        config: of the serving form.
        tables: the group.
        words: (G, k, w) all codebooks of the group's layout.
    """
    books = words.split([count for _, count in config.layout(tables).units])
    physical = config.codebook_tables(tables)
    return {f"rows.{t.name}": own.flatten(0, 1) for t, own in zip(physical, books)}
