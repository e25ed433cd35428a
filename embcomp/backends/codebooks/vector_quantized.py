"""What methods share that end in codes: their geometry, their bytes, and how a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Annotated, ClassVar

from typing_extensions import Self, override

from embcomp.backends.base import BackendConfig
from embcomp.backends.codebooks.bit_packing import MAX_BITS, bits_for, packed_bytes
from embcomp.backends.codebooks.subvectors import (
    GROUP,
    Sharing,
    SharingGroups,
    SubvectorLayout,
    check_sharing,
)
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Ge, Le
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
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
        shared = shared_name(
            self.width, self.codewords, self.codebooks, self.scale, self.stored_latent, self.seed
        )
        first = unit.removeprefix(GROUP)
        return f"{shared}_{first}__codewords" if first else f"{shared}__codewords"

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
                rows=code_bytes(layout, table, self.bits),
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

    def keeps_full(self, table: TableSpec) -> bool:
        """Whether a table's codes, and codewords if it had to bear them alone, are no smaller."""
        served = footprint_of(self.codebook_tables([table]))
        served += self.beside_codewords([table], trained=True)
        return served.serve_bytes >= table.full_bytes

    def _sizes(self, tables: Sequence[TableSpec]) -> Iterator[Self]:
        """The configurations among which a budget chooses."""
        dims = {table.embedding_dim for table in tables}
        widths = sorted({m for dim in dims for m in range(1, dim + 1) if dim % m == 0})
        given = self.num_codewords
        for width in widths:
            for count in [given] if given else [1 << bits for bits in _BITS_CHOSEN]:
                yield replace(self.with_size(subvector_dim=width), num_codewords=count)

    def expected_distortion(self, tables: Sequence[TableSpec]) -> float:
        """Squared error relative to the rows' variance, to rank sizes before any training."""
        rows = sum(table.num_embeddings for table in tables)
        coded = sum(t.num_embeddings for t in tables if not self.keeps_full(t))
        return coded / rows * quantisation_error(self.width, self.codewords)

    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        """The size of least expected distortion; of equals, that of the fewest bytes."""
        sizes = [(size.footprint(tables).serve_bytes, size) for size in self._sizes(tables)]
        fitting = [(size.expected_distortion(tables), cost) for cost, size in sizes]
        best = [
            (distortion, cost, size)
            for (distortion, cost), (_, size) in zip(fitting, sizes)
            if cost <= budget
        ]
        return min(best, key=lambda found: found[:2])[2] if best else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return min(
            self._sizes(tables),
            key=lambda size: (
                size.footprint(tables).serve_bytes,
                size.expected_distortion(tables),
            ),
        )


@lru_cache
def quantisation_error(width: int, count: int) -> float:
    """What the best codewords lose of a sub-vector's variance, as high-resolution theory has it.

    Zador's law for a Gaussian, `kappa(d) * d * (product of variances) ** (1 / d) * k ** (-2 / d)`
    with a fit of kappa, over as many axes as pay; those left out lose their variance. The variances
    fall as `axis ** -1.5`: with equal ones the law ranks sub-vectors of 2 with 8 codewords before
    sub-vectors of 8 with 256, which on MovieLens-1M lose half as much; with a faster fall it would
    have whole rows as sub-vectors, which lose more.
    """
    variances = [axis**-1.5 for axis in range(1, width + 1)]
    whole = left = sum(variances)
    least, logarithms = 1.0, 0.0
    for axes, variance in enumerate(variances, 1):
        left -= variance
        logarithms += math.log(variance)
        kappa = 1 + 1.72 * axes**-0.73
        within = kappa * axes * math.exp(logarithms / axes) * count ** (-2 / axes)
        least = min(least, (within + max(left, 0.0)) / whole)
    return least


def padded_codes(layout: SubvectorLayout, table: TableSpec, bits: int) -> int:
    """A table's codes, and so many more that they end with a byte."""
    codes = table.num_embeddings * layout.positions(table)
    whole = 8 // math.gcd(8, bits)
    return -(-codes // whole) * whole


def code_bytes(layout: SubvectorLayout, table: TableSpec, bits: int) -> int:
    """Bytes of a table's codes, which begin and end with a byte."""
    return packed_bytes(padded_codes(layout, table, bits), bits)


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
