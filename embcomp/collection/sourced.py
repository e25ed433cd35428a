"""Tables whose rows are read where they lie: compacted, cut, written and asked a few rows, never whole.

A `SourcedTables` stands where a `CompressedEmbeddingBagCollection` stands that is only looked up in. What
methods learn beside their rows (codes, bitmaps, projections) is in memory; of rows, what a batch needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embcomp.backends.base import MethodState
from embcomp.collection.assembled import PooledTables, build_groups
from embcomp.collection.group_states import GroupState
from embcomp.collection.groups import Group
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.reforming import compacted_states, sliced_states
from embcomp.layers.lazy_work import LAZY
from embcomp.layers.learned_buffers import fill_buffers, fill_stored, mark_filled
from embcomp.layers.named_parts import persistent_tensors
from embcomp.layers.row_sources import RowSource
from embcomp.tables.footprint import Footprint
from embcomp.tables.specs import PhysicalTable, specs_from_configs

ReadRows = Callable[[Group, PhysicalTable], RowSource]
Fill = Callable[[Group, str, str, Tensor], None]


class SourcedTables(PooledTables):
    """Pooled embeddings from rows that are read by range.

    Args:
        tables: TorchRec's configs of the logical tables.
        plan: the method of every table.
        groups: the methods as built, and filled with what they store beside their rows.
        sources: the rows of each physical table, of true width.
        is_weighted: whether ids carry weights.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        plan: ResolvedPlan,
        groups: Sequence[Group],
        sources: Mapping[str, RowSource],
        *,
        is_weighted: bool = False,
    ) -> None:
        super().__init__()
        self._configs, self._sources = list(tables), dict(sources)
        self._assemble(
            specs_from_configs(tables),
            plan,
            groups,
            lambda own: SourceRows(own, sources),
            device=torch.device("cpu"),
            is_weighted=is_weighted,
        )
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def read(
        cls, tables: Sequence[EmbeddingBagConfig], plan: ResolvedPlan, *, rows: ReadRows, fill: Fill
    ) -> SourcedTables:
        """Tables that are stored somewhere.

        Args:
            tables: TorchRec's configs of the logical tables.
            plan: the method of every table.
            rows: gives the rows of a physical table, of true width.
            fill: fills a tensor that a method stores beside them, in place; called with the group,
                `route` or `combine`, the name in that module's state dict, and the tensor.
        """
        groups = _built(plan)
        for group in groups:
            for part, module in group.modules():
                fill_stored(module, partial(fill, group, part))
        sources = {
            table.name: rows(group, table)
            for group in groups
            for table in group.backend.physical_tables
        }
        return cls(tables, plan, groups, sources)

    @classmethod
    def of_states(
        cls,
        tables: Sequence[EmbeddingBagConfig],
        plan: ResolvedPlan,
        states: Sequence[GroupState],
        *,
        is_weighted: bool = False,
    ) -> SourcedTables:
        """Tables in forms that are there; their rows stay where they are.

        Args:
            tables: TorchRec's configs of the logical tables.
            plan: the method of every table.
            states: the forms of all groups.
            is_weighted: whether ids carry weights.
        """
        groups, sources = _built(plan), {}
        for group in groups:
            form = next(each.form for each in states if each.form.config == group.config)
            _take_over(group, form)
            for table in group.backend.physical_tables:
                sources[table.name] = form.rows(table.name)
        return cls(tables, plan, groups, sources, is_weighted=is_weighted)

    @property
    def footprint(self) -> Footprint:
        """Predicted bytes."""
        return self._plan.footprint

    def states(self) -> list[GroupState]:
        """Every method with its tables and tensors; rows are read by range."""
        found = []
        for group in self._groups:
            tensors: dict[str, Tensor | RowSource] = {
                f"rows.{table.name}": self._sources[table.name]
                for table in group.backend.physical_tables
            }
            for part, module in group.modules():
                fill_buffers(module)
                own = persistent_tensors(module)
                tensors |= {f"{part}.{name}": tensor.detach() for name, tensor in own.items()}
            form = replace(MethodState.of(group.config, tensors), work=LAZY)
            found.append(GroupState(tables=group.tables, form=form))
        return found

    def compact(self) -> SourcedTables:
        """The same answers from serving forms alone, as of a CompressedEmbeddingBagCollection."""
        states = compacted_states(self.states())
        return self if states is None else self._with_states(states)

    def sliced(self, widths: Mapping[str, int]) -> SourcedTables:
        """The same tables with fewer columns, as of a CompressedEmbeddingBagCollection."""
        return self._with_states(sliced_states(self._plan, self.states(), widths))

    def _with_states(self, states: Sequence[GroupState]) -> SourcedTables:
        methods = {t.name: each.form.config for each in states for t in each.tables}
        plan = ResolvedPlan(self._plan.tables, methods)
        return self.of_states(self._configs, plan, states, is_weighted=self._is_weighted)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool, as a CompressedEmbeddingBagCollection does.

        Args:
            features: bags of int32 or int64 ids; B bags for each feature.

        Returns:
            (B, sum of embedding_dims), keys and widths as declared.
        """
        pooled, unpooled, selected = self.route(features)
        return self.combine(
            None if self.rows is None else self.rows(pooled),
            None if self.unpooled_rows is None else self.unpooled_rows(unpooled),
            selected,
        )


def _built(plan: ResolvedPlan) -> list[Group]:
    with torch.random.fork_rng(devices=[]):  # parts are drawn, then filled
        return build_groups(plan, unpooled=False)


@torch.no_grad()
def _take_over(group: Group, form: MethodState) -> None:
    """Fill what a method stores beside its rows; what the form does not have is as its config says."""
    for part, module in group.modules():
        own = persistent_tensors(module)
        held = {name: _held(form, f"{part}.{name}") for name in own}
        if None in held.values():
            fill_buffers(module)
        for name, tensor in held.items():
            if tensor is not None:
                own[name].copy_(tensor)
        mark_filled(module)


def _held(form: MethodState, name: str) -> Tensor | None:
    return form.sources[name].whole() if name in form.sources else form.tensors.get(name)


class SourceRows(nn.Module):
    """Physical rows of which each batch reads its own, summed as TorchRec's collections do.

    Args:
        groups: the methods whose look-ups are made here.
        sources: the rows of each physical table.
    """

    def __init__(self, groups: Sequence[Group], sources: Mapping[str, RowSource]) -> None:
        super().__init__()
        owners = {key: t.name for g in groups for t in g.backend.physical_tables for key in t.keys}
        self._sources = {key: sources[owners[key]] for g in groups for key in g.backend.keys}

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Sum the rows of every bag, weighted where the bags are: (B, sum of dims)."""
        bags = features.to_dict()
        return KeyedTensor(
            keys=list(self._sources),
            length_per_key=[source.shape[1] for source in self._sources.values()],
            values=torch.cat([_sums(bags[key], own) for key, own in self._sources.items()], dim=1),
        )


def _sums(bags: JaggedTensor, source: RowSource) -> Tensor:
    """(B, dim) float32 sums of the rows of each bag."""
    ids, places = torch.unique(bags.values().to(torch.int64), return_inverse=True)
    weights = bags.weights_or_none()
    if not len(ids):
        return torch.zeros(len(bags.lengths()), source.shape[1])
    rows = source.take(ids)
    return functional.embedding_bag(
        places,
        rows,
        bags.offsets().to(torch.int64),
        mode="sum",
        include_last_offset=True,
        per_sample_weights=None if weights is None else weights.to(rows.dtype),
    ).float()
