"""From a finished run to an artefact that was checked against the trained model.

The artefact is written beside its place, read back, and compared with the trained model on rows of
the test split; only then it gets its name. What fails leaves nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection.assembled import AssembledTables
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.sourced import SourcedTables
from embcomp.collection.table_row_types import RowTypes
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.integrity import check_quickly
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, ParityError
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_loading import load
from embcomp.serving.artefact_saving import MAX_FILE_SIZE, AnyRowTypes, Saved, save_model
from embcomp.serving.modules import ServingModel
from embcomp.serving.programs.forms import Form, check_form, check_forms, write_form
from embcomp.serving.programs.onnx_program import OPSET
from embcomp.tables.budget import parse_budget
from embcomp.tables.row_types import RowType
from embcomp.training.build import model_inputs
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.export.vocabulary_rewrite import Rewrite, rewrite_vocabulary
from embcomp.training.reporting.metrics import Metrics, compute_metrics
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.opened_model import open_trained
from embcomp.training.stages.run_context import RunContext

Format = Literal["safetensors"] | Form

TOLERANCES: dict[RowType, float] = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.02, "int4": 0.1}
"""How far a click probability may be from the trained model's, by row type."""
LATENCY_BATCHES = (1, 4096)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What looking up the embedding tables costs.

    Attributes:
        batch: rows of a batch.
        microseconds: median time of a batch.
        lookups: ids in the batch.
    """

    batch: int
    microseconds: float
    lookups: int

    @property
    def nanoseconds_per_look_up(self) -> float:
        """Time of one id."""
        return 1000 * self.microseconds / max(1, self.lookups)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The artefact against the trained model, on the same rows.

    Attributes:
        split: where the rows are from.
        compared: rows whose probabilities are to agree: all, unless the vocabulary was rewritten.
        max_error: largest difference of a probability among them.
        tolerance: what was allowed.
        trained: the trained model's metrics.
        served: the artefact's.
    """

    split: str
    compared: int
    max_error: float
    tolerance: float
    trained: Metrics
    served: Metrics


@dataclass(kw_only=True)
class Export:
    """What an export found out on its way; `saved` comes last."""

    parity: Parity | None = None
    latencies: list[Latency] = field(default_factory=list)
    program_errors: dict[Form, float] = field(default_factory=dict)
    saved: Saved | None = None


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    row_type: AnyRowTypes | None = None,
    formats: Sequence[Format] = ("safetensors",),
    dims: Mapping[str, int] | None = None,
    rewrite: bool = False,
    budget: str | int | None = None,
    rows: int = 16_384,
    tolerance: float | None = None,
    data: str | Path | None = None,
    max_file_size: str | int = MAX_FILE_SIZE,
    opset: int = OPSET,
) -> Export:
    """Write the artefact of a finished run's best weights.

    Args:
        run: the run's folder.
        out: the folder to make; `artefact` in the run's folder by default.
        row_type: how rows are stored, as for `embcomp.save`; the run's `tables.row_types` by default.
        formats: `pt2` adds a torch.export program to the tensors, `onnx` one for ONNX runtimes, `aoti`
            one that is compiled ahead of time.
        dims: columns of single tables, of methods that train every prefix of a row.
        rewrite: whether pruned values leave the vocabulary, in place of a record of them.
        budget: serving bytes of the embedding tables; the run's own by default.
        rows: how many rows the artefact is compared on, at most.
        tolerance: how far a probability may be from the trained model's; by the narrowest row type
            by default.
        data: where the run's dataset lies now; where its config says by default.
        max_file_size: bytes of tensors in a file, as for `embcomp.save`.
        opset: the version of ONNX's operators.

    Raises:
        ConfigError: a row type or its table does not exist, or no program can be made of that opset.
        ArtefactError: a format cannot be written here, the run is not finished, or the folder exists.
        BudgetError: the tables are over the budget.
        ParityError: the artefact does not answer as the trained model does.
    """
    forms = tuple(format for format in formats if format != "safetensors")
    check_forms(forms, opset)
    folder = RunFolder(Path(run))
    config = folder.config(data)
    if not folder.report.exists():
        raise ArtefactError(f"{folder.path} is not finished; `embcomp train` goes on with it")
    opened = RunContext.of(config, folder.dataset(config), folder)
    info = opened.info
    check_quickly(info)
    wanted = RowTypes.of(config.tables.row_types if row_type is None else row_type)
    wanted.check(info.categorical_names, "--dtype" if row_type is not None else "tables.row_types")
    found = Export()
    with quiet_libraries():
        model = open_trained(opened)
        allowed = _allowed(model, _budget_of(config) if budget is None else budget)
        if dims:
            model = sliced_model(model, dims)
        rewritten = rewrite_vocabulary(model, info) if rewrite else None
        check = _Checks(
            model=model,
            rewritten=rewritten,
            info=info,
            found=found,
            forms=forms,
            opset=opset,
            rows=rows,
            tolerance=_tolerance(model, wanted, info) if tolerance is None else tolerance,
        )
        found.saved = save_model(
            model if rewritten is None else rewritten.model,
            folder.path / "artefact" if out is None else out,
            settings=config.model.settings,
            inputs=model_inputs(config, info),
            row_type=wanted,
            budget=allowed,
            dataset=info,
            rewritten=None if rewritten is None else rewritten.dataset,
            extra=check,
            max_file_size=max_file_size,
        )
    return found


