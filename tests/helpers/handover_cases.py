"""Hand-overs of every method in stages, without any training: what goes in, and what comes out on ranks."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embcomp.backends.autodim import AutoDim
from embcomp.backends.base import BackendConfig, MethodState, StageInputs
from embcomp.backends.cce import CCE, ClusteredRoute
from embcomp.backends.codebooks.low_rank import LowRank
from embcomp.backends.codebooks.lr2vq import LR2VQ
from embcomp.backends.codebooks.mgqe import MGQE
from embcomp.backends.codebooks.pq import PQ
from embcomp.backends.deeplight import DeepLight
from embcomp.backends.dnis import DNIS
from embcomp.backends.full import Full
from embcomp.backends.pep import PEP
from embcomp.backends.widths.matryoshka import Matryoshka
from embcomp.backends.widths.optembed import OptEmbed
from embcomp.io.tensor_checksums import bytes_of
from embcomp.layers import block_work
from embcomp.layers.block_work import IN_MEMORY, LEAST_ROWS, MemoryWork, Work
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.specs import TableSpec, by_name
from embcomp.training.distributed.process import Process
from embcomp.training.stages import folder_work
from embcomp.training.stages.folder_work import FolderWork
from embcomp.training.stages.work_progress import WorkProgress

DIM = 8
SIZES = {"big": 2600, "middle": 777, "small": 40}
BLOCK = LEAST_ROWS * DIM * 4
"""Bytes of the smallest block."""


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """One stage's beginning.

    Attributes:
        method: the method.
        stage: the stage's name.
        before: the methods of the stages before, whose forms follow from each other.
        results: what searches found.
    """

    method: BackendConfig
    stage: str
    before: tuple[str, ...] = ()
    results: dict[str, Any] = field(default_factory=dict)


FOUND = {"search": {"kept": 1200, "widths": {"big": 5, "middle": 8, "small": 2}}}
VQ: dict[str, Any] = {"subvector_dim": 4, "num_codewords": 4}
CASES: dict[str, HandOver] = {
    "pq": HandOver(method=PQ(**VQ), stage="codes"),
    "pq by table": HandOver(
        method=PQ(subvector_dim=3, num_codewords=8, codebooks="table"), stage="codes"
    ),
    "low_rank": HandOver(
        method=LowRank(latent_dim=2, subvector_dim=4, bias=True), stage="low_rank"
    ),
    "lr2vq quantize": HandOver(
        method=LR2VQ(latent_dim=2, **VQ), stage="quantize", before=("low_rank",)
    ),
    "lr2vq codes": HandOver(method=LR2VQ(latent_dim=4, **VQ), stage="codes", before=("quantize",)),
    "matryoshka": HandOver(method=Matryoshka(target_bytes=40_000), stage="finetune", results=FOUND),
    "autodim": HandOver(method=AutoDim(target_bytes=60_000), stage="retrain"),
    "optembed": HandOver(method=OptEmbed(), stage="retrain", results=FOUND),
    "optembed inherit": HandOver(
        method=OptEmbed(prune="rows", inherit=True), stage="retrain", results=FOUND
    ),
    "dnis search": HandOver(method=DNIS(serve_bytes=20_000), stage="search"),
    "dnis": HandOver(method=DNIS(serve_bytes=20_000), stage="retrain", before=("search",)),
    "mgqe": HandOver(method=MGQE(subvector_dim=4, num_codewords=16), stage="codes"),
    "cce": HandOver(method=CCE(ratio=0.1), stage="clustered_1"),
    "cce again": HandOver(
        method=CCE(ratio=0.02, subvector_dim=3), stage="clustered_2", before=("clustered_1",)
    ),
    "pep": HandOver(method=PEP(serve_bytes=40_000, granularity="table"), stage="retrain"),
    "deeplight": HandOver(method=DeepLight(serve_bytes=40_000), stage="sparse"),
    "dnis elements": HandOver(
        method=DNIS(serve_bytes=40_000, structure="element", inherit=False),
        stage="retrain",
        before=("search",),
    ),
}


def specs() -> list[TableSpec]:
    return [
        TableSpec(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=(f"f-{name}",))
        for name, rows in SIZES.items()
    ]


def drawn(name: str, seed: int) -> torch.Tensor:
    """A table's rows: those of frequent ids are larger, and some are equal."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{name}{seed}".encode()))
    rows = torch.randn(SIZES[name], DIM, generator=random)
    rows *= 1 + 3 / torch.arange(1, len(rows) + 1).unsqueeze(1) ** 0.5
    rows[200:300] = rows[10]
    return rows


