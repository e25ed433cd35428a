"""Rows cut into sub-vectors, and which sub-vectors share a codebook or a projection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from embcomp.errors import ConfigError
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.fused_lookups import FusedEmbedding, PlacedRow
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import NamedParts
from embcomp.tables.specs import LookupKey, TableSpec

Sharing = Literal["all", "position", "table"]
"""Who shares: all sub-vectors; those at one position of any table; none but of one table there."""

_FEW_POSITIONS = 8

GROUP = "group:"
"""What a name of several tables that share begins with."""

SharingGroups = tuple[tuple[str, ...], ...]
"""Names of tables that share among themselves; those in none of the groups are one more."""


def check_sharing(method: str, field: str, sharing: str, groups: SharingGroups) -> None:
    """Raise a ConfigError for groups of tables that cannot be."""
    if groups and sharing == "table":
        raise ConfigError(
            f"{method}: with {field}: table no tables share, so there is nothing for sharing_groups "
            f"to part; give {field}: position, or all"
        )
    twice = [name for name, count in Counter(chain.from_iterable(groups)).items() if count > 1]
    if twice:
        raise ConfigError(f"{method}: sharing_groups name {', '.join(twice)} more than once")


@dataclass(frozen=True, kw_only=True)
class SubvectorLayout:
    """Sub-vectors of a group of tables. The last of a row is padded where the width does not divide.

    Args:
        tables: the group.
        width: of a sub-vector.
        sharing: who shares a codebook or projection; these are numbered from 0.
        groups: names of tables between which nothing is shared.
    """

    tables: Sequence[TableSpec]
    width: int
    sharing: Sharing
    groups: SharingGroups = ()

    def positions(self, table: TableSpec) -> int:
        """Sub-vectors of a row."""
        return -(-table.embedding_dim // self.width)

    @cached_property
    def _labels(self) -> list[str]:
        """What each table shares with: itself alone, or a group, named by its first member's name.

        The tables that no group names are a group without a name.
        """
        if self.sharing == "table":
            return [table.name for table in self.tables]
        owners = {name: min(names) for names in self.groups for name in names}
        return [f"{GROUP}{owners.get(table.name, '')}" for table in self.tables]

    @cached_property
    def _sharers(self) -> list[int]:
        """The number of what each table shares with, by name and not by place."""
        present = self._present
        return [present.index(label) for label in self._labels]

    @cached_property
    def _present(self) -> list[str]:
        """The labels in order, that of the tables in no group last."""
        return sorted(set(self._labels), key=lambda label: (label == GROUP, label))

    @property
    def units(self) -> list[tuple[str, int]]:
        """Who shares: a table's name, or `group:` and a name; and how many codebooks they have."""
        return list(zip(self._present, self._counts))

    def members(self, unit: int) -> list[TableSpec]:
        """The tables of one of the `units`."""
        return [table for table, own in zip(self.tables, self._sharers) if own == unit]

    def unit_of(self, table: int) -> int:
        """The place among the `units` of a table's.

        Args:
            table: its place in the group.
        """
        return self._sharers[table]

    @cached_property
    def _counts(self) -> list[int]:
        """How many codebooks or projections those of each number share."""
        counts = [0] * (max(self._sharers) + 1)
        for number, table in zip(self._sharers, self.tables):
            own = 1 if self.sharing == "all" else self.positions(table)
            counts[number] = max(counts[number], own)
        return counts

    @property
    def num_shared(self) -> int:
        """How many codebooks or projections there are."""
        return sum(self._counts)

    def shared_by(self, table: int) -> list[int]:
        """The codebook of each of a table's positions.

        Args:
            table: its place in the group.
        """
        first = sum(self._counts[: self._sharers[table]])
        return [first + place for place in self.places(table)]

    def places(self, table: int) -> list[int]:
        """The codebook of each of a table's positions, counted within its unit.

        Args:
            table: its place in the group.
        """
        count = self.positions(self.tables[table])
        return [0] * count if self.sharing == "all" else list(range(count))

    @property
    def columns(self) -> list[int]:
        """The codebook of each sub-vector of all (table, feature) pairs, in order."""
        return [
            shared
            for n, table in enumerate(self.tables)
            for _ in table.feature_names
            for shared in self.shared_by(n)
        ]

    @property
    def lookups(self) -> list[LookupKey]:
        """A physical look-up for each of `columns`."""
        return [
            LookupKey(table.name, feature, position)
            for table in self.tables
            for feature in table.feature_names
            for position in range(self.positions(table))
        ]

    @property
    def keys(self) -> list[str]:
        """The look-ups as TorchRec has them."""
        return [str(lookup) for lookup in self.lookups]

    @property
    def kept(self) -> list[int] | None:
        """Which columns of the decoded sub-vectors are no padding; None when all are."""
        found: list[int] = []
        start = 0
        for table in self.tables:
            for _ in table.feature_names:
                found += range(start, start + table.embedding_dim)
                start += self.positions(table) * self.width
        return None if len(found) == start else found

    def cut(self, rows: Tensor) -> Tensor:
        """(N, embedding_dim) rows as (N, positions, width) sub-vectors, padded by zeros."""
        positions = -(-rows.shape[1] // self.width)
        padded = nn.functional.pad(rows.float(), (0, positions * self.width - rows.shape[1]))
        return padded.view(len(rows), positions, self.width)


class Decode(nn.Module):
    """Turns looked-up latents into embeddings: projected, scaled, padding cut off.

    Args:
        layout: the group's sub-vectors.
        latent_dim: width of a latent; None when it is the sub-vector itself.
        bias: whether a projection adds a learnt vector.
        scales: the tables' initial scales, where each has a learnt one.
    """

    def __init__(
        self,
        layout: SubvectorLayout,
        *,
        latent_dim: int | None,
        bias: bool = False,
        scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self._width, self._layout = layout.width, layout
        self._latent = layout.width if latent_dim is None else latent_dim
        self._which = Constant(layout.columns)
        self._pairs = [
            (n, layout.positions(table), table.embedding_dim)
            for n, table in enumerate(layout.tables)
            for _ in table.feature_names
        ]
        self._kept = None if layout.kept is None else Constant(layout.kept)
        self.projections = (
            None
            if latent_dim is None
            else Projections(layout.units, latent_dim, layout.width, bias=bias)
        )
        self.scales = None if scales is None else Scales(layout, scales)

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding] | None:
        """Codewords side by side, projected and scaled; None with a bias."""
        if self.projections is not None and self.projections.bias is not None:
            return None
        places = [  # of each sub-vector: the row that holds it, and where it begins there
            (key, start)
            for key, width in enumerate(widths)
            for start in range(0, width, self._latent)
        ]
        found, column = [], 0
        for n, table in enumerate(self._layout.tables):
            scale = 1.0 if self.scales is None else float(self.scales.weight.detach()[n])
            for _ in table.feature_names:
                rows = []
                for into in range(0, table.embedding_dim, self._width):
                    used = min(self._width, table.embedding_dim - into)
                    rows.append(self._placed(column, places[column], into, used))
                    column += 1
                found.append(FusedEmbedding(rows=rows, width=table.embedding_dim, scale=scale))
        return found

    def _placed(self, column: int, place: tuple[int, int], into: int, used: int) -> PlacedRow:
        key, start = place
        if self.projections is None:
            return PlacedRow(key=key, into=into, start=start, width=used)
        matrices = self.projections.weight.detach()
        own = matrices[0 if len(matrices) == 1 else self._layout.columns[column]]
        return PlacedRow(key=key, into=into, start=start, projection=own[:, :used].contiguous())

    @override
    def forward(self, latents: Tensor) -> Tensor:  # (R, K * latent width) -> (R, sum of dims)
        found = latents
        if self.projections is not None:
            which = self._which.on(latents.device)
            found = self.projections(latents.unflatten(1, (len(which), -1)), which).flatten(1)
        if self._kept is not None:
            found = found.index_select(1, self._kept.on(found.device))
        return found if self.scales is None else self.scales(found)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        if self._is_one_matrix:
            return self._projected_at_once(parts)
        decoded = []
        start = 0
        for part, (table, positions, dim) in zip(parts, self._pairs):
            found = part
            if self.projections is not None:
                which = self._which.on(part.device)[start : start + positions]
                found = self.projections(part.unflatten(1, (positions, -1)), which).flatten(1)
            start += positions
            found = found[:, :dim]
            decoded.append(found if self.scales is None else found * self.scales.weight[table])
        return decoded

    @property
    def _is_one_matrix(self) -> bool:
        """Whether a row's few sub-vectors are projected fastest by one matrix, zeros between them."""
        alike = len({positions for _, positions, _ in self._pairs}) == 1
        few = self._pairs[0][1] <= _FEW_POSITIONS
        return alike and few and self.projections is not None and self.projections.bias is None

    def _projected_at_once(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`each` by one product a (table, feature)."""
        assert self.projections is not None
        weight, positions = self.projections.weight, self._pairs[0][1]
        which = self._which.on(weight.device) if len(weight) > 1 else None
        own = (
            weight.expand(len(self._pairs) * positions, -1, -1) if which is None else weight[which]
        )
        if self.scales is not None:
            tables = torch.tensor([table for table, _, _ in self._pairs], device=weight.device)
            own = own * self.scales.weight[tables].repeat_interleave(positions)[:, None, None]
        blocks = own.unflatten(0, (len(self._pairs), positions)).unsqueeze(3)  # (P, K, d, 1, m)
        here = torch.eye(positions, device=weight.device, dtype=weight.dtype)[:, None, :, None]
        matrices = (blocks * here).flatten(3, 4).flatten(1, 2)  # (P, K * d, K * m)
        return [
            part @ matrix[:, :dim]
            for part, matrix, (_, _, dim) in zip(parts, matrices.unbind(), self._pairs)
        ]


class Projections(NamedParts):
    """Learnt maps from latents to sub-vectors, orthonormal at first.

    Args:
        units: who shares them, by name, and how many each has.
        latent_dim: width in.
        width: width out.
        bias: whether each adds a vector.
    """

    def __init__(
        self, units: Sequence[tuple[str, int]], latent_dim: int, width: int, *, bias: bool
    ) -> None:
        super().__init__()
        count = sum(own for _, own in units)
        self.store_in_parts("weight", units)
        if bias:
            self.store_in_parts("bias", units)
        self.weight = nn.Parameter(torch.empty(count, latent_dim, width))
        self.bias = nn.Parameter(torch.empty(count, width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal rows, no bias."""
        with torch.no_grad():
            for weight in self.weight:
                if not weight.is_meta:
                    nn.init.orthogonal_(weight)
            if self.bias is not None:
                self.bias.zero_()

    @override
    def forward(self, latents: Tensor, which: Tensor) -> Tensor:
        # (R, K, d), (K,) -> (R, K, m)
        if len(self.weight) == 1:
            found = latents @ self.weight[0]
        else:
            found = torch.einsum("rkd,kdm->rkm", latents, self.weight[which])
        return found if self.bias is None else found + self.bias[which]


class Scales(NamedParts):
    """One learnt factor for each table.

    Args:
        layout: the group's sub-vectors.
        initial: the factors to begin with.
    """

    def __init__(self, layout: SubvectorLayout, initial: Sequence[float]) -> None:
        super().__init__()
        self._initial = list(initial)
        self.store_in_parts("weight", [(table.name, 1) for table in layout.tables])
        self._owner = Constant(
            [
                n
                for n, table in enumerate(layout.tables)
                for _ in range(len(table.feature_names) * table.embedding_dim)
            ]
        )
        self.weight = nn.Parameter(torch.empty(len(layout.tables)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial factors."""
        with torch.no_grad():
            self.weight.copy_(torch.tensor(self._initial))

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (R, sum of dims), unchanged in shape
        return rows * self.weight.index_select(0, self._owner.on(rows.device))
