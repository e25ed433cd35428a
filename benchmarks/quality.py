"""Test AUC of methods at byte budgets, over seeds, on one prepared dataset.

    python benchmarks/quality.py configs/movielens_autoint_full.yaml \\
        --methods hash,unified --budgets 50%,10% --seeds 3 [key=value ...]

Every run is an ordinary training run under `--runs`, so a benchmark that is stopped goes on where
it was. The recipe's method is replaced; everything else stays as it says. A method whose first stage
trains full tables on all rows begins with the full run of its seed. Every table is exported, and the
bytes are those of its tensors on disk. Prints one row for each method and budget: bytes, mean and
standard deviation of the test AUC and log loss over the seeds, what is lost against the full tables,
how the logits of test rows correlate with those of the full tables of the same seed, and the training
time, that of the full run included where a method began with it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from result_table import ResultTable, check_folder, spread

from embcomp.backends import BACKENDS, Full
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import BudgetError, EmbcompError
from embcomp.serving.artefact_config import TENSORS_FILE
from embcomp.serving.artefact_folder import header_bytes
from embcomp.serving.artefact_saving import save
from embcomp.training import Report, load_model, train
from embcomp.training.export.export import read_batches
from embcomp.training.run_folder import RunFolder

METHODS: dict[str, dict[str, object]] = {
    "full": {"name": "full"},
    "hash": {"name": "hash"},
    "hash-without-side-tables": {"name": "hash", "collisionless": 0},
    "double_hash": {"name": "double_hash"},
    "cafe": {"name": "cafe"},
    "adapt": {"name": "adapt"},
    "adapt-zero": {"name": "adapt", "rare": "zero"},
    "cce": {"name": "cce"},
    "robe": {"name": "robe"},
    "dhe": {"name": "dhe"},
    "qr": {"name": "qr"},
    "unified-1": {"name": "unified", "num_chunks": 1},
    "unified": {"name": "unified", "num_chunks": 2},
    "unified-4": {"name": "unified", "num_chunks": 4},
    "low_dim": {"name": "low_dim"},
    "mde": {"name": "mde"},
    "mlet": {"name": "mlet"},
    "tt": {"name": "tt"},
    "pq": {"name": "pq"},
    "mgqe": {"name": "mgqe"},
    "autodim": {"name": "autodim"},
    "pep": {"name": "pep"},
    "deeplight": {"name": "deeplight"},
    "lr2vq": {"name": "lr2vq"},
    "lr2vq-position": {"name": "lr2vq", "codebooks": "position"},
    "low_rank": {"name": "low_rank"},
    "optembed": {"name": "optembed", "generations": 6},
    "optembed-rows": {"name": "optembed", "prune": "rows"},
    "optembed-widths": {"name": "optembed", "prune": "widths", "generations": 6},
    "dnis": {"name": "dnis"},
    "dnis-fresh": {"name": "dnis", "inherit": False},
    "matryoshka": {"name": "matryoshka", "width_grid": 1},
    "pq-kmeans": {"name": "pq"},
    "lr2vq-kmeans": {"name": "lr2vq"},
}

UNTRAINED: dict[str, tuple[str, ...]] = {
    "pq-kmeans": ("codes",),
    "lr2vq-kmeans": ("low_rank", "quantize", "codes"),
}
"""Stages without a step: what k-means found of the full tables is all that is left."""


@dataclass(frozen=True)
class Cell:
    """A method at a budget, for each seed: a report, bytes on disk, likeness to full, training time."""

    method: str
    budget: str | None
    reports: list[Report]
    bytes_on_disk: list[int]
    likeness: list[float]
    seconds: list[float]

    def test(self, metric: str) -> list[float]:
        return [float((report.test or {})[metric]) for report in self.reports]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a training YAML")
    parser.add_argument("overrides", nargs="*", help="key=value, as for embcomp train")
    parser.add_argument("--methods", default="hash,unified", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--budgets", default="50%,10%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--markdown", type=Path, help="a file to write the table to as well")
    args = parser.parse_intermixed_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    check_folder(args.markdown)
    cells = [run_cell(args, "full", None)]
    for budget in args.budgets.split(","):
        for method in args.methods.split(","):
            try:
                cells.append(run_cell(args, method, budget))
            except BudgetError as error:
                print(f"{method} at {budget}: {error}", flush=True)
    report(args, cells)


def run_cell(args: argparse.Namespace, method: str, budget: str | None) -> Cell:
    cell = Cell(method, budget, [], [], [], [])
    for seed in range(1, args.seeds + 1):
        share = "" if budget is None else f"_{budget.rstrip('%')}"
        name = f"{args.recipe.stem}_{method}{share}_{seed}"
        overrides = [
            *args.overrides,
            f"name={name}",
            f"seed={seed}",
            f"tables.method={METHODS[method]}",
            f"tables.budget={'null' if budget is None else budget}",
        ]
        overrides += [f"train.stages.{stage}.epochs=0" for stage in UNTRAINED.get(method, ())]
        full = args.runs / f"{args.recipe.stem}_full_{seed}"
        shared = begins_with_full_tables(method)
        if shared:
            overrides.append(f"train.start_from={full}")
        last = train(load_config(args.recipe, overrides), runs=args.runs, quiet=True)
        cell.reports.append(last)
        size, logits = measure(args.runs / name)
        cell.bytes_on_disk.append(size)
        cell.likeness.append(correlation(logits, measure(full)[1]))
        earlier = Report.load(full).train_seconds if shared else 0.0
        cell.seconds.append(last.train_seconds + earlier)
        print(
            f"{name}: test AUC {(last.test or {})['auc']:.5f}, {cell.bytes_on_disk[-1]:,} bytes, "
            f"{cell.seconds[-1]:.0f} s",
            flush=True,
        )
    return cell


def begins_with_full_tables(method: str) -> bool:
    """Whether the run on full tables can stand for the method's first stage."""
    settings = BACKENDS[str(METHODS[method]["name"])]()
    stages = settings.stages()
    return len(stages) > 1 and isinstance(settings.first_method(), Full) and not stages[0].holds_out


