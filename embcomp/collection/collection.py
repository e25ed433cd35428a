"""Compressed tables where TorchRec's collections are used.

`route`, `rows` and `combine` are children of the collection, called one after another: the
only shape in which TorchRec shards the inner collection, pipelines it and moves `route` ahead of
it. Their names, and those of the physical tables, are the format of checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.quant.embedding_modules import (
    EmbeddingBagCollection as QuantEmbeddingBagCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from typing_extensions import Self

from embcomp.backends.base import BackendConfig
from embcomp.collection.assembled import (
    AssembledTables,
    PooledTables,
    UnpooledTables,
    build_groups,
)
from embcomp.collection.combine import Combine
from embcomp.collection.group_states import GroupState, pad_columns, read_states, state_tensors
from embcomp.collection.groups import Group
from embcomp.collection.held_rows import HeldRows
from embcomp.collection.plan import Plan, ResolvedPlan
from embcomp.collection.reforming import compacted_states, sliced_states
from embcomp.collection.row_reading import RowReader
from embcomp.collection.scripted import ScriptedBags, ScriptedRows
from embcomp.collection.table_identity import check_tables, is_mark
from embcomp.collection.table_views import TableViews
from embcomp.collection.torchrec_keys import refusals, take_over, warn_of_untouched
from embcomp.errors import CheckpointError, ConfigError
from embcomp.io.lazy_names import warn_renamed
from embcomp.io.yaml_reading import listed
from embcomp.layers.id_counts import check_counts
from embcomp.layers.learned_buffers import Penalised, overwriting, penalty_of
from embcomp.layers.row_sources import RowSource
from embcomp.layers.traced_leaves import with_types
from embcomp.tables.footprint import Footprint
from embcomp.tables.row_types import pack
from embcomp.tables.specs import PhysicalTable, TableSpec, specs_from_configs

# Attributes of a module dictionary are names that TorchRec cannot keep a table under.
_NO_TABLES = nn.ModuleDict()

AnyPlan = Plan | ResolvedPlan | BackendConfig | Mapping[str, BackendConfig] | None


def _inner(
    groups: Sequence[Group], *, is_weighted: bool, device: torch.device | None
) -> EmbeddingBagCollection:
    """The TorchRec collection that holds the groups' rows."""
    tables = [table.config() for group in groups for table in group.backend.physical_tables]
    taken = [table.name for table in tables if hasattr(_NO_TABLES, table.name)]
    if taken:
        raise ConfigError(
            f"TorchRec cannot hold a table called {taken[0]!r}, which is an attribute of "
            f"torch.nn.ModuleDict; give the table another name"
        )
    return EmbeddingBagCollection(tables=tables, is_weighted=is_weighted, device=device)


