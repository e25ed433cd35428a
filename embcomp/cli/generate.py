"""`embcomp generate`: raw logs in Criteo's format whose best possible AUC is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable


def generate(
    output: Annotated[Path, typer.Argument(help="The log to write.")],
    rows: Annotated[int, typer.Option(help="Lines of the log.")] = 300_000,
    scale: Annotated[
        float, typer.Option(help="What Criteo's cardinalities are multiplied with.")
    ] = 0.001,
    exponent: Annotated[float, typer.Option(help="Of the Zipf law of values.")] = 1.3,
    drift: Annotated[
        float, typer.Option(help="How far effects change over the log, 0 to 1.")
    ] = 0.0,
    renewal: Annotated[
        float, typer.Option(help="Share of values of large fields that are replaced by new ones.")
    ] = 0.0,
    split: Annotated[
        str, typer.Option(help="Split whose test part the best AUC is of: chronological, random.")
    ] = "chronological",
    seed: Annotated[int, typer.Option(min=0, help="Same settings and seed, same bytes.")] = 2021,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a synthetic Criteo-format log, and what the best model could reach beside it."""
    from embcomp.data_pipelines.preparing.progress import phase
    from embcomp.data_pipelines.splits import parse_split
    from embcomp.data_pipelines.synthetic.generate import write_criteo_log
    from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
    from embcomp.errors import DataError

    if output.exists() and not overwrite:
        raise DataError(f"{output} exists already; choose another name or give --overwrite")
    config = SyntheticConfig(
        rows=rows, scale=scale, exponent=exponent, drift=drift, renewal=renewal, seed=seed
    )
    with (
        stoppable(lambda: f"{output} was not made; run it again"),
        phase("generate", rows, show=console.stderr().is_terminal) as advance,
    ):
        written = 0

        def progress(done: int) -> None:
            nonlocal written
            advance(done - written)
            written = done

        truth = write_criteo_log(output, config, split_rule=parse_split(split), progress=progress)
    print(f"{output}: {truth.rows:,} rows, {truth.positives / truth.rows:.1%} clicks")
    if truth.bayes is not None:
        best = truth.bayes
        print(f"best possible on the test split: auc {best.auc:.6f}  log loss {best.log_loss:.6f}")
