"""A checkpoint's tables as an artefact: read by block, whatever their size, and gone on with after a kill.

What is done for a block is kept in a hidden folder beside the artefact, `.NAME.compressing`, which says
what it belongs to: the source's files, and all settings. The same command goes on from it; another one
begins anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import Plan, ResolvedPlan
from embcomp.collection.table_row_types import RowTypes
from embcomp.compressing.approximation import approximate, check_approximates, sized_by_rows
from embcomp.compressing.approximation_error import CompressedTable, bytes_by_table, measure
from embcomp.compressing.artefact_streaming import StreamedForms
from embcomp.compressing.found_tensors import TensorSource
from embcomp.compressing.opened_source import open_source
from embcomp.compressing.shown_steps import ShownSteps, Step, in_silence
from embcomp.compressing.sizing import plan_within, served_bytes
from embcomp.compressing.table_choice import ChosenTable, choose_tables, source_bytes
from embcomp.compressing.table_counts import read_counts
from embcomp.errors import ArtefactError, EmbcompError
from embcomp.io.atomic_files import write_atomically
from embcomp.io.folder_lock import folder_lock
from embcomp.layers.block_work import Work
from embcomp.layers.id_counts import check_counts
from embcomp.layers.row_sources import RowSource
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_loading import load
from embcomp.serving.artefact_saving import save_forms
from embcomp.serving.modules import ServingEmbeddingBagCollection
from embcomp.tables.budget import parse_budget
from embcomp.tables.specs import TableSpec
from embcomp.training.distributed.process import Process
from embcomp.training.stages.folder_work import BLOCK_COST, FolderWork

_JOB = "job.json"
_ALONE = Process(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class SourceJob:
    """What is to be compressed, and how.

    Attributes:
        source: the checkpoint.
        method: how; its size follows from the budget.
        budget: bytes of the artefact's tables, or a share of what they take in the source.
        types: how rows are stored.
        include: a regular expression of tensors' names; None for what looks like a table.
        counts: a Parquet file that says how often ids are looked up.
    """

    source: Path
    method: BackendConfig
    budget: str | int
    types: RowTypes
    include: str | None = None
    counts: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OpenedJob:
    """A job whose source has been looked at; of its rows nothing is read yet.

    Attributes:
        job: the job.
        source: the checkpoint.
        tables: what is compressed.
        counts: by table, (num_embeddings,) how often each id is looked up.
        allowed: bytes that the tables may take.
        plan: the methods at their sizes.
    """

    job: SourceJob
    source: TensorSource
    tables: list[ChosenTable]
    counts: Mapping[str, Tensor]
    allowed: int
    plan: ResolvedPlan

    @property
    def specs(self) -> list[TableSpec]:
        """The tables."""
        return [table.spec for table in self.tables]

    def sized(self, rows: Mapping[str, RowSource], work: Work) -> ResolvedPlan:
        """The plan at the size that the rows ask for, where the method can tell.

        Args:
            rows: by table.
            work: measures candidates.
        """
        wanted = Plan(default=self.job.method)
        fitted = sized_by_rows(wanted, self.plan, self.allowed, rows, counts=self.counts, work=work)
        fits = served_bytes(fitted, self.job.types) <= self.allowed
        return fitted if self.job.types.are_fp32 and fits else self.plan

    @property
    def source_bytes(self) -> int:
        """What the tables take in the source."""
        return source_bytes(self.tables)


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What came of a job.

    Attributes:
        path: the artefact.
        tables: a line for each table.
        bytes: what they take together.
        allowed: what they may take.
        resumed: whether work of an interrupted command was gone on with.
    """

    path: Path
    tables: list[CompressedTable]
    bytes: int
    allowed: int
    resumed: bool


def open_job(job: SourceJob) -> OpenedJob:
    """Look at a job's source, and find the size that its budget allows.

    Raises:
        DataError: a source of unknown layout, damaged, or without tables; a file of counts that is none.
        ConfigError: a method that cannot begin from trained rows, or counts that do not fit.
        BudgetError: a budget below the method's floor.
    """
    check_approximates(Plan(default=job.method))
    source = open_source(job.source)
    tables = choose_tables(source, job.include)
    specs = [table.spec for table in tables]
    job.types.check([spec.name for spec in specs], "--dtype")
    counts = {} if job.counts is None else check_counts(specs, read_counts(job.counts, specs))
    full = source_bytes(tables)
    # A share may be of less than a byte.
    allowed = max(1, parse_budget(job.budget, full_bytes=full))
    plan = plan_within(job.method, specs, allowed, job.types)
    return OpenedJob(
        job=job, source=source, tables=tables, counts=counts, allowed=allowed, plan=plan
    )


