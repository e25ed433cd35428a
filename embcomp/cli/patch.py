"""`embcomp patch`: the next artefact, made of the one that is there and a delta."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable


def patch(
    old: Annotated[Path, typer.Argument(help="The artefact that the delta is of.")],
    delta: Annotated[Path, typer.Argument(help="The file that `embcomp diff` wrote.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Make the next artefact, which is checked to be the one that the delta was made of."""
    from embcomp.serving.deltas.delta_applying import apply_delta
    from embcomp.training.distributed.quiet import quiet_libraries

    with stoppable(lambda: "no artefact was made; run it again"), quiet_libraries():
        config = apply_delta(old, delta, out)
    console.stdout().print(escape(f"{out}: artefact {config.digest}"), highlight=False)