def counts() -> dict[str, torch.Tensor]:
    """How often ids occur: the last of the largest table never, nobody counted the smallest."""
    falling = {name: 10_000 // torch.arange(1, rows + 1) for name, rows in SIZES.items()}
    falling["big"][-100:] = 0
    del falling["small"]
    return falling


Wrap = Callable[[torch.Tensor], RowSource | torch.Tensor]


def first_form(case: HandOver, seed: int, wrap: Wrap) -> MethodState:
    first = case.method.first_method()
    if isinstance(first, CCE):
        return clustered_form(first, wrap)
    tensors: dict[str, Any] = {f"rows.{name}": wrap(drawn(name, seed)) for name in SIZES}
    if isinstance(first, OptEmbed):
        tensors["combine.thresholds.values"] = torch.full((3,), 0.6)
        tensors["combine.norms.means"] = torch.full((3,), 7.0)
    if isinstance(first, PEP):
        tensors["combine.thresholds.values"] = torch.full((3,), -1.0)
    if isinstance(first, AutoDim):
        tensors["combine.weights.values"] = torch.arange(12.0) % 4
    own = isinstance(first, AutoDim | OptEmbed | PEP)
    return MethodState.of(first if own else Full(), tensors)


def clustered_form(method: CCE, wrap: Wrap) -> MethodState:
    """As training leaves it, with the map that it begins with."""
    random, tables = torch.Generator().manual_seed(1), by_name(specs())
    route = method.build(tables).route
    assert isinstance(route, ClusteredRoute)
    route.ensure_filled()
    tensors = {"route.codes": wrap(route.codes)}
    for each in method.physical_tables(tables):
        rows = torch.randn(each.num_embeddings, each.embedding_dim, generator=random)
        tensors[f"rows.{each.name}"] = wrap(rows)
    return MethodState.of(method, tensors)


def hand_over(
    case: HandOver, work: Work = IN_MEMORY, wrap: Wrap = lambda rows: rows
) -> MethodState:
    """The form in which a case's stage begins; those before it are made in memory."""
    form, stages = first_form(case, 1, wrap), {s.name: s for s in case.method.stages()}
    for name in (*case.before, case.stage):
        past = StageInputs(
            before=form,
            initial=lambda: first_form(case, 2, wrap),
            counts=counts(),
            results=case.results,
            seed=1,
            work=work if name == case.stage else IN_MEMORY,
        )
        form = case.method.start_stage(stages[name], specs(), past)
    return form


def digest(form: MethodState) -> dict[str, Any]:
    """All of a form, small enough to be sent."""
    whole = form.in_memory().tensors
    sums = {
        name: (tuple(each.shape), str(each.dtype), zlib.crc32(bytes_of(each).tobytes()))
        for name, each in sorted(whole.items())
    }
    return {"config": repr(form.config), **sums}


def work_of(folder: Path, memory: int = 64 << 20, block_bytes: int = 1) -> FolderWork:
    block_work.BLOCK_BYTES = block_bytes
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    process = Process(rank, ranks, torch.device("cpu"))
    return FolderWork(folder, process, memory, WorkProgress("test", lambda line: None))


def hand_over_on_ranks(name, folder, memory):
    """For a pool of workers: what comes out of a case, and how many pieces this rank made."""
    made, write = [], folder_work.write_piece
    kept = block_work.BLOCK_BYTES
    folder_work.write_piece = lambda *args: (made.append(args), write(*args))
    try:
        with work_of(folder, memory) as work:
            return digest(hand_over(CASES[name], work)), len(made)
    finally:
        folder_work.write_piece, block_work.BLOCK_BYTES = write, kept


def hand_over_killed(name, folder, after):
    """For a process of its own: a hand-over that is killed after so many pieces."""
    made, write = [], folder_work.write_piece

    def write_and_die(*args):
        write(*args)
        made.append(args)
        if len(made) == after:
            os.kill(os.getpid(), 9)

    folder_work.write_piece = write_and_die
    with work_of(folder) as work:
        hand_over(CASES[name], work)


class CountedRows(ComputedRows):
    """Rows that remember how many of them were read at once."""

    most_rows = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype, lambda a, b: tensor[a:b])

    def read(self, start: int, stop: int) -> torch.Tensor:
        CountedRows.most_rows = max(CountedRows.most_rows, stop - start)
        return super().read(start, stop)