class _Compressed(AssembledTables):
    """What both collections share: the rows that TorchRec holds, and their bytes."""

    def _set_up(
        self,
        specs: list[TableSpec],
        plan: AnyPlan,
        *,
        device: torch.device | None,
        is_weighted: bool = False,
        need_indices: bool = False,
    ) -> None:
        place = (
            device or torch.empty(0).device
        )  # of a `with torch.device(...)` around us, or the CPU
        resolved = _resolved(plan, specs)
        with place:  # learnt buffers, as long as a vocabulary, are made where they belong
            groups = build_groups(resolved, unpooled=self.unpooled)
        self._physical = [t for group in groups for t in group.backend.physical_tables]
        self._assemble(
            specs,
            resolved,
            groups,
            partial(_inner, is_weighted=is_weighted, device=place),
            device=place,
            is_weighted=is_weighted,
            need_indices=need_indices,
        )

        self._holder = self.route.holder
        self._writes_rows = self.route.writes_rows
        self._packed = [table.name for table in self._physical if table.is_packed]
        assert isinstance(self.combine, Combine)
        self._pooled_rows = RowReader([group for group in groups if not group.unpooled])
        self._rows_of_one = RowReader(
            [group for group in groups if group.unpooled], self.combine.joined
        )

    @property
    def footprint(self) -> Footprint:
        """Predicted bytes; `serving_tensors` holds exactly `footprint.serve_bytes`."""
        return self._plan.footprint

    @property
    def physical_tables(self) -> list[PhysicalTable]:
        """The tables that TorchRec holds."""
        return list(self._physical)

    def inner_collections(self) -> Iterator[nn.Module]:
        """The TorchRec collections that hold the rows, sharded or not."""
        for inner in (self.rows, self.unpooled_rows):
            if inner is not None:
                yield inner

    def _tell_route(self, features: KeyedJaggedTensor) -> None:
        """Let it know what holds the rows by now: TorchRec puts sharded collections in our place."""
        if self._packed and isinstance(self.unpooled_rows, QuantEmbeddingBagCollection):
            raise ConfigError(
                f"rows of {listed(self._packed)} are stored integers, which quantising has rounded as if they were "
                "weights; they take 8 or 16 bits a weight as they are: leave their collection out"
            )
        traced = isinstance(features, torch.fx.Proxy)
        held = HeldRows.by(self.unpooled_rows)
        writes = self.unpooled_rows if self._writes_rows else None
        equal = HeldRows.by(self.rows).equal_among is not None
        self._holder.tell(held, writes, equal_bags=equal, traced=traced)

    def _read_pooled(self, bags: Any) -> Any:
        """Rows of look-ups whose bags are pooled."""
        return self._pooled_rows.pooled(self.rows, bags)

    def _read_unpooled(self, bags: Any) -> Any:
        """Rows of look-ups in bags of one."""
        if isinstance(bags, KeyedJaggedTensor) and bags.variable_stride_per_key():
            return self._rows_of_one.by_key(self.unpooled_rows, bags)
        return self._rows_of_one.pooled(self.unpooled_rows, bags)

    def penalty(self) -> Tensor | None:
        """What the last forward pass in training mode adds to the loss, where a method says so.

        A training loop of your own adds it to its loss; `embcomp train` does.
        """
        return penalty_of(self.combine)

    def plan_steps(self, steps: int) -> None:
        """Say how many steps a training will have, for methods that pull at their structure in each.

        A training loop of your own calls it before the first step; `embcomp train` does.
        """
        for part in self.combine.modules():
            if isinstance(part, Penalised):
                part.planned_steps = steps

    @property
    def may_stop_rows(self) -> bool:
        """Whether a method has learnt thresholds that rows may not pass."""
        return any(isinstance(p, Penalised) and p.stops_rows for p in self.combine.modules())

    def _scripted(self, rows: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The children as TorchScript compiles them."""
        combine = self.combine
        assert isinstance(combine, Combine)
        return self.route.__prepare_scriptable__(), rows, combine.__prepare_scriptable__()

    def lookup_features(self) -> dict[str, str]:
        """The feature of each physical look-up, by the name that TorchRec knows it by."""
        return {str(key): key.feature for table in self._physical for key in table.lookups}

    def detach_rows(self, detached: bool) -> None:
        """Keep gradients from the rows, as when only a method's structure learns, or stop that."""
        combine = self.combine
        assert isinstance(combine, Combine)
        combine.detach_rows(detached)

    def settle(self) -> None:
        """Do what the last step left for the beginning of the next, before anybody reads what was learnt.

        A training loop of your own calls it on all ranks before a checkpoint of sharded tables; `embcomp train`
        does. Tables that are not sharded settle by themselves.
        """
        if self._writes_rows and self.unpooled_rows is not None:
            self.route.write_rows(self.unpooled_rows)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if isinstance(self.unpooled_rows, EmbeddingBagCollection):
            self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def states(self) -> list[GroupState]:
        """Every method with its tables and tensors; only for a collection that is not sharded."""
        self.settle()
        return read_states(self._groups, self._inner_weights())

    def forms(self) -> list[GroupState]:
        """The old name of `states`."""
        warn_renamed("forms()", "states()")
        return self.states()

    def load_forms(self, forms: Sequence[GroupState]) -> None:
        """The old name of `load_states`."""
        warn_renamed("load_forms()", "load_states()")
        self.load_states(forms)

    def _inner_weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for inner in self.inner_collections():
            if not isinstance(inner, EmbeddingBagCollection):
                raise TypeError(
                    "expected an unsharded collection; load the checkpoint into one to export it"
                )
            weights |= {name: bag.weight for name, bag in inner.embedding_bags.items()}
        return weights

    def serving_tensors(self) -> dict[str, Tensor]:
        """What must be resident to answer look-ups, as `compact` leaves it.

        Only for a collection that is not sharded; load a checkpoint into one to export it.
        """
        compacted = self.compact()
        weights = compacted._inner_weights()
        tensors = {
            table.name: _served(table, weights[table.name].detach()[:, : table.embedding_dim])
            for table in compacted._physical
        }
        for part, module in (("route", compacted.route), ("combine", compacted.combine)):
            state = module.state_dict().items()
            tensors |= {f"{part}.{key}": value for key, value in state if not is_mark(key)}
        return tensors

    def compact(self, counts: Mapping[str, Tensor] | None = None) -> Self:
        """The same answers from serving forms alone: nothing pruned is left, no mask is kept.

        A collection whose methods are serving forms already is returned as it is. Only for a
        collection that is not sharded.

        Args:
            counts: for each table by name, (num_embeddings,) how often each id occurs in what was
                trained on. Where a method's `target_bytes` prune rows, they are ranked by norm times
                count, and ids that never occur go first; rows of tables that are not named are
                ranked by norm alone.

        Raises:
            ConfigError: for counts of tables that are not there, or that cannot be counts.
        """
        known = counts or {}
        check_counts(self._plan.tables, known)
        compacted = compacted_states(self.states(), known)
        return self if compacted is None else self._with_states(compacted)

    def sliced(self, widths: Mapping[str, int]) -> Self:
        """The same tables with fewer columns, of methods that train every prefix of a row.

        Args:
            widths: columns by table.

        Raises:
            ConfigError: for a table or a width that is not there, or a method that cannot.
        """
        return self._with_states(sliced_states(self._plan, self.states(), widths))

    def _with_states(self, states: Sequence[GroupState]) -> Self:
        """This collection rebuilt from other forms of its tables."""
        methods = {t.name: each.form.config for each in states for t in each.tables}
        rebuilt = self._rebuilt(ResolvedPlan(self._plan.tables, methods))
        rebuilt.load_states(states)
        rebuilt.train(self.training)
        return rebuilt

    def _rebuilt(self, plan: ResolvedPlan) -> Self:
        raise NotImplementedError

    def load_states(self, states: Sequence[GroupState]) -> None:
        """Fill this collection with tensors in the forms that it was built from.

        Args:
            states: any number of them for one group of this collection.
        """
        came = self.state_of(states)
        with overwriting(self, came):
            state = self.state_dict()
            for name, tensor in came.items():
                whole = tensor.whole() if isinstance(tensor, RowSource) else tensor
                state[name] = pad_columns(whole, state[name])
            self.load_state_dict(state)

    def state_of(self, states: Sequence[GroupState]) -> dict[str, Tensor | RowSource]:
        """The forms' tensors by their names in the collection's state dict, without padding."""
        return {
            name: tensor
            for group in self._groups
            for each in states
            if each.form.config == group.config
            for name, tensor in state_tensors(group, each.form).items()
        }

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_over(self._groups, state_dict, prefix)
        warn_of_untouched(self._groups, state_dict, prefix)
        check_tables(self._groups, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _filled_from(self, original: nn.Module, *, strict: bool) -> Self:
        """This collection with the rows of one of TorchRec's."""
        refused = refusals(self._groups, [table.name for table in self._declared])
        if strict and refused:
            raise CheckpointError(
                f"whole rows cannot fill {listed(refused)}; hold them full, or by what a method in stages "
                "begins with (method.first_method()), or let them start anew with strict=False"
            )
        state = original.state_dict()
        if self.device.type != "meta" and not any(rows.is_meta for rows in state.values()):
            self.load_state_dict(state, strict=strict)
        self.train(original.training)
        return self


def _served(table: PhysicalTable, rows: Tensor) -> Tensor:
    """A physical table's rows as they are resident: packed where its method has chosen a type."""
    return rows.contiguous() if table.row_type is None else pack(rows.cpu(), table.row_type)


class CompressedEmbeddingBagCollection(_Compressed, PooledTables):
    """Pooled embeddings from compressed tables, in place of TorchRec's EmbeddingBagCollection.

    Args:
        tables: TorchRec's table configs. They are read, never changed.
        plan: a method for all tables, methods by table name, or a Plan; all full by default.
        is_weighted: whether ids carry weights. Averaged bags are then `sum(w * e) / length`,
            as in FBGEMM's kernels.
        device: where to build; `meta` to allocate nothing.

    Raises:
        ConfigError: for tables or a plan that cannot be.
        BudgetError: for a budget below the floor, which the text names.

    Example::

        tables = [EmbeddingBagConfig(name="t", embedding_dim=16, num_embeddings=10**6,
                                     feature_names=["f"])]
        collection = CompressedEmbeddingBagCollection(tables, Unified(budget="10%"))
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        plan: AnyPlan = None,
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        specs = specs_from_configs(tables)
        self._configs = _logical_configs(tables, specs)
        self._set_up(specs, plan, device=device, is_weighted=is_weighted)

    @classmethod
    def from_embedding_bag_collection(
        cls, collection: EmbeddingBagCollection, plan: AnyPlan = None, *, strict: bool = True
    ) -> Self:
        """The tables of one of TorchRec's collections, with their rows where these are held whole.

        Args:
            collection: not sharded; it is read, never changed.
            plan: as for a new collection. Methods in stages begin with whole tables
                (`method.first_method()`).
            strict: whether methods that do not hold whole rows are an error. If not, their tables start
                anew, and a warning names them.

        Raises:
            ConfigError: for tables or a plan that cannot be, or a collection of another kind.
            CheckpointError: for tables that cannot take whole rows.
        """
        _expect(collection, EmbeddingBagCollection)
        tables, weighted = collection.embedding_bag_configs(), collection.is_weighted()
        new = cls(tables, plan, is_weighted=weighted, device=collection.device)
        return new._filled_from(collection, strict=strict)

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles in this module's place."""
        return ScriptedBags(*self._scripted(self.rows))

    @property
    def embedding_bags(self) -> TableViews:
        """The tables that are held whole, by name, to read; only while nothing is sharded."""
        return TableViews(self._groups, self._inner_weights)

    def _rebuilt(self, plan: ResolvedPlan) -> Self:
        return type(self)(self._configs, plan, self._is_weighted, self._device)

    @with_types
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        Args:
            features: bags of int32 or int64 ids; B bags for each feature.

        Returns:
            (B, sum of embedding_dims), keys and widths as declared: the feature's name, or
            `feature@table` when a feature is in several tables. Empty bags give zeros.
        """
        # Traced by the train pipeline: no look at the batch here, and no call but of children.
        self._tell_route(features)
        x = self.route(features)
        if self.unpooled_rows is None:
            return self.combine(None if self.rows is None else self._read_pooled(x[0]), None, x[2])
        if self.rows is None:
            return self.combine(None, self._read_unpooled(x[1]), x[2])
        return self.combine(self._read_pooled(x[0]), self._read_unpooled(x[1]), x[2])


class CompressedEmbeddingCollection(_Compressed, UnpooledTables):
    """One embedding per id from compressed tables, in place of TorchRec's EmbeddingCollection.

    Args:
        tables: TorchRec's table configs. They are read, never changed.
        plan: a method for all tables, methods by table name, or a Plan; all full by default.
        device: where to build; `meta` to allocate nothing.
        need_indices: whether the ids go along, as the JaggedTensors' weights.

    Raises:
        ConfigError: for tables or a plan that cannot be.
        BudgetError: for a budget below the floor, which the text names.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        plan: AnyPlan = None,
        device: torch.device | None = None,
        need_indices: bool = False,
    ) -> None:
        super().__init__()
        specs = specs_from_configs(tables)
        dims = sorted({table.embedding_dim for table in specs})
        if len(dims) > 1:
            raise ConfigError(f"tables of one collection must have one embedding_dim, got {dims}")
        self._configs = _logical_configs(tables, specs)
        self._set_up(specs, plan, device=device, need_indices=need_indices)

    @classmethod
    def from_embedding_collection(
        cls, collection: EmbeddingCollection, plan: AnyPlan = None, *, strict: bool = True
    ) -> Self:
        """The tables of one of TorchRec's collections, with their rows where these are held whole.

        Args:
            collection: not sharded; it is read, never changed.
            plan: as for a new collection. Methods in stages begin with whole tables
                (`method.first_method()`).
            strict: whether methods that do not hold whole rows are an error. If not, their tables start
                anew, and a warning names them.

        Raises:
            ConfigError: for tables or a plan that cannot be, or a collection of another kind.
            CheckpointError: for tables that cannot take whole rows.
        """
        _expect(collection, EmbeddingCollection)
        tables, indices = collection.embedding_configs(), collection.need_indices()
        new = cls(tables, plan, device=collection.device, need_indices=indices)
        return new._filled_from(collection, strict=strict)

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles in this module's place."""
        return ScriptedRows(*self._scripted(self.unpooled_rows))

    @property
    def embeddings(self) -> TableViews:
        """The tables that are held whole, by name, to read; only while nothing is sharded."""
        return TableViews(self._groups, self._inner_weights)

    def _rebuilt(self, plan: ResolvedPlan) -> Self:
        return type(self)(self._configs, plan, self._device, self._need_indices)

    @with_types
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look up.

        Args:
            features: bags of int32 or int64 ids; B bags for each feature.

        Returns:
            For each feature (`feature@table` when it is in several tables) a JaggedTensor of
            (number of the feature's ids, embedding_dim) values in B bags.
        """
        self._tell_route(features)
        x = self.route(features)
        rows = None if self.unpooled_rows is None else self._read_unpooled(x[1])
        return self.combine(None, rows, x[2])


def _resolved(plan: AnyPlan, specs: Sequence[TableSpec]) -> ResolvedPlan:
    """The plan with its sizes; of no tables, as TorchRec's collections may have, whatever the plan."""
    if specs or isinstance(plan, ResolvedPlan):
        return plan if isinstance(plan, ResolvedPlan) else Plan.of(plan).resolve(specs)
    return ResolvedPlan((), {})


def _expect(collection: object, kind: type) -> None:
    if not isinstance(collection, kind):
        raise ConfigError(
            f"expected TorchRec's {kind.__name__}, not sharded, got a {type(collection).__name__}; "
            "of a sharded one, load the checkpoint"
        )


def _logical_configs(tables: Sequence, specs: Sequence[TableSpec]) -> list:
    """The user's configs, with the feature names that TorchRec would have written into them."""
    return [
        dataclasses.replace(table, feature_names=list(spec.feature_names))
        for table, spec in zip(tables, specs)
    ]
