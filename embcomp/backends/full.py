"""The uncompressed table: one row per id, as TorchRec's own collections hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import (
    Backend,
    BackendConfig,
    FollowedForm,
    FollowInputs,
    MethodState,
    StageInputs,
    full_table,
)
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.fused_lookups import FusedRoutes, OwnRow
from embcomp.layers.host_values import reads_wait
from embcomp.layers.late_findings import LateFindings
from embcomp.layers.routing import beside_ids, common_count, per_value, renamed
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec


@dataclass(frozen=True, kw_only=True)
class Full(BackendConfig):
    """No compression. Ids must lie in `[0, num_embeddings)`."""

    name: ClassVar[str] = "full"
    approximates: ClassVar[bool] = True
    compresses: ClassVar[bool] = False

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False  # it is the full table that this builds

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return False

    @override
    def columns(self, table: TableSpec) -> int:
        return table.embedding_dim

    @override
    def rows_by_id(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, Tensor | RowSource]:
        return {table.name: numbers(table.num_embeddings) for table in tables}

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
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        rows = {f"rows.{table.name}": past.before.rows(table.name) for table in tables}
        return MethodState.of(self, rows)

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        return FollowedForm.with_row_of_each_id(self, past)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        whole = self.smallest(tables)
        return whole if footprint_of(self.physical_tables(tables)).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size()


def numbers(count: int) -> RowSource:
    """(count,) int64 the numbers from 0."""
    return ComputedRows((count,), torch.int64, torch.arange)


class FullRoute(nn.Module):
    """Ids are rows; all there is to do is to refuse those that are not."""

    def __init__(self, keys: Sequence[str], check: RangeCheck) -> None:
        super().__init__()
        self._keys = list(keys)
        self.check = check

    def fused_routes(self) -> FusedRoutes:
        """An id's own row."""
        return FusedRoutes(by_key={key: [OwnRow()] for key in self._keys}, limits=self.check.limits)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return renamed(self.check(features), self._keys)


class RangeCheck(nn.Module):
    """Refuses ids outside `[0, num_embeddings)` on every device, before any kernel sees them.

    Kernels do not agree on such ids: on a CPU they raise without naming the feature, on CUDA they
    read row 0, and under row-wise sharding they may read another table's rows.

    A training step elsewhere than on a CPU does not wait for the answer: row 0 stands for a bad id, and
    the next step, or `wait`, raises.
    """

    def __init__(self, tables: Sequence[TableSpec]) -> None:
        super().__init__()
        self._instances = [(t.name, f) for t in tables for f in t.feature_names]
        self.limits = [t.num_embeddings for t in tables for _ in t.feature_names]
        self._limits = Constant(self.limits)
        self._each_limit = Constant.stacked(self._limits)
        self._late = LateFindings()

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features; raise a ValueError that names the first bad id, its feature and its table."""
        ids = features.values()
        if ids.is_meta:
            return features
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            self._refuse_in_program(features)  # the number of ids may be unknown
            return features
        if not ids.numel():
            return features
        if torch.compiler.is_exporting():
            self._refuse_in_program(features)
            return features
        if self.training and reads_wait(ids.device):
            self._raise_late(wait=False)
            return self._checked_late(features)
        self._raise_late(wait=True)
        if reads_wait(ids.device) and self._are_remainders(features):
            return features
        limits = self._limits.on(ids.device)
        if common_count(features) is not None:  # compare extremes: two passes, nothing stored
            low, high = ids.view(len(self._instances), -1).aminmax(dim=1)
            if not bool(((low < 0) | (high >= limits)).any()):
                return features
        limit = per_value(limits, features)
        bad = (ids < 0) | (ids >= limit)
        if bool(bad.any()):
            position = int(bad.nonzero()[0])
            raise ValueError(
                self._refusal(features.length_per_key(), position, int(ids[position].item()))
            )
        return features

    def _are_remainders(self, features: KeyedJaggedTensor) -> bool:
        """Whether ids stay what they are modulo their limits: two operations, whatever the features."""
        ids, limits = beside_ids(features, self._each_limit)
        return torch.equal(ids.remainder(limits[0]), ids)

    def wait(self) -> None:
        """Raise what earlier training steps found, however far the device is."""
        self._raise_late(wait=True)

    def _checked_late(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features with row 0 in the place of bad ids, the first of which is sent to the host."""
        ids = features.values()
        count = ids.numel()
        bad = (ids < 0) | (ids >= per_value(self._limits.on(ids.device), features))
        first = torch.where(bad, torch.arange(count, device=ids.device), count).amin().view(1)
        found = torch.cat([first, ids.index_select(0, first.clamp(max=count - 1)).long()])
        self._late.send(found, features.length_per_key())
        return renamed(features, list(features.keys()), torch.where(bad, 0, ids))

    def _raise_late(self, *, wait: bool) -> None:
        for found, counts in self._late.arrived(wait=wait):
            position, id_ = found.tolist()
            if position < sum(counts):
                raise ValueError(
                    f"{self._refusal(counts, position, id_)} It was in the batch of an earlier step, "
                    "in which row 0 took its place; a GPU is not waited for in every step."
                )

    def _refuse_in_program(self, features: KeyedJaggedTensor) -> None:
        """The same for a program (compiled or exported), which fails as a whole."""
        ids = features.values()
        limits = self._limits.on(ids.device)
        if torch.compiler.is_exporting() and common_count(features) is not None:
            ids, limit = ids.view(len(self._instances), -1), limits.unsqueeze(1)
        else:
            limit = per_value(limits, features)
        names = ", ".join(dict.fromkeys(feature for _, feature in self._instances))
        torch._assert_async(
            ((ids >= 0) & (ids < limit)).all(), f"an id of {names} is not in [0, num_embeddings)"
        )

    def _refusal(self, counts: Sequence[int], position: int, id_: int) -> str:
        ends = torch.tensor(counts).cumsum(0)
        instance = int(torch.searchsorted(ends, position, right=True))
        table, feature = self._instances[instance]
        limit = self._limits.on(torch.device("cpu"))[instance].item()
        return (
            f"feature {feature!r}: id {id_} is not in [0, {limit}), the rows of table {table!r}. "
            "Raise num_embeddings, map unseen ids to a row of their own, or choose a method that "
            "hashes (hash, unified)."
        )


def wait_for_checks(module: nn.Module) -> None:
    """Raise what the range checks inside a module found in training steps and nobody has read yet."""
    for part in module.modules():
        if isinstance(part, RangeCheck):
            part.wait()
