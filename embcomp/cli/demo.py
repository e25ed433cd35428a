"""`embcomp demo`: raw logs to three trained models, one table, one page, one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from embcomp.cli import compare, consoles as console
from embcomp.cli.stopping import stoppable


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
    from embcomp.cli.demo_steps import DemoConfig, run_demo

    err = console.stderr()
    with stoppable(lambda: f"what {out} has so far is kept; the same command goes on from there"):
        found = run_demo(
            DemoConfig(out=out, data=data, rows=rows, seed=seed),
            lambda line: err.print(f"[bold]{escape(line)}[/]", highlight=False),
            progress=err.is_terminal,
        )
    compare.show(found)
    for path in compare.draw(found, out):
        print(path)
