"""`embcomp evaluate`: a run's best weights on a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embcomp.cli.stopping import stoppable
from embcomp.cli.train import is_first_rank


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, as runs/name.")],
    split: Annotated[str, typer.Option(help="A split of the run's dataset.")] = "test",
    data: Annotated[
        Path | None,
        typer.Option(help="Where the run's dataset is now, if it moved.", show_default=False),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare every byte of the dataset.")
    ] = False,
) -> None:
    """Evaluate a run's best weights; prints the metrics as JSON."""
    from embcomp.training.api import evaluate as score
    from embcomp.training.reporting.report import as_record

    with stoppable(lambda: "nothing of an evaluation is kept; run it again"):
        found = score(run, split, quiet=True, data=data, verify=verify)
    if is_first_rank():
        print(json.dumps({"split": split, **as_record(found)}, indent=1))
