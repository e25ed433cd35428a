"""`embcomp diff`: what of an artefact is not in the one before, as a file to ship."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.serving.deltas.delta_making import Delta


def diff(
    old: Annotated[Path, typer.Argument(help="The artefact that is there.")],
    new: Annotated[Path, typer.Argument(help="The artefact that is to be there.")],
    delta: Annotated[Path, typer.Argument(help="The file to write.")],
    whole_vocabularies: Annotated[
        bool,
        typer.Option(
            "--whole-vocabularies",
            help="Vocabularies by their bytes, which any version of pyarrow patches.",
        ),
    ] = False,
) -> None:
    """Write what changed between two artefacts of the same tables: rows, codes, vocabulary entries."""
    from embcomp.serving.deltas.delta_making import make_delta
    from embcomp.training.distributed.quiet import quiet_libraries

    with stoppable(lambda: "no delta was written; run it again"), quiet_libraries():
        found = make_delta(old, new, delta, whole_vocabularies=whole_vocabularies)
    out = console.stdout()
    for line in _lines(found):
        out.print(escape(line), highlight=False)


def _lines(found: Delta) -> list[str]:
    lines = [
        f"{kind}: {changed:,} of {count:,} changed" for kind, (count, changed) in found.rows.items()
    ]
    if found.entries:
        told = ", ".join(f"{count:,} {kind}" for kind, count in found.entries.items())
        lines.append(f"vocabulary entries: {told}")
    share = found.bytes / max(1, found.new_bytes)
    return [
        *lines,
        f"{found.path}: {found.bytes:,} bytes, {share:.1%} of the {found.new_bytes:,} of the artefact",
    ]