def _tolerance(model: nn.Module, wanted: RowTypes, info: DatasetInfo) -> float:
    """That of the narrowest rows, those included whose type their method has chosen."""
    types = set(wanted.used(info.categorical_names))
    tables = dict(model.named_children()).get("tables")
    if isinstance(tables, AssembledTables):
        physical = [each for group in tables.groups for each in group.backend.physical_tables]
        types |= {each.row_type for each in physical if each.row_type is not None}
    return max(TOLERANCES[each] for each in types)


def sliced_model(model: nn.Module, dims: Mapping[str, int]) -> nn.Module:
    """The same model around embedding tables with fewer columns."""
    tables = dict(model.named_children()).get("tables")
    if not isinstance(tables, (CompressedEmbeddingBagCollection, SourcedTables)):
        raise ArtefactError("the model has no embedding tables to cut")
    cut = copy.copy(model)
    cut._modules = dict(model._modules)
    cut.add_module("tables", tables.sliced(dims))
    return cut


def _allowed(model: nn.Module, budget: str | int | None) -> int | None:
    """A budget in bytes; a share is one of the run's own tables, whatever is cut from them."""
    tables = dict(model.named_children()).get("tables")
    if budget is None or not isinstance(tables, (CompressedEmbeddingBagCollection, SourcedTables)):
        return None
    return parse_budget(budget, full_bytes=tables.plan.full_bytes)


def _budget_of(config: TrainConfig) -> str | int | None:
    """What the run's embedding tables were to stay within, if it says so."""
    tables = config.tables
    if tables.budget is not None or tables.overrides:
        return tables.budget
    return tables.method.settings.budget


@dataclass(frozen=True, kw_only=True)
class _Checks:
    """Reads the written artefact back and compares it; writes the program where one is wanted."""

    model: nn.Module
    rewritten: Rewrite | None
    info: DatasetInfo
    found: Export
    forms: tuple[Form, ...]
    opset: int
    rows: int
    tolerance: float

    def __call__(self, folder: Path, config: ArtefactConfig) -> ArtefactConfig:
        serving = _load(folder, "auto")
        split = "test" if self.info.splits.get("test") else "valid"
        batches = read_batches(self.info, split, self.rows)
        self.found.parity = compare(
            self.model, serving, batches, split, self.tolerance, self.rewritten
        )
        if self.rewritten is not None:
            batches = [_encoded(batch, self.rewritten) for batch in batches]
        self.found.latencies += [measure(serving, batch) for batch in _timed(batches)]
        bags = any(feature.multi_valued for feature in self.info.categorical)
        for form in self.forms:
            plain = _load(folder, "torch")
            config = write_form(form, plain, folder, config, bags=bags, opset=self.opset)
            error = check_form(form, folder, plain, batches[:2], bags=bags)
            self.found.program_errors[form] = error
        return config


