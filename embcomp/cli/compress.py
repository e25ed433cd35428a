"""`embcomp compress`: the tables of a trained checkpoint as an artefact within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from collections.abc import Callable

    from embcomp.compressing.source_compression import OpenedJob


def compress(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, an indexed folder of them, a state dict of torch.save, a folder "
            "of torch.distributed.checkpoint (TorchRec's too), or one .npy table."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    budget: Annotated[
        str,
        typer.Option(help="Bytes, as 64MiB, or a share of what the tables take in SOURCE, as 10%."),
    ],
    method: Annotated[
        str,
        typer.Option(help="What holds the rows: pq, lr2vq, low_rank, low_dim, dnis or full."),
    ] = "pq",
    counts: Annotated[
        Path | None,
        typer.Option(
            help="Parquet with columns id and count (table too, where there are several): how often "
            "ids are looked up.",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(
            help="Regular expression of the names of tensors to take; by default those that are named "
            "as embeddings are.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="The type of stored rows: fp32, fp16, int8 or int4; by table as int8,t=fp32."
        ),
    ] = "fp32",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would fit at which error, from a sample of rows."),
    ] = False,
) -> None:
    """Compress the tables of a trained checkpoint of any size; killed, the same command goes on."""
    from embcomp.collection.table_row_types import RowTypes
    from embcomp.compressing.approximation import method_of
    from embcomp.compressing.source_compression import SourceJob, compress_source, open_job
    from embcomp.training.distributed.quiet import quiet_libraries

    job = SourceJob(
        source=source,
        method=method_of(method)(),
        budget=budget,
        types=RowTypes.parse(dtype),
        include=include,
        counts=counts,
    )
    with stoppable(lambda: "what is done is kept; the same command goes on from it"):
        with quiet_libraries():
            opened = open_job(job)
        _print_found(opened)
        if dry_run:
            _print_predictions(opened)
            return
        with quiet_libraries():
            found = compress_source(opened, out, _step)
    if found.resumed:
        console.stderr().print("gone on from what an interrupted command had done")
    from embcomp.compressing.approximation_error import table_lines

    _print_cells(table_lines(found.tables))
    print(
        f"{out}: {found.bytes:,} bytes of {opened.source_bytes:,} "
        f"({found.bytes / opened.source_bytes:.1%}), {found.allowed:,} allowed"
    )


def _step(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    from embcomp.data_pipelines.preparing.progress import phase

    return phase(name, total, show=total > 1 and console.stderr().is_terminal)


def _print_found(opened: OpenedJob) -> None:
    out = console.stderr()
    out.print(
        f"{escape(str(opened.source.path))}: {opened.source.layout} of "
        f"{len(opened.source.tensors)} tensor(s), {len(opened.tables)} taken as table(s)",
        highlight=False,
    )
    for table in opened.tables:
        out.print(f"  {escape(table.spec.name)}: {escape(str(table.tensor))}", highlight=False)


def _print_predictions(opened: OpenedJob) -> None:
    from embcomp.compressing.prediction import SAMPLED, predict
    from embcomp.tables.budget import format_bytes
    from embcomp.training.distributed.quiet import quiet_libraries

    lines = [["method", "rows as", "bytes", "of full", "predicted error"]]
    with quiet_libraries():
        for each in predict(opened):
            cells = ["does not fit", "", ""]
            if each.bytes is not None:
                share = each.bytes / opened.source_bytes
                cells = [f"{each.bytes:,}", f"{share:.1%}", f"{each.error:.4f}"]
            lines.append([each.method, each.types, *cells])
    _print_cells(lines)
    print(
        f"allowed: {opened.allowed:,} of {opened.source_bytes:,} bytes "
        f"({format_bytes(opened.allowed)}); errors of at most {SAMPLED:,} rows of each table; nothing "
        "was written"
    )


def _print_cells(lines: Sequence[Sequence[str]]) -> None:
    table = Table(box=console.BOX, pad_edge=False)
    for number, heading in enumerate(lines[0]):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    console.stdout().print(table, highlight=False)
