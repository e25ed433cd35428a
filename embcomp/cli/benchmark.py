"""`embcomp benchmark`: methods, budgets, seeds and models compared fairly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.benchmark.benchmark_config import BenchmarkConfig
    from embcomp.benchmark.benchmark_result import BenchmarkResult, GroupResult

SHOWN_PROBLEMS = 20


def benchmark(
    config: Annotated[
        str | None, typer.Argument(help="A benchmark YAML, or a recipe's name.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of all benchmarks.")] = Path("comparisons"),
    hours: Annotated[
        float | None,
        typer.Option(
            help="Time that it may take here: seeds go to what separates methods.",
            show_default=False,
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Append to this ledger in place of its own.", show_default=False),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="LEDGER", help="Check a ledger again; train nothing.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained; train nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> None:
    """Compare methods; the same command again joins a benchmark, or goes on with it."""
    from embcomp.errors import ConfigError

    if verify is not None:
        if config is not None:
            raise ConfigError("--verify checks a ledger and takes no benchmark YAML")
        _verify(verify)
        return
    if config is None:
        raise ConfigError("name a benchmark YAML, or a ledger to check: --verify LEDGER")
    from embcomp.benchmark.benchmark_config import load_benchmark
    from embcomp.config.catalog import find_recipe

    loaded = load_benchmark(find_recipe(config), overrides or [])
    if dry_run:
        _show_plan(loaded)
        return
    from embcomp.benchmark.api import benchmark as run

    home = folder / loaded.name
    with stoppable(lambda: f"{home} is kept; the same command goes on where this one was"):
        result = run(loaded, folder=folder, ledger=ledger, hours=hours, quiet=quiet)
    show(result)
    for path in (home / "benchmark.html", home / "benchmark.md", ledger or home / "ledger.jsonl"):
        print(path)
    if not any(cell.seeds for group in result.groups for cell in group.cells):
        console.fail(f"no training succeeded; their logs are in {home}")
        raise typer.Exit(1)


def show(result: BenchmarkResult) -> None:
    """Print a benchmark's result."""
    out = console.stdout()
    for group in result.groups:
        out.print(_table_of(group), highlight=False)
        out.print(
            f"one AUC has a standard error of {group.standard_error:.4f} over rows "
            f"({group.positives:,} positives in the test split)",
            highlight=False,
        )
        if warning := group.warning():
            out.print(escape(f"warning: {warning}"), highlight=False)
    for note in result.notes:
        out.print(escape(note), highlight=False)


def _table_of(group: GroupResult) -> Table:
    references = list(dict.fromkeys(name for cell in group.cells for name in cell.against))
    table = Table(box=console.BOX, pad_edge=False, title=escape(group.title), title_justify="left")
    head = ["method", "budget", "bytes of tables", "of cut", "of uncut", "test AUC", "seeds"]
    for place, heading in enumerate([*head, *(f"against {name}" for name in references)]):
        table.add_column(heading, justify="left" if place < 2 else "right")
    for cell in group.cells:
        auc = "" if cell.auc is None else f"{cell.auc.mean:.5f} ± {cell.auc.deviation:.5f}"
        compared = [cell.against.get(name) for name in references]
        cells = [
            cell.method,
            cell.budget or "",
            f"{round(cell.tables):,}",
            f"{cell.share_cut:.1%}",
            f"{cell.share_uncut:.1%}",
            auc,
            str(cell.seeds),
            *("" if c is None else f"{c.difference:+.4f} (p {c.p:.3f})" for c in compared),
        ]
        table.add_row(*map(escape, cells))
    return table


def _verify(ledger: Path) -> None:
    from embcomp.benchmark.ledger import verify_ledger

    found = verify_ledger(ledger)
    print(
        f"{ledger}: {found.entries} entries, the metrics of {found.rescored} worked out again from "
        "their scores"
    )
    for problem in found.problems[:SHOWN_PROBLEMS]:
        console.fail(problem)
    if found.problems:
        more = len(found.problems) - SHOWN_PROBLEMS
        if more > 0:
            console.fail(f"and {more} more")
        raise typer.Exit(1)
    print("all of it holds")


def _show_plan(config: BenchmarkConfig) -> None:
    from embcomp.benchmark.cells import prepare_benchmark
    from embcomp.tables.budget import format_bytes

    prepared = prepare_benchmark(config)
    table = Table(box=console.BOX, pad_edge=False)
    for heading in (
        "model",
        "method",
        "budget",
        "bytes",
        "of cut",
        "of uncut",
        "tuned beside rates",
    ):
        table.add_column(heading, justify="right" if heading in ("bytes",) else "left")
    for cell in prepared.cells:
        size = prepared.full_bytes if cell.budget_bytes is None else cell.budget_bytes
        own = cell.budget is None and cell.backend != "full"
        figures = (
            ("", "", "")
            if own
            else (
                format_bytes(size),
                f"{size / prepared.full_bytes:.1%}",
                f"{size / prepared.uncut_bytes:.1%}",
            )
        )
        tuned = ", ".join(dict.fromkeys(key for each in cell.combinations for key in each))
        table.add_row(*map(escape, (cell.model, cell.method, cell.budget or "", *figures, tuned)))
    out = console.stdout()
    out.print(table, highlight=False)
    for note in prepared.notes:
        out.print(escape(f"left out: {note}"), highlight=False)
    count, tuning = len(prepared.cells), config.tuning.trials
    out.print(
        f"{count} cells: {count * tuning} trainings that tune and {count * config.seeds} that count",
        highlight=False,
    )
