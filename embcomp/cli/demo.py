"""`embcomp demo`: raw logs to three trained models, one table, one page, one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo"),
    data: Annotated[
        Path | None,
        typer.Option(help="A real Criteo log; one is generated without.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1000, help="Lines to generate.")] = 300_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated log and the runs.")] = 2021,
) -> None:
    """Train AutoInt on full, hashed and Unified tables, from raw Criteo-format logs."""
    from embcomp.demo import DemoConfig, run_demo
    from embcomp.demo_page import COLUMNS, caption, write_page
    from embcomp.demo_page import rows as cells_of

    err = console.stderr()
    result = run_demo(
        DemoConfig(out=out, data=data, rows=rows, seed=seed),
        lambda line: err.print(f"[bold]{escape(line)}[/]", highlight=False),
        progress=err.is_terminal,
    )
    table = Table(box=console.BOX, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for cells in cells_of(result):
        table.add_row(*cells)
    standard = console.stdout()
    standard.print(table, highlight=False)
    standard.print(escape(caption(result)), highlight=False)
    for path in write_page(result, out):
        print(path)