@functools.cache
def measure(run: Path) -> tuple[int, torch.Tensor]:
    """The bytes on disk of a run's best weights, and the logits that they give."""
    model = load_model(run).eval()
    info = DatasetInfo.load(RunFolder(run).config().data.path)
    return bytes_on_disk(model), test_logits(model, info)


def bytes_on_disk(model: torch.nn.Module) -> int:
    """Bytes of the tables' tensors in the file that an export writes."""
    tables = model.get_submodule("tables")
    assert isinstance(tables, CompressedEmbeddingBagCollection)
    with tempfile.TemporaryDirectory() as folder:
        saved = save(tables, Path(folder) / "artefact")
        return header_bytes(saved.path / TENSORS_FILE)["tables"]


def test_logits(model: torch.nn.Module, info: DatasetInfo, rows: int = 8192) -> torch.Tensor:
    """What a model gives the first rows of the test split."""
    with torch.no_grad():
        parts = [model(batch.dense, batch.sparse) for batch in read_batches(info, "test", rows)]
    return torch.cat(parts).double().flatten()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def report(args: argparse.Namespace, cells: list[Cell]) -> None:
    full = statistics.mean(cells[0].test("auc"))
    table = ResultTable(
        f"{args.recipe.stem}, {args.seeds} seed(s): test split",
        (
            "budget",
            "method",
            "bytes on disk",
            "share",
            "AUC",
            "log loss",
            "AUC - full",
            "like full",
            "training",
        ),
        names=("budget", "method"),
    )
    for cell in cells:
        auc, size = cell.test("auc"), round(statistics.mean(cell.bytes_on_disk))
        table.add(
            cell.budget or "",
            cell.method,
            f"{size:,}",
            f"{100 * size / cell.reports[0].full_bytes:.1f} %",
            spread(auc),
            spread(cell.test("log_loss")),
            f"{statistics.mean(auc) - full:+.4f}",
            f"{statistics.mean(cell.likeness):.3f}",
            f"{statistics.mean(cell.seconds):,.0f} s",
        )
    table.show(args.markdown)
    bayes = cells[0].reports[0].bayes
    if bayes:
        gap = bayes["auc"] - full
        print(f"Bayes-optimal AUC {bayes['auc']:.4f}; the full tables are {gap:.4f} below")


if __name__ == "__main__":
    try:
        main()
    except EmbcompError as error:
        raise SystemExit(f"error: {error}") from None
