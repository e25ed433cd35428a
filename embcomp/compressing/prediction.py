"""What methods would make of a checkpoint's tables, from a sample of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp.backends import BACKENDS
from embcomp.backends.base import BackendConfig, MethodState
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import UNCOMPRESSED, ResolvedPlan
from embcomp.collection.single_table import embeddings_of
from embcomp.collection.table_row_types import RowTypes
from embcomp.compressing.approximation import Approximated, approximate
from embcomp.compressing.approximation_error import measure
from embcomp.compressing.sizing import plan_within, served_bytes
from embcomp.compressing.source_compression import OpenedJob
from embcomp.errors import BudgetError
from embcomp.layers.block_work import IN_MEMORY
from embcomp.layers.row_sources import MemoryRows
from embcomp.layers.spread_rows import read_spread, spread_runs
from embcomp.tables.row_types import RowType, pack, unpack
from embcomp.tables.specs import TableSpec

SAMPLED = 1 << 14
"""Rows of a table that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one method would make of the tables.

    Attributes:
        method: its name.
        types: how rows would be stored.
        bytes: what the tables would take, at the most; None where no size fits the budget.
        error: as of `TableError`, on the sample, of all tables by their bytes; None without `bytes`.
    """

    method: str
    types: str
    bytes: int | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Rows of each table, as tables of their own."""

    specs: Sequence[TableSpec]
    rows: dict[str, Tensor]
    counts: dict[str, Tensor]


def predict(opened: OpenedJob) -> Iterator[Prediction]:
    """Try the job's method, and then the others, on a sample of rows.

    Args:
        opened: the job.

    Raises:
        DataError: sampled rows with NaN, or files that end early.
    """
    sample = _sampled(opened)
    job = opened.job
    sized = opened.sized({table.spec.name: table.rows() for table in opened.tables}, IN_MEMORY)
    yield _predicted(opened, sample, sized, job.method, job.types)
    for method, types in _others(job.method, job.types):
        try:
            plan = plan_within(method, opened.specs, opened.allowed, types)
        except BudgetError:
            yield Prediction(method=method.name, types=str(types))
            continue
        yield _predicted(opened, sample, plan, method, types)


def _others(method: BackendConfig, types: RowTypes) -> Iterator[tuple[BackendConfig, RowTypes]]:
    for wanted in ("fp16", "int8", "int4"):
        own = RowTypes.of(wanted)
        if (method, types) != (UNCOMPRESSED, own):
            yield UNCOMPRESSED, own
    for kind in BACKENDS.values():
        if kind.approximates and kind.compresses and kind is not type(method):
            yield kind(), types


def _sampled(opened: OpenedJob) -> _Sample:
    specs, rows, counts = [], {}, {}
    for table in opened.tables:
        spec, source = table.spec, table.rows()
        ids = spread_runs(spec.num_embeddings, SAMPLED)
        rows[spec.name] = read_spread(source, ids)
        specs.append(replace(spec, num_embeddings=len(ids)))
        if spec.name in opened.counts:
            counts[spec.name] = opened.counts[spec.name][ids]
    return _Sample(specs=specs, rows=rows, counts=counts)


@torch.no_grad()
def _predicted(
    opened: OpenedJob, sample: _Sample, plan: ResolvedPlan, method: BackendConfig, types: RowTypes
) -> Prediction:
    methods = dict(plan.methods)
    if method.learns_size:  # its size is the sample's share of the whole
        full = sum(spec.full_bytes for spec in opened.specs)
        own = sum(spec.full_bytes for spec in sample.specs)
        sized = method.fit_budget(sample.specs, max(1, opened.allowed * own // full))
        methods = {name: sized if found.learns_size else found for name, found in methods.items()}
    rows = {name: MemoryRows(own) for name, own in sample.rows.items()}
    found = approximate(ResolvedPlan(tuple(sample.specs), methods), rows, counts=sample.counts)
    tables = _collection(sample, found, types)
    lost = whole = 0.0
    for spec, real in zip(sample.specs, opened.specs):
        error = measure(
            spec,
            rows[spec.name],
            lambda table, ids: embeddings_of(tables, table, ids),
            counts=sample.counts.get(spec.name),
            work=IN_MEMORY,
        )
        lost += real.full_bytes * error.error**2
        whole += real.full_bytes
    return Prediction(
        method=method.name,
        types=str(types),
        bytes=min(served_bytes(plan, types), opened.allowed),
        error=(lost / whole) ** 0.5,
    )


def _collection(
    sample: _Sample, found: Approximated, types: RowTypes
) -> CompressedEmbeddingBagCollection:
    """The sample's tables, their rows rounded as they would be stored."""
    configs = [
        EmbeddingBagConfig(
            name=spec.name,
            num_embeddings=spec.num_embeddings,
            embedding_dim=spec.embedding_dim,
            feature_names=list(spec.feature_names),
        )
        for spec in sample.specs
    ]
    tables = CompressedEmbeddingBagCollection(configs, found.plan)
    stored: dict[str, RowType] = {}
    for group in tables.groups:
        stored |= types.of_physical(group.tables, group.backend.physical_tables)
    states = [
        GroupState(tables=each.tables, form=_rounded(each.form.in_memory(), stored))
        for each in found.states
    ]
    tables.load_states(states)
    return tables.eval()


def _rounded(form: MethodState, types: dict[str, RowType]) -> MethodState:
    tensors = dict(form.tensors)
    for name, own in types.items():
        key = f"rows.{name}"
        if key in tensors and own != "fp32":
            tensors[key] = unpack(pack(tensors[key], own), tensors[key].shape[1], own)
    return replace(form, tensors=tensors)
