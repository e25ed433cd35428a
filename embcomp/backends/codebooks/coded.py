"""Codes and codewords: a row is made of the codewords that its packed codes name.

Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011. The codewords
are the physical table, so that TorchRec shards and trains them, while the codes stand in the route.
Codes that nobody has learnt are hashes of the ids, which makes it a compositional hash embedding.

It is the form in which vector quantisation (``lr2vq``, ``pq``) is fine-tuned and served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.backends.base import Backend
from embcomp.backends.codebooks.bit_packing import gather_bits, pack_parts, packed_bytes
from embcomp.backends.codebooks.subvectors import Decode, SubvectorLayout
from embcomp.backends.codebooks.vector_quantized import VectorQuantized, mean_init_std
from embcomp.backends.full import RangeCheck
from embcomp.backends.stages import Stage
from embcomp.errors import ConfigError
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, salt, to_signed
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.routing import RepeatFeatures, common_count, per_value, renamed
from embcomp.tables.footprint import Footprint
from embcomp.tables.specs import PhysicalTable, TableSpec

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
    """Frozen codes into learnt codewords. Ids must lie in ``[0, num_embeddings)``.

    Args:
        latent_dim: width of a codeword that a projection widens to ``subvector_dim``; None stores
            codewords as they are used.
    """

    latent_dim: int | None = None

    name: ClassVar[str] = "coded"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_dim is not None and self.latent_dim < 1:
            raise ConfigError(f"{self.name}: latent_dim must be at least 1, got {self.latent_dim}")

    @property
    def stored_latent(self) -> int | None:
        return None if self.latent_dim is None else min(self.latent_dim, self.width)

    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [self.codebook_table(tables)]

    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return self.beside_codewords(tables, trained=True)

    def build(self, tables: Sequence[TableSpec]) -> Backend:
        layout = self.layout(tables)
        mean = mean_init_std(tables)
        scales = [table.init_std / mean for table in tables] if self.scaled else None
        decode = Decode(layout, latent_dim=self.stored_latent, scales=scales)
        return Backend(
            physical_tables=self.physical_tables(tables),
            keys=layout.keys,
            route=CodedRoute(layout, count=self.codewords, bits=self.bits, seed=self.seed),
            combine=decode,
        )


class CodedRoute(LearnedBuffers):
    """Looks up the codes of ids, one key for each sub-vector.

    Args:
        layout: the group's sub-vectors.
        count: codewords in a codebook.
        bits: of a code.
        seed: salts the codes that nobody has learnt.
    """

    codes: Tensor

    def __init__(self, layout: SubvectorLayout, *, count: int, bits: int, seed: int) -> None:
        super().__init__()
        self._layout, self._count, self._bits, self._seed = layout, count, bits, seed
        self._keys = layout.keys
        self.check = RangeCheck(layout.tables)
        sources: list[int] = []
        starts: list[int] = []
        steps: list[int] = []
        source = first = 0
        for table in layout.tables:
            positions = layout.positions(table)
            for _ in table.feature_names:
                sources += [source] * positions
                starts += range(first, first + positions)
                steps += [positions] * positions
                source += 1
            first += table.num_embeddings * positions
        self.copies = RepeatFeatures(self._keys, sources)
        self._starts, self._steps = Constant(starts), Constant(steps)
        self._offsets = Constant([shared * count for shared in layout.columns])
        self._num_codes = first
        packed = torch.zeros(packed_bytes(first, bits), dtype=torch.uint8)
        self.register_buffer("codes", packed)

    def reset_buffers(self) -> None:
        """Codes that are hashes of (seed, table, position, id)."""
        self.codes.copy_(pack_parts(self._hashes(), self._bits, self._num_codes))

    def _hashes(self) -> Iterator[Tensor]:
        count = torch.tensor(self._count)
        for table in self._layout.tables:
            positions = range(self._layout.positions(table))
            salts = [to_signed(salt(self._seed, table.index, p)) for p in positions]
            for start in range(0, table.num_embeddings, _ROWS_AT_ONCE):
                ids = torch.arange(start, min(start + _ROWS_AT_ONCE, table.num_embeddings))
                yield hash_rows(ids.unsqueeze(1), torch.tensor(salts), count)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.ensure_filled()
        self.check(features)
        copies = self.copies(features)
        ids = copies.values().to(torch.int64)
        constants = [c.on(ids.device) for c in (self._steps, self._starts, self._offsets)]
        count = common_count(copies)
        if count is None:
            steps, starts, offsets = (per_value(constant, copies) for constant in constants)
        else:
            ids = ids.view(len(self._keys), count)
            steps, starts, offsets = (constant.unsqueeze(1) for constant in constants)
        codes = gather_bits(self.codes, ids * steps + starts, self._bits)
        return renamed(copies, self._keys, (codes + offsets).view(-1))


def pack_codes(parts: Iterator[Tensor], config: Coded, tables: Sequence[TableSpec]) -> Tensor:
    """The buffer of a ``CodedRoute``.

    Args:
        parts: (rows, positions) codes of consecutive rows, table after table.
        config: of the route.
        tables: the group.
    """
    return pack_parts(parts, config.bits, config.num_codes(tables))
