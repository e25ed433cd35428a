"""`embcomp compare`: finished runs in one table, one page and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console

if TYPE_CHECKING:
    from embcomp.training.reporting.comparison import Comparison

PAGE_NAME = "report.html"
PICTURE_NAME = "auc_against_bytes.png"


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, as runs/name.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the picture.")] = Path(
        "comparison"
    ),
) -> None:
    """Compare finished runs: bytes, AUC, log loss, speed."""
    from embcomp.training.reporting.comparison import compare as read

    # `runs/*` may match a stray file; a folder without a report is an error all the same.
    found = read([run for run in runs if not run.is_file()])
    show(found)
    for path in draw(found, out):
        print(path)


def show(found: Comparison) -> None:
    """Print the table."""
    table = Table(box=console.BOX, pad_edge=False)
    for number, heading in enumerate(found.headings()):
        table.add_column(heading, justify="left" if number < 3 else "right")
    for cells in found.cells():
        table.add_row(*(escape(cell) for cell in cells))
    out = console.stdout()
    out.print(table, highlight=False)
    out.print(escape(found.caption()), highlight=False)


def draw(found: Comparison, folder: Path) -> list[Path]:
    """Write the page and the picture; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / PAGE_NAME, folder / PICTURE_NAME
    found.save_html(page)
    found.save_png(picture)
    return [page, picture]