def _load(folder: Path, rows: Literal["auto", "torch"]) -> ServingModel:
    serving = load(folder, rows=rows, mmap=True)
    assert isinstance(serving, ServingModel)
    return serving


def read_batches(info: DatasetInfo, split: str, rows: int) -> list[Batch]:
    """The first so many rows of a split, in batches of at most 4096."""
    info.split(split)
    size = min(rows, 4096)
    batches: list[Batch] = []
    for batch in ParquetLoader(info, split, batch_size=size, shuffle=False, drop_last=False):
        batches.append(batch)
        if len(batches) * size >= rows:
            break
    return batches


def _encoded(batch: Batch, rewritten: Rewrite) -> Batch:
    return Batch(dense=batch.dense, sparse=rewritten.encode(batch.sparse), labels=batch.labels)


@torch.no_grad()
def compare(
    model: nn.Module,
    serving: nn.Module,
    batches: Sequence[Batch],
    split: str,
    tolerance: float,
    rewritten: Rewrite | None = None,
) -> Parity:
    """Score the same rows with both.

    Args:
        model: the trained one.
        serving: the artefact.
        batches: rows.
        split: where they are from.
        tolerance: how far a probability may be off.
        rewritten: the artefact's own encoding, if it has one. Rows with a value that it drops may
            differ, and are left out of the largest difference.

    Raises:
        ParityError: a probability differs by more than the tolerance.
    """
    own = [batch if rewritten is None else _encoded(batch, rewritten) for batch in batches]
    trained = torch.cat([model(batch.dense, batch.sparse).float() for batch in batches])
    served = torch.cat([serving(batch.dense, batch.sparse).float() for batch in own])
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    same = torch.ones(len(trained), dtype=torch.bool)
    if rewritten is not None:
        same = torch.cat([rewritten.unchanged(batch.sparse) for batch in batches])
    differences = (trained.sigmoid() - served.sigmoid()).abs()[same]
    error = float(differences.max()) if len(differences) else 0.0
    found = Parity(
        split=split,
        compared=len(differences),
        max_error=error,
        tolerance=tolerance,
        trained=compute_metrics(trained.numpy(), labels),
        served=compute_metrics(served.numpy(), labels),
    )
    if not error <= tolerance:
        raise ParityError(
            f"the artefact does not answer as the trained model: over {len(labels)} rows of "
            f"{split}, a click probability differs by {error:.2g}, more than {tolerance:g} "
            f"(AUC {found.served.auc:.6f} against {found.trained.auc:.6f}); nothing was written. "
            "Export wider rows, or allow it with --tolerance"
        )
    return found


def _timed(batches: Sequence[Batch]) -> list[Batch]:
    """A batch of one row and a large one."""
    first = batches[0]
    keys = first.sparse.keys()
    one = {key: first.sparse[key] for key in keys}
    lengths = {key: int(jagged.lengths()[0]) for key, jagged in one.items()}
    sparse = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([one[key].values()[: lengths[key]] for key in keys]),
        lengths=torch.tensor(list(lengths.values()), dtype=torch.int32),
        stride=1,
    )
    return [Batch(dense=first.dense[:1], sparse=sparse, labels=first.labels[:1]), first]


@torch.no_grad()
def measure(serving: ServingModel, batch: Batch, repeats: int = 20) -> Latency:
    """The median time of looking up a batch in the embedding tables."""
    tables = serving.tables or serving.first_order
    assert tables is not None
    return Latency(
        batch=batch.sparse.stride(),
        microseconds=1e6 * median_time(lambda: tables(batch.sparse), repeats),
        lookups=batch.sparse.values().numel(),
    )


def median_time(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))
