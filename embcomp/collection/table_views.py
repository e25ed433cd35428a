"""Whole tables as TorchRec's collections show theirs: `embedding_bags[name].weight`, to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from embcomp.collection.groups import Group
from embcomp.collection.torchrec_keys import whole_tables


@dataclass(frozen=True, eq=False)
class TableView:
    """One table that is held whole.

    Args:
        weight: (num_embeddings, embedding_dim), a view of what is trained, without its gradient.
    """

    weight: Tensor

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns, padding cut off."""
        return self.weight.shape[1]


class TableViews(Mapping[str, TableView]):
    """The tables that are held whole, by name; they are trained and loaded through the collection.

    Args:
        groups: the methods of a collection.
        weights: the physical tables' weights by name.
    """

    def __init__(self, groups: Sequence[Group], weights: Mapping[str, Tensor]) -> None:
        self._methods = {
            table.name: group.config.name for group in groups for table in group.tables
        }
        widths = {table.name: table.embedding_dim for group in groups for table in group.tables}
        self._views = {
            name: TableView(weights[name].detach()[:, : widths[name]])
            for name in whole_tables(groups)
        }

    @override
    def __getitem__(self, name: str) -> TableView:
        if name not in self._views and name in self._methods:
            raise KeyError(
                f"table {name!r} has no row for each id to show: it is held by {self._methods[name]}"
            )
        return self._views[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    @override
    def __len__(self) -> int:
        return len(self._views)
