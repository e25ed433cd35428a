"""What `embcomp.load` returns: collections and models that only answer.

They are the collections of `embcomp.collection.collection` with stored rows in the place of trained ones: the
same `route`, the same `combine`, nothing that training needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embcomp.backends.base import MethodState
from embcomp.collection.assembled import (
    AssembledTables,
    PooledTables,
    UnpooledTables,
    build_groups,
)
from embcomp.collection.groups import Group, table_features
from embcomp.collection.held_rows import HeldRows
from embcomp.collection.single_table import embeddings_of
from embcomp.errors import ArtefactError, DataError
from embcomp.io.large_pages import ask_for_large_pages
from embcomp.layers.joined_matrices import JoinsTables
from embcomp.layers.learned_buffers import fill_stored
from embcomp.layers.named_parts import persistent_tensors, stored_tensors
from embcomp.serving.artefact_config import TablesRecord
from embcomp.serving.artefact_tensors import ArtefactTensor
from embcomp.serving.fused.fused_lookup import FusedLookup
from embcomp.serving.fused.library import why_missing
from embcomp.serving.fused.program import is_fusable
from embcomp.serving.rows_by_format import RowsByFormat
from embcomp.serving.serving_features import Features, as_features
from embcomp.serving.serving_rows import FusedRows, StoredTable, TorchRows, kernel_rows
from embcomp.tables.footprint import Footprint
from embcomp.tables.row_types import served_footprint, stored_dtype, stored_shape

MakeRows = Callable[[Sequence[Group], Mapping[str, StoredTable]], nn.Module]


def rows_class(rows: str, device: torch.device) -> MakeRows:
    """What reads the rows.

    Args:
        rows: `fused` or `fbgemm` (CPU only), `torch`, or `auto` for the fastest one that there is.
        device: where to serve.
    """
    if rows not in ("auto", "fused", "fbgemm", "torch"):
        raise ArtefactError(f"rows are read by auto, fused, fbgemm or torch; got {rows!r}")
    if rows in ("fused", "fbgemm") and device.type != "cpu":
        raise ArtefactError(f"rows={rows!r} serves on the CPU, not on {device}; take rows='torch'")
    if device.type != "cpu":
        return RowsByFormat
    if rows == "torch":
        return TorchRows
    missing = None if rows == "fbgemm" else why_missing()
    if rows == "fused" and missing is not None:
        raise ArtefactError(f"rows='fused' needs compiled code: {missing}; or take rows='auto'")
    return kernel_rows if rows == "fbgemm" or missing is not None else FusedRows


class _Serving(AssembledTables):
    """What both collections share.

    Args:
        record: the collection's description.
        tensors: its tensors, named as `rows.<table>`, `route.<method>.<name>` and
            `combine.<method>.<name>`; read here.
        make_rows: what reads the rows.
        device: where to serve.
        source: where the description stands, for errors.
    """

    def __init__(
        self,
        record: TablesRecord,
        tensors: Mapping[str, ArtefactTensor],
        *,
        make_rows: MakeRows,
        device: torch.device,
        source: str,
    ) -> None:
        super().__init__()
        self._record = record
        self._configs = record.configs()
        plan = record.resolved_plan(source)
        with torch.random.fork_rng(devices=[]):  # parts are drawn, then loaded
            groups = build_groups(plan, unpooled=self.unpooled)
        self._features = list(
            dict.fromkeys(name for table in plan.tables for name in table.feature_names)
        )
        _check_tensors(groups, record, tensors, source)
        for group in groups:
            for part, module in group.modules():
                fill_stored(module, partial(_read_into, tensors, f"{part}.{group.label}."))
        stored = {
            table.name: StoredTable(
                name=table.name,
                dim=table.embedding_dim,
                row_type=record.row_types[table.name],
                rows=tensors[f"rows.{table.name}"],
            )
            for group in groups
            for table in group.backend.physical_tables
        }
        if make_rows is FusedRows and not is_fusable(groups):
            make_rows = kernel_rows
        self._assemble(
            plan.tables,
            plan,
            groups,
            lambda own: make_rows(own, stored),
            device=device,
            is_weighted=record.is_weighted,
            need_indices=record.need_indices,
        )
        if make_rows is RowsByFormat:
            self.route.holder.held = HeldRows(reads_negative_ids=True)
            self.combine.pads = True
        for own in self.modules():
            if isinstance(own, JoinsTables):
                own.is_served = True
        self._instances = table_features(plan.tables)
        self._fused = self._fuse()
        dims = [instance.table.embedding_dim for instance in self._instances]
        self._output = ([instance.key for instance in self._instances], dims)
        self.requires_grad_(False)
        self.eval()
        self.to(device)

    def _batch(self, features: Features) -> KeyedJaggedTensor:
        return as_features(
            features,
            self._features,
            is_weighted=self._record.is_weighted,
            device=self._device,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": None}  # it knows addresses, which a copy has others of

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused = self._fuse()

    def _fuse(self) -> FusedLookup | None:
        held = [part for part in (self.rows, self.unpooled_rows) if part is not None]
        if not held or not all(isinstance(part, FusedRows) for part in held):
            return None
        tables = {name: table for part in held for name, table in part.tables().items()}
        return FusedLookup(self._groups, tables, self._instances)

    def _by_modules(self, batch: KeyedJaggedTensor) -> Any:
        pooled, unpooled, selected = self.route(batch)
        return self.combine(
            None if self.rows is None else self.rows(pooled),
            None if self.unpooled_rows is None else self.unpooled_rows(unpooled),
            selected,
        )

    def lookup(self, table: str, ids: Tensor | Sequence[int]) -> Tensor:
        """Embeddings of ids of one table, without bags or other features.

        Args:
            table: its name.
            ids: ids of any shape.

        Returns:
            (*ids.shape, embedding_dim) float32.

        Raises:
            DataError: there is no such table or id.
        """
        return embeddings_of(self, table, torch.as_tensor(ids))

    @property
    def fused(self) -> FusedLookup | None:
        """The compiled look-up of all features; None where modules answer."""
        return self._fused

    @property
    def record(self) -> TablesRecord:
        """How the artefact describes the collection."""
        return self._record

    @property
    def feature_names(self) -> list[str]:
        """The features that are looked up."""
        return list(self._features)

    @property
    def footprint(self) -> Footprint:
        """Bytes of the tables in the types that they are served in."""
        return served_footprint(self._plan.footprint, self._record.row_types)

    def form(self, index: int) -> MethodState:
        """A method in its serving form, without its rows: they are in another type."""
        group = self._groups[index]
        tensors: dict[str, Tensor] = {}
        for part, module in group.modules():
            tensors |= {f"{part}.{n}": t for n, t in persistent_tensors(module).items()}
        return MethodState(config=group.config, tensors=tensors)


class ServingEmbeddingBagCollection(_Serving, PooledTables):
    """Pooled embeddings from an artefact, where TorchRec's EmbeddingBagCollection is used."""

    def forward(self, features: Features) -> KeyedTensor:
        """Look up and pool.

        Args:
            features: a KeyedJaggedTensor, or for each feature (B,) ids or a pair of (N,) values
                and (B + 1,) offsets.

        Returns:
            (B, sum of embedding_dims) float32, keys and widths as declared.
        """
        batch = self._batch(features)
        if self._fused is not None and not torch.compiler.is_compiling():
            found = self._fused.pooled(batch, is_weighted=self._is_weighted)
            if found is not None:
                keys, dims = self._output
                return KeyedTensor(keys=keys, length_per_key=dims, values=found)
        return self._by_modules(batch)


