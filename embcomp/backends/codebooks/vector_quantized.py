"""What methods share that end in codes: their geometry, their bytes, and how a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, ClassVar

from typing_extensions import Self, override

from embcomp.backends.base import BackendConfig
from embcomp.backends.codebooks.bit_packing import MAX_BITS, bits_for, packed_bytes
from embcomp.backends.codebooks.expected_error import Points, expected_error
from embcomp.backends.codebooks.subvectors import (
    GROUP,
    Sharing,
    SharingGroups,
    SubvectorLayout,
    check_sharing,
)
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Ge, Le
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import PhysicalTable, TableSpec, UniformInit, shared_name

DEFAULT_CODEWORDS = 256
_BITS_CHOSEN = range(1, 11)  # widths of a code that a budget may choose: k-means stays quick


@dataclass(frozen=True, kw_only=True)
class VectorQuantized(BackendConfig):
    """Rows in sub-vectors, each a code for one of a few codewords.

    Args:
        subvector_dim: width of a sub-vector; one code stands for each.
        num_codewords: codewords in a codebook, at most 65536; 256 unless a budget chooses.
        codebooks: who shares a codebook: `all` sub-vectors, those at one `position` of any
            table, or none but those of one `table` at one position.
        sharing_groups: names of tables that share among themselves alone; those that no group
            names are one more.
        scale: whether every table has a factor of its own, so that tables of different size
            share codewords. Never where they share none.
        seed: of clustering, and of the codes of tables that nobody has clustered.
    """

    subvector_dim: Annotated[int | None, Ge(1), Le(2**16)] = None
    num_codewords: Annotated[int | None, Between(2, 1 << MAX_BITS)] = None
    codebooks: Sharing = "position"
    sharing_groups: SharingGroups = ()
    scale: bool = True
    seed: int = 2021

    size_fields: ClassVar[tuple[str, ...]] = ("subvector_dim",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sharing(self.name, "codebooks", self.codebooks, self.sharing_groups)

    @property
    def width(self) -> int:
        """Width of a sub-vector."""
        return self.subvector_dim or 1

    @property
    def codewords(self) -> int:
        """Codewords in a codebook."""
        return self.num_codewords or DEFAULT_CODEWORDS

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return bits_for(self.codewords)

    @property
    def scaled(self) -> bool:
        """Whether tables have factors of their own."""
        return self.scale and self.codebooks != "table"

    @property
    def stored_latent(self) -> int | None:
        """Width of a stored codeword that a projection widens; None when none is stored so."""
        return None

    def layout(self, tables: Sequence[TableSpec]) -> SubvectorLayout:
        """The sub-vectors of a group of tables."""
        return SubvectorLayout(
            tables=tables,
            width=self.width,
            sharing=self.codebooks,
            groups=self.sharing_groups,
        )

    @override
    def named_tables(self) -> Sequence[str]:
        return list(chain.from_iterable(self.sharing_groups))

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return self.codebook_tables(tables)

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return self.beside_codewords(tables, trained=True)

    def codebook_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        """The codebooks of the serving form: a table for each who share, one after another in it.

        Those of a single table have its name. Others are named by the settings that shape them, so
        that the tables around do not matter.
        """
        types = {table.data_type for table in tables}
        if len(types) > 1:
            raise ConfigError(
                f"{self.name}: tables that share codewords must have one data_type, "
                f"got {sorted(map(str, types))}"
            )
        layout = self.layout(tables)
        latent = self.stored_latent
        wider = 1.0 if latent is None else (self.width / latent) ** 0.5
        return [
            PhysicalTable(
                name=self._codebook_name(label),
                num_embeddings=count * self.codewords,
                embedding_dim=latent or self.width,
                lookups=tuple(replace(layout, tables=layout.members(unit)).lookups),
                init_fn=UniformInit.with_std(mean_init_std(layout.members(unit)) * wider),
                data_type=tables[0].data_type,
                is_codebook=True,
            )
            for unit, (label, count) in enumerate(layout.units)
        ]

    def _codebook_name(self, unit: str) -> str:
        if not unit.startswith(GROUP):
            return f"{unit}__codewords"
        shared = shared_name(*self._shaping)
        first = unit.removeprefix(GROUP)
        return f"{shared}_{first}__codewords" if first else f"{shared}__codewords"

    @property
    def _shaping(self) -> tuple[object, ...]:
        """The settings that shape what tables share, by which it is named."""
        latent = self.stored_latent
        return (self.width, self.codewords, self.codebooks, self.scale, latent, self.seed)

    def beside_codewords(self, tables: Sequence[TableSpec], *, trained: bool) -> Footprint:
        """What the serving form holds beside the codewords.

        Args:
            tables: the group, without those that stay full.
            trained: whether training holds it as well.
        """
        layout = self.layout(tables)
        tensors = [
            TensorFootprint(
                name=f"{table.name}.codes",
                role="codes",
                rows=self.stored_code_bytes(table),
                columns=1,
                itemsize=1,
                train_columns=1,
                lookup=False,
                trained=trained,
            )
            for table in tables
        ]
        if self.stored_latent is not None:
            tensors.append(projection_footprint(layout, self.stored_latent, trained=trained))
        if self.scaled:
            tensors.append(scales_footprint(tables, trained=trained))
        return Footprint(tuple(tensors))

    @override
    def codeword_count(self, table: TableSpec, tables: Sequence[TableSpec]) -> int:
        own = self.layout(tables).shared_by(tables.index(table))
        return len(set(own)) * self.codewords

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        """Whether a table's codes, and codewords if it had to bear them alone, are no smaller."""
        positions = -(-table.embedding_dim // self.width)
        shared = 1 if self.codebooks == "all" else positions
        codes = self.stored_code_bytes(table)
        return codes + self._shared_bytes(shared, [table]) >= table.full_bytes

    def stored_code_bytes(self, table: TableSpec) -> int:
        """Bytes of the codes of a table's ids."""
        return code_bytes(table.num_embeddings * -(-table.embedding_dim // self.width), self.bits)

    def serve_bytes(self, tables: Sequence[TableSpec]) -> int:
        """What `footprint` says that the serving form takes, as a sum: budgets ask for many sizes."""
        coded = [table for table in tables if not self.keeps_full(table)]
        full = sum(table.full_bytes for table in tables) - sum(t.full_bytes for t in coded)
        return full + self.coded_bytes(coded) if coded else full

    def coded_bytes(self, tables: Sequence[TableSpec]) -> int:
        """Serving bytes of tables without those that stay full."""
        layout = self.layout(tables)
        codes = sum(self.stored_code_bytes(table) for table in tables)
        return codes + self._shared_bytes(layout.num_shared, tables)

    def _shared_bytes(self, shared: int, tables: Sequence[TableSpec]) -> int:
        """Bytes of so many codebooks, their projections, and the tables' factors."""
        latent = self.stored_latent
        total = shared * self.codewords * (latent or self.width) * tables[0].itemsize
        total += 0 if latent is None else shared * latent * self.width * 4
        return total + 4 * len(tables) if self.scaled else total

    def sizes(self, tables: Sequence[TableSpec]) -> Iterator[Sequence[Self]]:
        """The configurations among which a budget chooses.

        Those of one width of sub-vectors and latents at a time, most codewords first: that is the
        order of what they are expected to lose.
        """
        dims = {table.embedding_dim for table in tables}
        widths = sorted({-(-dim // count) for dim in dims for count in range(1, dim + 1)})
        given = self.num_codewords
        counts = [given] if given else [1 << bits for bits in reversed(_BITS_CHOSEN)]
        for width in widths:
            for latent in self.latents(width):
                yield [self._sized(width, count, latent) for count in counts]

    def largest_of_each_width(self, tables: Sequence[TableSpec], budget: int) -> list[Self]:
        """For each width of sub-vectors, the most codewords that fit into a budget, at most 256.

        With more, k-means and the choice of codes take longer than the reading of any table.

        Args:
            tables: the group, those that stay full included.
            budget: serving bytes.
        """
        most = self.num_codewords or DEFAULT_CODEWORDS
        largest: dict[int, Self] = {}
        for size in chain.from_iterable(self.sizes(tables)):
            known = largest[size.width].codewords if size.width in largest else 0
            if known < size.codewords <= most and size.serve_bytes(tables) <= budget:
                largest[size.width] = size
        return list(largest.values())

    def latents(self, width: int) -> Sequence[int | None]:
        """The widths of latents that a budget may choose for sub-vectors, narrower ones first."""
        return (None,)

    def _sized(self, width: int, count: int, latent: int | None) -> Self:
        """One of the `sizes`; methods without latents do not look at their width."""
        return replace(self, budget=None, subvector_dim=width, num_codewords=count)

    @property
    def expected_latent(self) -> int:
        """Width of latents in which rows are expected to be coded."""
        return self.width

    def expected_distortion(self, tables: Sequence[TableSpec]) -> float:
        """Squared error relative to the rows' variance, to rank sizes before any training.

        Tables that stay full lose nothing.
        """
        rows = sum(table.num_embeddings for table in tables)
        coded = [table for table in tables if not self.keeps_full(table)]
        if not coded:
            return 0.0
        layout = self.layout(coded)
        return sum(self._expected_loss(layout, n) for n in range(len(coded))) / rows

    def _expected_loss(self, layout: SubvectorLayout, table: int) -> float:
        """What the rows of a table, by its place in the group, are expected to lose together."""
        error = expected_error(
            self._points(layout, table),
            width=self.width,
            latent=self.expected_latent,
            codewords=self.codewords,
        )
        return layout.tables[table].num_embeddings * error

    def _points(self, layout: SubvectorLayout, table: int) -> Points:
        """What shares a codebook with a table's sub-vectors."""
        dim = layout.tables[table].embedding_dim
        sharers = layout.members(layout.unit_of(table))
        every = self.codebooks == "all"
        each = [layout.positions(sharer) if every else 1 for sharer in sharers]
        count = sum(n * sharer.num_embeddings for n, sharer in zip(each, sharers))
        return Points(dim=dim, kinds=sum(each), count=count)

    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        """The size of least expected distortion; of equals, that of the fewest bytes."""
        best: tuple[float, int] | None = None
        found = None
        for alike in self.sizes(tables):
            for size in alike:
                cost = size.serve_bytes(tables)
                if cost > budget:
                    continue
                rank = (size.expected_distortion(tables), cost)
                if best is not None and rank[0] > best[0]:
                    break  # fewer codewords lose no less
                if best is None or rank < best:
                    best, found = rank, size
        return found

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return min(
            (size for alike in self.sizes(tables) for size in alike),
            key=lambda size: (size.serve_bytes(tables), size.expected_distortion(tables)),
        )


def padded_codes(codes: int, bits: int) -> int:
    """So many codes, and as many more as end with a byte."""
    whole = 8 // math.gcd(8, bits)
    return -(-codes // whole) * whole


def code_bytes(codes: int, bits: int) -> int:
    """Bytes of so many codes, which begin and end with a byte."""
    return packed_bytes(padded_codes(codes, bits), bits)


def mean_init_std(tables: Sequence[TableSpec]) -> float:
    """The mean over tables of the initial rows' standard deviation."""
    return sum(table.init_std for table in tables) / len(tables)


def projection_footprint(
    layout: SubvectorLayout, latent_dim: int, *, bias: bool = False, trained: bool = True
) -> TensorFootprint:
    """Bytes of projections, a row more for each where they have a bias."""
    return TensorFootprint(
        name=f"{layout.tables[0].name}.projection",
        role="projection",
        rows=layout.num_shared * (latent_dim + bias),
        columns=layout.width,
        itemsize=4,
        train_columns=layout.width,
        lookup=False,
        trained=trained,
        owners=tuple((table.name, layout.positions(table)) for table in layout.tables),
    )


def scales_footprint(tables: Sequence[TableSpec], *, trained: bool) -> TensorFootprint:
    """Bytes of one factor for each table."""
    return TensorFootprint(
        name=f"{tables[0].name}.scales",
        role="projection",
        rows=len(tables),
        columns=1,
        itemsize=4,
        train_columns=1,
        lookup=False,
        trained=trained,
        owners=tuple((table.name, 1) for table in tables),
    )
