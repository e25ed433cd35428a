"""`embcomp search`: methods and widths for each table within a byte budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.search.api import Prepared
    from embcomp.search.reporting.results import SearchResult
    from embcomp.search.space.space import Candidate

EXAMPLES = 3
NOTES_SHOWN = 10


def search(
    config: Annotated[str, typer.Argument(help="A search YAML, or a recipe's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    searches: Annotated[Path, typer.Option(help="Folder of all searches.")] = Path("searches"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space and three candidates; train nothing.")
    ] = False,
    tables: Annotated[
        Path | None,
        typer.Option(
            help="YAML of 'name: num_embeddings' in place of the dataset; with --dry-run.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> None:
    """Search; the same command again joins a search, or goes on with an interrupted one."""
    from embcomp.config.catalog import find_recipe
    from embcomp.errors import ConfigError
    from embcomp.search.config.search_config import load_search

    loaded = load_search(find_recipe(config), overrides or [])
    if tables is not None and not dry_run:
        raise ConfigError("--tables stands in for a dataset with --dry-run only")
    if dry_run:
        _show_space(loaded, tables)
        return
    from embcomp.search.api import search as run

    folder = searches / loaded.name
    with stoppable(lambda: f"{folder} is kept; the same command goes on where this one was"):
        result = run(loaded, folder=searches, quiet=quiet)
    show(result, searches / loaded.name)
    if not any(candidate.state == "complete" for candidate in result.candidates):
        failures = Counter(f"{one.state}: {one.message}" for one in result.candidates)
        worst = failures.most_common(1)[0][0] if failures else "none was tried"
        console.fail(
            f"no candidate was scored; {worst}. Their logs are in {searches / loaded.name / 'trials'}"
        )
        raise typer.Exit(1)


def show(result: SearchResult, folder: Path) -> None:
    """Print a search's result."""
    out = console.stdout()
    metric = result.objectives[0]
    table = Table(box=console.BOX, pad_edge=False)
    for heading in ("point", "serving bytes", f"{metric} in the search"):
        table.add_column(heading, justify="left" if heading == "point" else "right")
    table.add_column(f"{result.split} {metric} in full", justify="right")
    table.add_column("proposed as")
    for cells in result.summary():
        table.add_row(*(escape(cell) for cell in cells))
    out.print(table, highlight=False)
    cost = result.cost
    if cost.prepared_trainings:
        tried = (
            f"{len(result.candidates)} candidates scored by a supernet, trained as much as "
            f"{cost.prepared_trainings:.2f} full trainings "
            f"({cost.prepared_hours + cost.hours:.2f} h)"
        )
    else:
        tried = (
            f"{cost.trainings} candidates trained, as much as {cost.full_trainings:.2f} full "
            f"trainings ({cost.hours:.2f} h)"
        )
    out.print(f"{tried}, and {cost.finals} in full ({cost.finals_hours:.2f} h)", highlight=False)
    if ranked := result.correlation:
        out.print(
            f"rank correlation {ranked.text()} between the supernet and retraining, over "
            f"{len(ranked.candidates)} candidates: {ranked.trainings} more trainings, as much as "
            f"{ranked.full_trainings:.2f} full trainings ({ranked.hours:.2f} h)",
            highlight=False,
        )
    for name in ("search.html", "search_result.json", "points"):
        print(folder / name)


def _show_space(loaded: object, tables: Path | None) -> None:
    from embcomp.planning.config_plan import read_sizes
    from embcomp.search.api import example_candidates, prepare_search
    from embcomp.search.config.search_config import SearchConfig

    assert isinstance(loaded, SearchConfig)
    prepared = prepare_search(loaded, read_sizes(tables) if tables else None)
    _print_range(prepared)
    for name, candidate in example_candidates(prepared, EXAMPLES).items():
        _print_candidate(prepared, name, candidate)


def _print_range(prepared: Prepared) -> None:
    from embcomp.tables.budget import format_bytes

    space, repair = prepared.space, prepared.repair
    low, high = repair.reachable
    free = sum(1 for unit in space.units if len(unit.options) > 1)
    size = f"{space.size:,}" if space.size < 10**9 else f"{space.size:.2e}"
    lines = {
        "space": f"{size} candidates: {free} choices for {len(space.tables)} tables",
        "reachable": f"{low:,} to {high:,} bytes ({format_bytes(low)} to {format_bytes(high)})",
        "budget": f"{repair.budget:,} bytes ({format_bytes(repair.budget)}, "
        f"{repair.budget / space.full_bytes:.1%} of {space.full_bytes:,})",
        "objectives": ", ".join(prepared.config.objectives),
    }
    out = console.stdout()
    for key, value in lines.items():
        out.print(f"{key:<12} {value}", highlight=False)
    for note in _few(space.notes):
        out.print(f"dropped      {escape(note)}", highlight=False)


def _few(notes: Sequence[str]) -> list[str]:
    more = len(notes) - NOTES_SHOWN
    return [*notes[:NOTES_SHOWN], *([f"... and {more} more choices"] if more > 0 else [])]


def _print_candidate(prepared: Prepared, name: str, candidate: Candidate) -> None:
    from embcomp.planning.config_plan import plan_lines, total_line
    from embcomp.tables.budget import format_bytes

    space, repair = prepared.space, prepared.repair
    labels = space.labels(candidate)
    unit_of = {table.name: unit.name for unit in space.units for table in unit.tables}
    lines = plan_lines(
        space.plan(candidate), space.recipe_plan.optimizer, space.row_types(candidate)
    )
    table = Table(box=console.BOX, pad_edge=False, title=escape(name), title_justify="left")
    for heading in ("tables", "choice", "rows", "stored rows", "stored dim", "training", "serving"):
        table.add_column(heading, justify="left" if heading in ("tables", "choice") else "right")
    for line in lines:
        names = [each.name for each in line.tables]
        shown = ", ".join(names[:3]) + (f", ... ({len(names)} tables)" if len(names) > 3 else "")
        cells = (shown, labels[unit_of[names[0]]], f"{line.rows:,}", f"{line.stored_rows:,}")
        sizes = (format_bytes(line.train), format_bytes(line.serve))
        table.add_row(*map(escape, cells), line.stored_dim, *sizes)
    total = total_line(lines)
    table.add_section()
    table.add_row(
        "all",
        f"{total.serve / repair.budget:.2%} of the budget",
        f"{total.rows:,}",
        f"{total.stored_rows:,}",
        "",
        format_bytes(total.train),
        format_bytes(total.serve),
        style="bold",
    )
    out = console.stdout()
    out.print(table, highlight=False)
    if repair.devices.limits.query is not None:
        each = repair.devices.place(candidate).bytes_per_rank()
        out.print(
            f"placed on {len(each)} ranks: {format_bytes(min(each))} to {format_bytes(max(each))} "
            "of tables, optimizer state and buffers",
            highlight=False,
        )
