"""`embcomp doctor`: can this installation run, and if not, which pip line mends it."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console

MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]FAIL[/]"}


def doctor() -> None:
    """Check versions, their pairing, imports and devices; exit code 1 when it cannot work."""
    from embcomp.cli.doctor_checks import check

    report = check()
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in report.findings:
        note = f" [dim]- {escape(finding.note)}[/]" if finding.note else ""
        table.add_row(MARKS[finding.level], finding.name, escape(finding.value) + note)
    out = console.stdout()
    out.print(table, highlight=False)
    if report.works:
        return
    out.print("\n[bold]This set cannot work.[/]")
    # Plain print: the line is to be copied, so it must not be wrapped or coloured.
    print(f"To mend it:\n  {report.mend}")
    raise typer.Exit(1)
