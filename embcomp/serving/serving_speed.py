"""How fast an artefact answers on this machine, beside what it stands for.

Four things answer the same batches in turn: the artefact; its tables uncompressed in TorchRec's
collection; the same by the compiled look-up, where there is one; and a raw gather of one float32 row an
id from one table, ids ready made, which is the least that uncompressed rows can do. Ids are drawn with
equal chances, from all over each table, and another batch comes with every call, so that no cache
holds what real traffic would not bring back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.backends import BACKENDS
from embcomp.collection.assembled import build_groups
from embcomp.collection.groups import table_features
from embcomp.collection.plan import ResolvedPlan
from embcomp.errors import ArtefactError
from embcomp.io.yaml_reading import bind_dataclass
from embcomp.models import MODELS, ModelInputs
from embcomp.serving.artefact_config import ArtefactConfig, LogicalTable, ModelRecord, TablesRecord
from embcomp.serving.artefact_loading import load
from embcomp.serving.fused.fused_lookup import FusedLookup
from embcomp.serving.fused.library import why_missing
from embcomp.serving.modules import ServingEmbeddingBagCollection, ServingModel
from embcomp.serving.serving_rows import HeldTable
from embcomp.tables.specs import specs_from_configs

_BATCHES = 32  # of each size and caller, taken in turn
_ROUNDS = 5  # in which all answer one after another
_LEAST_CALLS = 4  # of each in a round
_OF_MEMORY = 0.4  # of what is free: what uncompressed tables may take

Answer = Callable[[int], object]
"""Answers batch number n."""


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """Times of calls.

    Attributes:
        answers: who answered.
        batch_size: rows of a call.
        threads: callers at once, each on a core of its own where there are as many.
        calls: how many were timed.
        p50: microseconds that half of them took at most.
        p90: the same of nine tenths.
        p99: and of ninety-nine hundredths.
        rows_per_second: of all callers together.
    """

    answers: str
    batch_size: int
    threads: int
    calls: int
    p50: float
    p90: float
    p99: float
    rows_per_second: float


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """What was measured of an artefact.

    Attributes:
        artefact: its folder.
        latencies: of who answered, at each batch size and number of callers.
        bytes_per_row: bytes of tables, codes and bitmaps that one row of a batch reads, for the
            artefact and for uncompressed float32 rows.
        table_bytes: bytes of the tables altogether, of both.
        rows_held: the share of uncompressed rows that there was memory for; ids beyond them are
            taken modulo.
    """

    artefact: str
    latencies: Sequence[CallTimes]
    bytes_per_row: Mapping[str, int]
    table_bytes: Mapping[str, int]
    rows_held: float

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def measure_speed(
    artefact: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 64, 1024),
    threads: Sequence[int] = (1,),
    seconds: float = 1.0,
    mmap: bool = False,
) -> SpeedReport:
    """Time an artefact's answers beside those of uncompressed tables.

    Args:
        artefact: its folder; of pooled, unweighted tables or a model.
        batch_sizes: rows of a call.
        threads: how many callers there are at once.
        seconds: of each combination of who answers, batch size and callers, at least.
        mmap: as for `embcomp.load`.

    Raises:
        ArtefactError: it cannot be read, or has no tables that are pooled and unweighted.
    """
    folder = Path(artefact)
    config, serving = ArtefactConfig.read(folder), load(folder, mmap=mmap)
    record = config.tables if config.tables is not None else config.first_order
    if record is None or record.kind != "pooled" or record.is_weighted:
        raise ArtefactError(f"{folder}: only pooled tables without weights are measured")
    model: ServingModel | None = serving if isinstance(serving, ServingModel) else None
    collection = model.tables or model.first_order if model is not None else serving
    assert isinstance(collection, ServingEmbeddingBagCollection)
    held, limits = _rows_held(config), _limits(config)
    found: list[CallTimes] = []
    with _one_thread(), torch.inference_mode():
        full = _FullTables(config, held)
        for size in batch_sizes:
            batches = [_batch(limits, size, seed) for seed in range(_BATCHES)]
            answers = _answers(model, collection, full, record, batches)
            for callers in threads:
                found += _timed(answers, size, callers, seconds)
    return SpeedReport(
        artefact=str(folder),
        latencies=found,
        bytes_per_row={"artefact": bytes_of_a_row(collection), "full": full.row_bytes(record)},
        table_bytes={"artefact": record.bytes, "full": full.all_bytes(record)},
        rows_held=held,
    )


def bytes_of_a_row(collection: ServingEmbeddingBagCollection) -> int:
    """Bytes of rows, codes and bitmaps that one id for each feature reads; 0 where it is not known."""
    fused = collection.fused
    return 0 if fused is None else fused.bytes_of_a_row()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Calls that use one core each: several callers then share the machine as servers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows_held(config: ArtefactConfig) -> float:
    parts = [part for part in (config.tables, config.first_order) if part is not None]
    wanted = sum(4 * t.num_embeddings * t.embedding_dim for part in parts for t in part.tables)
    return min(1.0, _OF_MEMORY * psutil.virtual_memory().available / max(1, wanted))


def _limits(config: ArtefactConfig) -> dict[str, int]:
    """For each feature the ids that all tables take."""
    limits: dict[str, int] = {}
    for part in (config.tables, config.first_order):
        for table in [] if part is None else part.tables:
            for name in table.feature_names:
                limits[name] = min(table.num_embeddings, limits.get(name, table.num_embeddings))
    return limits


def _batch(limits: Mapping[str, int], size: int, seed: int) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, limit, (size,), generator=random) for limit in limits.values()]
    return KeyedJaggedTensor(
        keys=list(limits),
        values=torch.cat(ids),
        lengths=torch.ones(size * len(limits), dtype=torch.int32),
        stride=size,
        length_per_key=[size] * len(limits),
    )


class _FullTables:
    """The uncompressed tables of an artefact: one float32 table for each width, and views of it."""

    def __init__(self, config: ArtefactConfig, held: float) -> None:
        self._held = held
        self._role = "first_order" if config.tables is None else "tables"
        self.flat: dict[int, Tensor] = {}
        self._first: dict[tuple[str, str], int] = {}
        sizes: dict[int, int] = {}
        for role, part in (("tables", config.tables), ("first_order", config.first_order)):
            for table in [] if part is None else part.tables:
                self._first[role, table.name] = sizes.get(table.embedding_dim, 0)
                sizes[table.embedding_dim] = self._first[role, table.name] + self.rows(table)
        for dim, rows in sizes.items():
            self.flat[dim] = torch.rand(rows, dim)
        self.config = config

    def rows(self, table: LogicalTable) -> int:
        """How many rows of a table are held."""
        return max(1, int(self._held * table.num_embeddings))

    def row_bytes(self, record: TablesRecord) -> int:
        """Bytes that one id for each feature reads."""
        return sum(4 * t.embedding_dim * len(t.feature_names) for t in record.tables)

    def all_bytes(self, record: TablesRecord) -> int:
        """Bytes of all tables, whether held or not."""
        return sum(4 * t.embedding_dim * t.num_embeddings for t in record.tables)

    def view(self, role: str, table: LogicalTable) -> Tensor:
        """(rows, embedding_dim) its rows."""
        first = self._first[role, table.name]
        return self.flat[table.embedding_dim][first : first + self.rows(table)]

    def batch(self, batch: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The batch with ids that are held."""
        if self._held == 1:
            return batch
        limits = _limits(self.config)
        least = [max(1, int(self._held * limits[key])) for key in batch.keys()]
        sizes = torch.tensor(least).repeat_interleave(batch.stride())
        return KeyedJaggedTensor(
            keys=batch.keys(),
            values=batch.values() % sizes,
            lengths=batch.lengths(),
            stride=batch.stride(),
            length_per_key=batch.length_per_key(),
        )

    def collection(self, record: TablesRecord, role: str | None = None) -> EmbeddingBagCollection:
        """TorchRec's collection of them."""
        configs = [config for config in record.configs() if isinstance(config, EmbeddingBagConfig)]
        made = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        for table in record.tables:
            bag = made.embedding_bags[table.name]
            bag.weight = nn.Parameter(self.view(role or self._role, table), requires_grad=False)
            bag.num_embeddings = self.rows(table)
        return made.eval()

    def compiled(self, record: TablesRecord) -> FusedLookup:
        """The compiled look-up of them."""
        specs = specs_from_configs(record.configs())
        plan = ResolvedPlan(
            tables=tuple(specs),
            methods=dict.fromkeys((spec.name for spec in specs), BACKENDS["full"]()),
        )
        groups = build_groups(plan, unpooled=False)
        own = {table.name: table for table in record.tables}
        held = {
            name: HeldTable(
                dim=own[name].embedding_dim, row_type="fp32", rows=self.view(self._role, own[name])
            )
            for name in own
        }
        return FusedLookup(groups, held, table_features(plan.tables))

    def gathers(
        self, record: TablesRecord, batch: KeyedJaggedTensor
    ) -> list[tuple[Tensor, Tensor]]:
        """The ids and the table of each width: sample by sample, feature by feature."""
        parts, own = batch.to_dict(), dict[int, list[Tensor]]()
        for table in record.tables:
            for name in table.feature_names:
                first = self._first[self._role, table.name]
                own.setdefault(table.embedding_dim, []).append(parts[name].values() + first)
        return [(torch.stack(ids, 1).reshape(-1), self.flat[dim]) for dim, ids in own.items()]