class ServingEmbeddingCollection(_Serving, UnpooledTables):
    """One embedding per id from an artefact, where TorchRec's EmbeddingCollection is used."""

    def forward(self, features: Features) -> dict[str, JaggedTensor]:
        """Look up.

        Args:
            features: as for the pooled collection.

        Returns:
            For each feature (`feature@table` when it is in several tables) a JaggedTensor of
            (number of the feature's ids, embedding_dim) float32 values in B bags.
        """
        batch = self._batch(features)
        if self._fused is not None and not torch.compiler.is_compiling():
            found = self._fused.unpooled(batch)
            if found is not None:
                return self._jagged(batch, found)
        return self._by_modules(batch)

    def _jagged(self, batch: KeyedJaggedTensor, found: Sequence[Tensor]) -> dict[str, JaggedTensor]:
        parts = batch.to_dict()
        return {
            instance.key: JaggedTensor(
                values=values,
                lengths=parts[instance.feature].lengths(),
                weights=parts[instance.feature].values() if self._need_indices else None,
            )
            for instance, values in zip(self._instances, found)
        }


@final
class ServingModel(nn.Module):
    """A CTR model from an artefact: a network around serving tables.

    Args:
        network: takes dense values and a KeyedJaggedTensor, and returns logits.
        feature_names: the features that it looks up.
        num_dense: its numeric features.
        device: where to serve.
    """

    def __init__(
        self, network: nn.Module, feature_names: Sequence[str], num_dense: int, device: torch.device
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False).to(device)
        self.feature_names = list(feature_names)
        self.num_dense = num_dense
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def tables(self) -> ServingEmbeddingBagCollection | None:
        """The embedding tables; None for a model without any."""
        return self._collection("tables")

    @property
    def first_order(self) -> ServingEmbeddingBagCollection | None:
        """The first-order tables; None for a model without any."""
        return self._collection("first_order_tables")

    def _collection(self, name: str) -> ServingEmbeddingBagCollection | None:
        found = dict(self.network.named_children()).get(name)
        return found if isinstance(found, ServingEmbeddingBagCollection) else None

    def forward(self, dense: Tensor | None, sparse: Features) -> Tensor:
        """Score rows.

        Args:
            dense: (B, I) float32 values, transformed as the dataset says; None without any.
            sparse: a KeyedJaggedTensor, or for each feature (B,) ids or a pair of (N,) values and
                (B + 1,) offsets.

        Returns:
            (B,) float32 logits; their sigmoid is the probability of a click.
        """
        batch = as_features(sparse, self.feature_names, is_weighted=False, device=self._device)
        if dense is None:
            dense = torch.zeros(batch.stride(), 0)
        if dense.dim() != 2 or dense.shape != (batch.stride(), self.num_dense):
            raise DataError(
                f"expected dense values of shape ({batch.stride()}, {self.num_dense}), got "
                f"{tuple(dense.shape)}"
            )
        return self.network(dense.to(self._device, torch.float32), batch)


