"""Test AUC of methods at byte budgets, over seeds, on one prepared dataset.

    python benchmarks/quality.py configs/movielens_autoint_full.yaml \\
        --methods hash,unified --budgets 50%,10% --seeds 3 [key=value ...]

Every run is an ordinary training run under ``--runs``, so a benchmark that is stopped goes on where
it was. The recipe's method is replaced; everything else stays as it says. Prints one row for each
method and budget: bytes, mean and standard deviation of the test AUC and log loss over the seeds,
and what is lost against the full tables.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from embcomp.config import load_config
from embcomp.training import Report, train

METHODS: dict[str, dict[str, object]] = {
    "full": {"name": "full"},
    "hash": {"name": "hash"},
    "hash, no side tables": {"name": "hash", "collisionless": 0},
    "qr": {"name": "qr"},
    "unified-1": {"name": "unified", "num_chunks": 1},
    "unified": {"name": "unified", "num_chunks": 2},
    "unified-4": {"name": "unified", "num_chunks": 4},
}


@dataclass(frozen=True)
class Cell:
    """A method at a budget: one report for each seed."""

    method: str
    budget: str | None
    reports: list[Report]

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
    args = parser.parse_intermixed_args()
    cells = [run_cell(args, "full", None)]
    for budget in args.budgets.split(","):
        cells += [run_cell(args, method, budget) for method in args.methods.split(",")]
    report(args, cells)


def run_cell(args: argparse.Namespace, method: str, budget: str | None) -> Cell:
    reports = []
    for seed in range(1, args.seeds + 1):
        share = "" if budget is None else f"_{budget.rstrip('%')}"
        name = f"{args.recipe.stem}_{method.replace(', ', '_').replace(' ', '_')}{share}_{seed}"
        overrides = [
            *args.overrides,
            f"name={name}",
            f"seed={seed}",
            f"tables.method={METHODS[method]}",
            f"tables.budget={'null' if budget is None else budget}",
        ]
        reports.append(train(load_config(args.recipe, overrides), runs=args.runs, quiet=True))
        last = reports[-1]
        print(
            f"{name}: test AUC {(last.test or {})['auc']:.5f}, {last.wall_seconds:.0f} s",
            flush=True,
        )
    return Cell(method, budget, reports)


def report(args: argparse.Namespace, cells: list[Cell]) -> None:
    full = statistics.mean(cells[0].test("auc"))
    table = Table(title=f"{args.recipe.stem}, {args.seeds} seed(s): test split")
    for column in ("method", "bytes", "share", "AUC", "log loss", "AUC - full", "samples/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for cell in cells:
        first, auc = cell.reports[0], cell.test("auc")
        table.add_row(
            cell.method,
            f"{first.serve_bytes:,}",
            f"{100 * first.serve_bytes / first.full_bytes:.1f} %",
            spread(auc),
            spread(cell.test("log_loss")),
            f"{statistics.mean(auc) - full:+.4f}",
            f"{statistics.mean(r.samples_per_second for r in cell.reports):,.0f}",
        )
    console = Console(width=110)
    console.print(table)
    bayes = cells[0].reports[0].bayes
    if bayes:
        gap = bayes["auc"] - full
        console.print(f"Bayes-optimal AUC {bayes['auc']:.4f}; the full tables are {gap:.4f} below")


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