def _answers(
    model: ServingModel | None,
    collection: ServingEmbeddingBagCollection,
    full: _FullTables,
    record: TablesRecord,
    batches: Sequence[KeyedJaggedTensor],
) -> dict[str, Answer]:
    """Who answers, by name."""
    held = [full.batch(batch) for batch in batches]
    found: dict[str, Answer] = {"artefact": lambda n: collection(batches[n]).values()}
    if why_missing() is None:
        compiled = full.compiled(record)
        found["full"] = lambda n: compiled.pooled(held[n], is_weighted=False)
    plain = full.collection(record)
    found["full, TorchRec"] = lambda n: plain(held[n]).values()
    gathers = [full.gathers(record, batch) for batch in held]
    found["raw gather"] = lambda n: [nn.functional.embedding(*each) for each in gathers[n]]
    if model is not None:
        network = _full_network(full)
        dense = torch.rand(batches[0].stride(), model.num_dense)
        found["model"] = lambda n: model(dense, batches[n])
        found["model, full, TorchRec"] = lambda n: network(dense, held[n])
    return found


def _full_network(full: _FullTables) -> nn.Module:
    """The same network around uncompressed tables."""
    config = full.config
    record = config.model
    assert isinstance(record, ModelRecord)
    inputs = ModelInputs(
        feature_names=tuple(record.feature_names),
        embedding_dim=record.embedding_dim,
        num_dense=record.num_dense,
        pooling=record.pooling,
    )
    settings: Any = bind_dataclass(MODELS[record.name], dict(record.settings))
    parts = {
        role: None if part is None else full.collection(part, role)
        for role, part in (("tables", config.tables), ("first_order", config.first_order))
    }
    network: nn.Module = settings.build(inputs, parts["tables"], parts["first_order"])
    return network.eval()


