"""`embcomp bench`: how fast an artefact answers on this machine, beside uncompressed tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable
from embcomp.errors import ConfigError

if TYPE_CHECKING:
    from embcomp.serving.serving_speed import SpeedReport

MOST_ROWS = 1 << 20
"""Of a call."""
MOST_CALLERS = 1024


def bench(
    artefact: Annotated[Path, typer.Argument(help="A folder that `embcomp export` made.")],
    batch_sizes: Annotated[str, typer.Option(help="Rows of a call, as 1,64,1024.")] = "1,64,1024",
    threads: Annotated[str, typer.Option(help="Callers at once, as 1,2,8.")] = "1",
    seconds: Annotated[
        float,
        typer.Option(min=0.01, max=3600, help="Of each, batch size and number of callers."),
    ] = 1.0,
    mmap: Annotated[bool, typer.Option("--mmap", help="Leave rows in their files.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a PNG.", show_default=False)
    ] = None,
) -> None:
    """Time an artefact's look-ups: percentiles, throughput, bytes, beside a raw gather and full tables."""
    sizes = _numbers("--batch-sizes", batch_sizes, MOST_ROWS)
    callers = _numbers("--threads", threads, MOST_CALLERS)
    for file in (json_file, plot):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigError(
                f"{file} cannot be written: expected a file in a folder that is there"
            )
    from embcomp.io.atomic_files import atomic_path, write_atomically
    from embcomp.serving.serving_speed import measure_speed
    from embcomp.serving.speed_drawing import draw_speed
    from embcomp.training.distributed.quiet import quiet_libraries

    with stoppable(lambda: "nothing was written; run it again"), quiet_libraries():
        found = measure_speed(
            artefact, batch_sizes=sizes, threads=callers, seconds=seconds, mmap=mmap
        )
    if json_file is not None:
        write_atomically(json_file, json.dumps(found.record(), indent=1) + "\n")
    if plot is not None:
        with atomic_path(plot) as temporary:
            draw_speed(found, temporary)
    out = console.stdout()
    out.print(_table(found), highlight=False)
    out.print(escape(_summary(found)), highlight=False)


def _numbers(option: str, text: str, most: int) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > most:
        raise ConfigError(f"{option}: expected numbers from 1 to {most:,}, as 1,64; got {text!r}")
    return list(dict.fromkeys(found))


def _table(found: SpeedReport) -> Table:
    table = Table(box=console.BOX, pad_edge=False)
    headings = ("answers", "rows", "callers", "p50 us", "p90 us", "p99 us", "rows/s", "of raw")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "answers" else "right")
    raw = {
        (each.batch_size, each.threads): each.p50
        for each in found.latencies
        if each.answers == "raw gather"
    }
    for each in found.latencies:
        table.add_row(
            escape(each.answers),
            f"{each.batch_size:,}",
            str(each.threads),
            *(f"{figure:,.1f}" for figure in (each.p50, each.p90, each.p99)),
            f"{each.rows_per_second:,.0f}",
            f"{each.p50 / raw[each.batch_size, each.threads]:.2f}",
        )
    return table


def _summary(found: SpeedReport) -> str:
    row, tables = found.bytes_per_row, found.table_bytes
    read = f"{row['artefact']:,}" if row["artefact"] else "an unknown number of"
    text = (
        f"a row reads {read} bytes of {tables['artefact']:,}; uncompressed, {row['full']:,} of "
        f"{tables['full']:,}"
    )
    if found.rows_held < 1:
        text += (
            f"; memory held {found.rows_held:.1%} of the uncompressed rows, whose ids are modulo"
        )
    return text
