"""`embcomp inspect`: what an artefact holds, table by table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console

if TYPE_CHECKING:
    from embcomp.serving.artefact_report import ArtefactReport
    from embcomp.serving.inspection import TableFacts

COLUMNS = (
    "table",
    "method",
    "ids",
    "rows",
    "type",
    "width",
    "mean width",
    "bytes",
    "pruned",
    "pruned traffic",
    "collided",
    "collided traffic",
    "dead",
    "norm",
    "codes",
)


def inspect(
    artefact: Annotated[Path, typer.Argument(help="A folder that `embcomp export` made.")],
    neighbours: Annotated[
        list[str] | None,
        typer.Option(metavar="TABLE=VALUE", help="Show the nearest values to this; repeatable."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many neighbours.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Show an artefact's tables: bytes, pruned and collided traffic, norms, codes, neighbours."""
    from embcomp.serving.artefact_report import inspect_artefact
    from embcomp.training.distributed.quiet import quiet_libraries

    with quiet_libraries():
        found = inspect_artefact(artefact, neighbours=neighbours or [], count=count)
    if as_json:
        print(json.dumps(found.record(), indent=1, ensure_ascii=False))
        return
    out = console.stdout()
    out.print(_table(found), highlight=False)
    out.print(escape(_summary(found)), highlight=False)
    for asked, near in found.neighbours.items():
        table = Table(box=console.BOX, pad_edge=False, title=f"nearest to {escape(asked)}")
        for heading in ("value", "id", "cosine", "distance"):
            table.add_column(heading, justify="left" if heading == "value" else "right")
        for each in near:
            own = each.neighbour
            table.add_row(
                escape(each.value), str(own.id), f"{own.cosine:.4f}", f"{own.distance:.4f}"
            )
        out.print(table, highlight=False)


def _table(found: ArtefactReport) -> Table:
    table = Table(box=console.BOX, pad_edge=False)
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("table", "method") else "right")
    for facts in found.tables:
        table.add_row(*(escape(cell) for cell in _cells(facts)))
    return table


def _cells(facts: TableFacts) -> list[str]:
    codes = facts.codebook
    return [
        facts.table,
        facts.method,
        f"{facts.ids:,}",
        f"{facts.rows:,}" + (f" ({facts.shared_rows:.0%} shared)" if facts.shared_rows else ""),
        facts.row_type or "-",
        str(facts.width),
        f"{facts.mean_width:.1f}",
        f"{facts.bytes:,}",
        f"{facts.pruned:,}",
        _percent(facts.pruned_traffic),
        f"{facts.collided:,}",
        _percent(facts.collided_traffic),
        f"{facts.dead:,}",
        "{:.3g} ({:.3g}-{:.3g})".format(*facts.norm),
        "-"
        if codes is None
        else f"{codes.used:.0%} of {codes.codewords}, {codes.entropy:.2f} bits",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _summary(found: ArtefactReport) -> str:
    parts = [f"{name} {size:,} bytes" for name, size in found.bytes.items()]
    config = found.config
    if config.budget is not None:
        parts.append(f"budget {config.budget:,} bytes")
    if config.model is not None:
        parts.append(f"model {config.model.name}")
    if config.dataset is not None:
        parts.append(f"dataset {config.dataset.name}")
    return "; ".join(parts)