def _read_into(tensors: Mapping[str, ArtefactTensor], prefix: str, name: str, own: Tensor) -> None:
    ask_for_large_pages(own)
    tensors[prefix + name].read_into(own)


def expected_tensors(
    groups: Sequence[Group], record: TablesRecord
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor that a description asks for."""
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for group in groups:
        for table in group.backend.physical_tables:
            row_type = record.row_types.get(table.name)
            if row_type is not None:
                wanted[f"rows.{table.name}"] = (
                    stored_shape(table.num_embeddings, table.embedding_dim, row_type),
                    stored_dtype(row_type),
                )
        for part, module in group.modules():
            for name, tensor in stored_tensors(module, persistent_tensors(module)).items():
                wanted[f"{part}.{group.label}.{name}"] = (tuple(tensor.shape), tensor.dtype)
    return wanted


def _check_tensors(
    groups: Sequence[Group],
    record: TablesRecord,
    tensors: Mapping[str, ArtefactTensor],
    source: str,
) -> None:
    physical = {table.name for group in groups for table in group.backend.physical_tables}
    if physical != set(record.row_types):
        odd = ", ".join(sorted(physical ^ set(record.row_types)))
        raise ArtefactError(f"{source}: row_types and the physical tables differ in {odd}")
    check_shapes(expected_tensors(groups, record), tensors, source)


def check_shapes(
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Mapping[str, ArtefactTensor],
    source: str,
) -> None:
    """Raise an ArtefactError unless the tensors are the wanted ones."""
    for name, (shape, dtype) in wanted.items():
        if name not in tensors:
            raise ArtefactError(f"{source}: the tensor {name} is missing; export the run again")
        came = tensors[name]
        if tuple(came.shape) != shape or came.dtype != dtype:
            raise ArtefactError(
                f"{source}: the tensor {name} should be {dtype} of shape {shape}, but is "
                f"{came.dtype} of shape {tuple(came.shape)}; export the run again"
            )
    odd = sorted(set(tensors) - set(wanted))
    if odd:
        raise ArtefactError(f"{source}: no method wants the tensors {', '.join(odd)}")
