"""Rows of several tables in the order in which pruning keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embcomp.backends.low_dim import pruned_bytes
from embcomp.tables.budget import largest_int
from embcomp.tables.specs import TableSpec, by_name


def counts_or_ranks(table: TableSpec, counts: Mapping[str, Tensor]) -> Tensor:
    """How often each id occurs: (N,) float64.

    Where nobody has counted, ids are taken to be ranked by frequency, as in prepared datasets, and
    counts to fall as one over the rank.
    """
    found = counts.get(table.name)
    if found is None or not found.numel():
        return 1 / torch.arange(1, table.num_embeddings + 1, dtype=torch.float64)
    return found.to(torch.float64)


class RowRanking:
    """The best rows of all tables together.

    Args:
        tables: the group.
        places: what `places_of` returned.
    """

    def __init__(self, tables: Sequence[TableSpec], places: Mapping[str, Tensor]) -> None:
        self._tables = list(tables)
        self.most = int(places["most"])
        self._ranks = {table.name: places[f"ranks.{table.name}"] for table in tables}
        self._sorted = {table.name: places[f"sorted.{table.name}"] for table in tables}

    @staticmethod
    def places_of(
        tables: Sequence[TableSpec], importance: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The rows' places in the order, as tensors that processes can share.

        Args:
            tables: the group.
            importance: for each table, (N,) what is lost with each row; rows of minus infinity are
                never kept. Equals are kept in the order of tables' names and ids.
        """
        tables = by_name(tables)
        scores = torch.cat([importance[table.name].to(torch.float64) for table in tables])
        ranks = torch.empty(len(scores), dtype=torch.int64)
        ranks[torch.sort(scores, descending=True, stable=True).indices] = torch.arange(len(scores))
        places = {"most": (scores > -torch.inf).sum()}
        for table, own in zip(tables, ranks.split([table.num_embeddings for table in tables])):
            places[f"ranks.{table.name}"] = own
            places[f"sorted.{table.name}"] = own.sort().values
        return places

    def masks(self, kept: int) -> dict[str, Tensor]:
        """For each table, (N,) bool which rows are among the best `kept` of all tables."""
        return {name: ranks < min(kept, self.most) for name, ranks in self._ranks.items()}

    def counts(self, kept: int) -> dict[str, int]:
        """For each table, how many of its rows are among the best `kept`."""
        limit = min(kept, self.most)
        return {name: int(torch.searchsorted(ranks, limit)) for name, ranks in self._sorted.items()}

    def size(self, kept: int, widths: Mapping[str, int]) -> int:
        """Serving bytes of the best `kept` rows in these widths."""
        counts = self.counts(kept)
        return sum(pruned_bytes(t, counts[t.name], widths[t.name]) for t in self._tables)

    def within(self, budget: int, widths: Mapping[str, int]) -> int | None:
        """How many of the best rows fit into a budget; None where not even their absence does."""
        return largest_int(lambda kept: self.size(kept, widths) <= budget, 0, self.most)