@torch.no_grad()
def compress_source(opened: OpenedJob, out: Path, step: Step = in_silence) -> SourceReport:
    """Compress a checkpoint's tables into an artefact.

    Args:
        opened: the job.
        out: the folder to make.
        step: shows what goes on.

    Raises:
        ArtefactError: the folder exists, cannot be written, or another process makes it.
        DataError: rows with NaN, or files that end early.
        BudgetError: the tables came out larger than the budget.
    """
    if out.exists() or out.is_symlink():
        raise ArtefactError(f"{out} exists and is left as it is; remove it or name another folder")
    with (
        _kept_folder(out, _description(opened)) as (folder, resumed),
        ShownSteps(step) as shown,
        FolderWork(folder, _ALONE, BLOCK_COST, shown) as work,
    ):
        rows = {table.spec.name: table.rows() for table in opened.tables}
        plan = opened.sized(rows, work)
        found = approximate(plan, rows, counts=opened.counts, work=work)
        lines: list[CompressedTable] = []

        def check(artefact: Path, config: ArtefactConfig) -> ArtefactConfig:
            serving = load(artefact, rows="fbgemm", verify=False, mmap=True)
            assert isinstance(serving, ServingEmbeddingBagCollection)
            sizes = bytes_by_table(
                [
                    (group, _group_bytes(found.plan, number, opened.job.types))
                    for number, (_, group) in enumerate(found.plan.groups)
                ]
            )
            for table in opened.tables:
                name = table.spec.name
                error = measure(
                    table.spec,
                    rows[name],
                    serving.lookup,
                    counts=opened.counts.get(name),
                    work=work,
                )
                lines.append(
                    CompressedTable(
                        table=name,
                        place=table.tensor.name,
                        method=found.plan.methods[name].name,
                        rows=table.spec.num_embeddings,
                        columns=table.spec.embedding_dim,
                        full_bytes=table.tensor.nbytes,
                        bytes=sizes[name],
                        error=error,
                    )
                )
            return config

        saved = save_forms(
            StreamedForms(found),
            out,
            row_type=opened.job.types,
            budget=opened.allowed,
            extra=check,
        )
    assert saved.config.tables is not None
    return SourceReport(
        path=out,
        tables=lines,
        bytes=saved.config.tables.bytes,
        allowed=opened.allowed,
        resumed=resumed,
    )


def _group_bytes(plan: ResolvedPlan, number: int, types: RowTypes) -> int:
    config, tables = plan.groups[number]
    return served_bytes(ResolvedPlan(tuple(tables), {t.name: config for t in tables}), types)


def kept_folder(out: Path) -> Path:
    """Where what is done for an artefact is kept until it is complete."""
    return out.parent / f".{out.name}.compressing"


@contextmanager
def _kept_folder(out: Path, description: str) -> Iterator[tuple[Path, bool]]:
    """The folder of kept work; gone when all is done or the input is at fault, and else kept."""
    folder = kept_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"{out} could not be written: {error.strerror}") from None
    busy = ArtefactError(f"another process is making {out}; wait for it, or name another folder")
    with folder_lock(folder, busy=busy):
        job = folder / _JOB
        resumed = job.is_file() and job.read_text(encoding="utf-8") == description
        if not resumed:
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            write_atomically(job, description)
        try:
            yield folder, resumed
        except EmbcompError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _description(opened: OpenedJob) -> str:
    """All that results depend on: what was done for another job is of no use."""
    job = opened.job
    files = list(opened.source.files) + ([] if job.counts is None else [job.counts])
    stats = {str(file.resolve()): file.stat() for file in files}
    content = {
        "embcomp": version("embcomp"),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "tables": [[table.spec.name, table.tensor.name] for table in opened.tables],
        "plan": [
            [config.name, repr(config), [table.name for table in tables]]
            for config, tables in opened.plan.groups
        ],
        "types": str(job.types),
        "budget": opened.allowed,
    }
    return json.dumps(content, indent=1)