def _timed(
    answers: Mapping[str, Answer], size: int, callers: int, seconds: float
) -> list[CallTimes]:
    times: dict[str, list[float]] = {name: [] for name in answers}
    spent = dict.fromkeys(answers, 0.0)
    for answer in answers.values():
        for n in range(3):
            answer(n)
    for _ in range(_ROUNDS):
        for name, answer in answers.items():
            begin = time.perf_counter()
            times[name] += _called(answer, callers, seconds / _ROUNDS)
            spent[name] += time.perf_counter() - begin
    found = []
    for name in answers:
        p50, p90, p99 = (1e6 * float(p) for p in np.percentile(times[name], (50, 90, 99)))
        found.append(
            CallTimes(
                answers=name,
                batch_size=size,
                threads=callers,
                calls=len(times[name]),
                p50=p50,
                p90=p90,
                p99=p99,
                rows_per_second=size * len(times[name]) / spent[name],
            )
        )
    return found


def _called(answer: Answer, callers: int, seconds: float) -> list[float]:
    """Seconds of each call of some callers that begin together."""
    begin = threading.Barrier(callers)

    def call(caller: int) -> list[float]:
        times: list[float] = []
        begin.wait()
        with torch.inference_mode():
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(times) < _LEAST_CALLS:
                n = (7 * caller + len(times)) % _BATCHES
                start = time.perf_counter()
                answer(n)
                times.append(time.perf_counter() - start)
        return times

    if callers == 1:
        return call(0)
    with ThreadPoolExecutor(callers, thread_name_prefix="caller") as pool:
        return [each for own in pool.map(call, range(callers)) for each in own]
