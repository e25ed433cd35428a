"""A bounded sample of weighted rows, for k-means: the same whoever draws it.

Priority sampling (Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums",
2007): rows of the highest weight over a random number stay, and light ones get the weight of those that
were left out. The random numbers are hashes of seed, table and id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.layers.best_values import BestValues
from embcomp.layers.block_work import RowBlock, Work, row_blocks
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.name_hash import name64

_FINENESS = 1 << 53  # of random numbers: what a float64 tells apart


@dataclass(frozen=True, kw_only=True)
class RowSample:
    """Rows of some tables.

    Attributes:
        weights: by table, (n,) float64 what each row of the sample counts.
        blocks: by table, its blocks, and the rows of the sample in each, counted from its first.
    """

    weights: Mapping[str, Tensor]
    blocks: Mapping[str, Sequence[tuple[RowBlock, Tensor]]]

    def gather(self, name: str, source: RowSource, table: str, work: Work) -> RowSource:
        """The sample's rows of a table.

        Args:
            name: unique in the stage.
            source: the table's rows.
            table: its name.
            work: reads every block.
        """
        parts = [(block, own) for block, own in self.blocks[table] if len(own)]
        places = dict(parts)

        def rows(block: RowBlock) -> Tensor:
            return source.read(block.start, block.stop)[places[block]]

        sizes = [len(own) for _, own in parts]
        shape = (sum(sizes), *source.shape[1:])
        return work.write(name, rows, list(places), shape, source.dtype, sizes=sizes)


def sample_rows(
    name: str, weights: Mapping[str, RowSource], columns: int, most: int, seed: int, work: Work
) -> RowSample:
    """Draw a sample.

    Args:
        name: unique in the stage.
        weights: by table, (N,) float64, not negative; rows of weight 0 take no part unless all have it.
        columns: of the rows, for the size of blocks.
        most: rows of the sample at the most; where there are no more, all are in it.
        seed: of the random numbers.
        work: looks at every block.
    """
    values = {table: _priorities(table, own, seed) for table, own in weights.items()}
    best = BestValues(work, f"{name}-priorities", values)
    if not best.most:
        ones = {table: _ones(len(own)) for table, own in weights.items()}
        return sample_rows(f"{name}-alike", ones, columns, most, seed, work)
    least = 0.0
    if best.most > most:
        cut = best.cut(lambda counts: sum(counts.values()) <= most)
        assert cut is not None
        kept, least = best.kept(cut), cut.value
    else:
        kept = {
            table: ComputedRows((len(own),), torch.bool, lambda a, b, own=own: own.read(a, b) > 0)  # type: ignore[misc]
            for table, own in weights.items()
        }
    blocks = {table: row_blocks(table, len(own), columns) for table, own in weights.items()}

    def places(block: RowBlock) -> dict[str, Tensor]:
        own = kept[block.table].read(block.start, block.stop).nonzero()[:, 0]
        return {
            "places": own.to(torch.int32),
            "weights": weights[block.table].read(block.start, block.stop)[own].clamp(min=least),
        }

    everything = [block for own in blocks.values() for block in own]
    drawn: dict[str, list[Tensor]] = {table: [] for table in weights}
    chosen: dict[str, list[tuple[RowBlock, Tensor]]] = {table: [] for table in weights}
    for block, found in zip(everything, work.map(f"{name}-places", places, everything)):
        drawn[block.table].append(found["weights"])
        chosen[block.table].append((block, found["places"].long()))
    return RowSample(weights={t: torch.cat(own) for t, own in drawn.items()}, blocks=chosen)


def _priorities(table: str, weights: RowSource, seed: int) -> RowSource:
    """Weights over random numbers; minus infinity for rows that take no part."""
    own = torch.tensor(table_salt(seed, table, name64("sample")))

    def priorities(start: int, stop: int) -> Tensor:
        drawn = hash_rows(torch.arange(start, stop), own, torch.tensor(_FINENESS))
        chances = (drawn.double() + 0.5) / _FINENESS
        mass = weights.read(start, stop)
        return torch.where(mass > 0, mass / chances, -torch.inf)

    return ComputedRows((len(weights),), torch.float64, priorities, of=[weights])


def _ones(count: int) -> RowSource:
    return ComputedRows(
        (count,), torch.float64, lambda a, b: torch.ones(b - a, dtype=torch.float64)
    )
