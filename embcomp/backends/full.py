"""The uncompressed table: one row per id, as TorchRec's own collections hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState, full_table
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.routing import common_count, per_value, renamed
from embcomp.tables.footprint import footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec


@dataclass(frozen=True, kw_only=True)
class Full(BackendConfig):
    """No compression. Ids must lie in `[0, num_embeddings)`."""

    name: ClassVar[str] = "full"
    compresses: ClassVar[bool] = False

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False  # it is the full table that this builds

    @override
    def columns(self, table: TableSpec) -> int:
        return table.embedding_dim

    @override
    def rows_by_id(self, tables: Sequence[TableSpec], form: MethodState) -> Mapping[str, Tensor]:
        return {table.name: torch.arange(table.num_embeddings) for table in tables}

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [full_table(table) for table in tables]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=nn.Identity(),
        )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        whole = self.smallest(tables)
        return whole if footprint_of(self.physical_tables(tables)).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size()


class FullRoute(nn.Module):
    """Ids are rows; all there is to do is to refuse those that are not."""

    def __init__(self, keys: Sequence[str], check: RangeCheck) -> None:
        super().__init__()
        self._keys = list(keys)
        self.check = check

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.check(features)
        return renamed(features, self._keys)


class RangeCheck(nn.Module):
    """Refuses ids outside `[0, num_embeddings)` on every device, before any kernel sees them.

    Kernels do not agree on such ids: on a CPU they raise without naming the feature, on CUDA they
    read row 0, and under row-wise sharding they may read another table's rows.
    """

    def __init__(self, tables: Sequence[TableSpec]) -> None:
        super().__init__()
        self._instances = [(t.name, f) for t in tables for f in t.feature_names]
        self._limits = Constant([t.num_embeddings for t in tables for _ in t.feature_names])

    def forward(self, features: KeyedJaggedTensor) -> None:
        """Raise a ValueError that names the first bad id, its feature and its table."""
        ids = features.values()
        if not ids.numel():
            return
        limits = self._limits.on(ids.device)
        if torch.compiler.is_exporting():
            self._refuse_in_program(ids.view(len(self._instances), -1), limits.unsqueeze(1))
            return
        if common_count(features) is not None:  # compare extremes: two passes, nothing stored
            low, high = ids.view(len(self._instances), -1).aminmax(dim=1)
            if not bool(((low < 0) | (high >= limits)).any()):
                return
        limit = per_value(limits, features)
        bad = (ids < 0) | (ids >= limit)
        if bool(bad.any()):
            self._refuse(features, int(bad.nonzero()[0]))

    def _refuse_in_program(self, ids: Tensor, limit: Tensor) -> None:
        """The same for an exported program, which takes rectangles of ids and fails as a whole."""
        names = ", ".join(dict.fromkeys(feature for _, feature in self._instances))
        torch._assert_async(
            ((ids >= 0) & (ids < limit)).all(), f"an id of {names} is not in [0, num_embeddings)"
        )

    def _refuse(self, features: KeyedJaggedTensor, position: int) -> None:
        ends = torch.tensor(features.length_per_key()).cumsum(0)
        instance = int(torch.searchsorted(ends, position, right=True))
        table, feature = self._instances[instance]
        limit = self._limits.on(torch.device("cpu"))[instance].item()
        raise ValueError(
            f"feature {feature!r}: id {_item(features.values(), position)} is not in "
            f"[0, {limit}), the rows of table {table!r}. Raise num_embeddings, map unseen ids to a "
            "row of their own, or choose a method that hashes (hash, unified)."
        )


def _item(values: Tensor, position: int) -> int:
    return int(values[position].item())