class CountedBytes(ComputedRows):
    """A tensor that remembers how many bytes of any were read at once."""

    most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype, lambda a, b: tensor[a:b])

    def read(self, start: int, stop: int) -> torch.Tensor:
        CountedBytes.most = max(CountedBytes.most, (stop - start) * self.row_bytes)
        return super().read(start, stop)

    def whole(self) -> torch.Tensor:
        CountedBytes.most = max(CountedBytes.most, len(self) * self.row_bytes)
        return super().whole()


class CountedWork(MemoryWork):
    """Work whose results are `CountedBytes`, small ones counted as well."""

    def map(self, name, function, items):
        for found in super().map(name, function, items):
            size = sum(each.nbytes for each in found.values())
            CountedBytes.most = max(CountedBytes.most, size)
            yield found

    def write(self, name, function, items, shape, dtype, *, sizes=None):
        return CountedBytes(super().write(name, function, items, shape, dtype, sizes=sizes).whole())


BIG = (1_000_000, 16)
"""Of a table that no process is to hold whole."""


def extra_memory(method, stage, folder, into) -> None:
    """For a process of its own: what a hand-over of a large table takes beside it, in bytes."""
    rows, dim = BIG
    table = TableSpec(name="t", num_embeddings=rows, embedding_dim=dim, feature_names=("f",))
    columns = torch.arange(1.0, dim + 1)

    def made(start: int, stop: int) -> torch.Tensor:
        ids = torch.arange(start, stop, dtype=torch.float32).unsqueeze(1)
        return torch.sin(ids * columns) * (1 + 100 / (1 + ids)) + torch.cos(ids)

    source = ComputedRows(BIG, torch.float32, made)
    gates = {name: torch.tensor([0.9]) for name in ("thresholds.values", "norms.means")}
    tensors: dict[str, Any] = {f"combine.{name}": each for name, each in gates.items()}
    before = MethodState.of(method.first_method(), tensors | {"rows.t": source})
    results = {"search": {"kept": rows // 3, "widths": {"t": 9}}}
    with work_of(folder, block_bytes=block_work.BLOCK_BYTES) as work:
        if isinstance(method, DNIS):
            past = StageInputs(before=before, initial=lambda: before)
            before = method.start_stage(method.stages()[1], [table], past)
        past = StageInputs(before=before, initial=lambda: before, results=results, work=work)
        most, begun, stop = [0], _anonymous(), threading.Event()
        watcher = threading.Thread(target=_watch, args=(most, stop))
        watcher.start()
        method.start_stage({s.name: s for s in method.stages()}[stage], [table], past)
        stop.set()
        watcher.join()
    into.put(most[0] - begun)


def _watch(most: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.002):
        most[0] = max(most[0], _anonymous())


def _anonymous() -> int:
    """Bytes of this process that no file stands for."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])
