"""Whole tables as TorchRec's collections show theirs: `embedding_bags[name].weight`, to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from embcomp.collection.groups import Group


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
        weights: gives the physical tables' weights by name, when one is looked at.
    """

    def __init__(
        self, groups: Sequence[Group], weights: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self._methods = {
            table.name: group.config.name for group in groups for table in group.tables
        }
        self._weights = weights
        self._widths = {
            table.name: table.embedding_dim
            for group in groups
            for table in group.tables
            if group.config.holds_whole(table)
        }

    @override
    def __getitem__(self, name: str) -> TableView:
        if name not in self._widths and name in self._methods:
            raise KeyError(
                f"table {name!r} has no row for each id to show: it is held by {self._methods[name]}"
            )
        width = self._widths[name]
        return TableView(self._weights()[name].detach()[:, :width])

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    @override
    def __len__(self) -> int:
        return len(self._widths)
