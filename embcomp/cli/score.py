"""`embcomp score`: raw rows through an artefact, to a file of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.serving.raw_scoring import Labelled, ScoredRows


def score(
    artefact: Annotated[Path, typer.Argument(help="An artefact's folder, as runs/name/artefact.")],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RAW... OUT", help="Raw files or a folder; the .parquet to make."),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="Raw format: criteo, avazu, movielens, libfm or table; the dataset's by default.",
            show_default=False,
        ),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            help="Schema YAML of the format 'table'; the dataset's own by default.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="What libFM tokens are: indices, bag, pairs or ffm; the dataset's by default.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are scored together.")] = 4096,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Score the first so many rows only.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads; the machine's by default.", show_default=False),
    ] = None,
    max_bad_rows: Annotated[
        float, typer.Option(help="Share of malformed rows above which nothing is made.")
    ] = 1e-4,
    metrics: Annotated[
        bool,
        typer.Option(help="Compute metrics where rows have labels; takes memory for each of them."),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing scores.")
    ] = False,
) -> None:
    """Score raw rows, labelled or not; prints counts and metrics as JSON."""
    from embcomp.errors import DataError
    from embcomp.serving.raw_scoring import score as run
    from embcomp.training.distributed.quiet import quiet_libraries

    *raw, out = paths
    if not raw:
        raise DataError(f"give the raw files before the file of scores; got {out} alone")
    with stoppable(lambda: "no scores were written; run it again"), quiet_libraries():
        found = run(
            artefact,
            raw,
            out,
            importer=format,
            schema=schema,
            form=form,
            batch_size=batch_size,
            rows=rows,
            threads=threads,
            max_bad_rows=max_bad_rows,
            keep_labelled=metrics,
            overwrite=overwrite,
            progress=console.stderr().is_terminal,
        )
    for line in _news(found):
        console.stderr().print(line, markup=False, highlight=False)
    print(json.dumps(_record(found), indent=1))


def _news(found: ScoredRows) -> list[str]:
    """What whoever scored rows should hear about them."""
    lines = []
    if found.bad:
        lines.append(f"{found.bad} malformed rows have no score; the first:")
        lines += [f"  {row}" for row in found.first_bad]
    lines += [
        f"{name}: no value is known from train; are its values written in another way, as 3.0 for 3?"
        for name, (unseen, values) in found.unseen.items()
        if values and unseen == values
    ]
    return lines


def _record(found: ScoredRows) -> dict[str, Any]:
    """Count, and what `embcomp evaluate` says of the rows with a label."""
    unseen = sum(count for count, _ in found.unseen.values())
    values = sum(count for _, count in found.unseen.values())
    record: dict[str, Any] = {
        "scores": str(found.path),
        "rows": found.rows,
        "malformed": found.bad,
        "unseen_rate": unseen / values if values else 0.0,
        "unseen_rate_by_feature": {
            name: count / of if of else 0.0 for name, (count, of) in found.unseen.items()
        },
    }
    if found.labelled is not None:
        record |= {"labelled": len(found.labelled.labels), "metrics": _metrics(found.labelled)}
        if found.labelled.weights is not None:
            record["labelled_and_weighted"] = int((found.labelled.weights >= 0).sum())
    return record


def _metrics(labelled: Labelled) -> dict[str, Any] | None:
    from embcomp.io.json_values import without_nan
    from embcomp.training.reporting.metrics import compute_metrics
    from embcomp.training.reporting.report import metrics_record

    if not len(labelled.labels):
        return None
    columns = (labelled.logits, labelled.labels, labelled.groups)
    weighted = None
    if labelled.weights is not None:
        # Rows without a sound weight, which are NaN, count in the plain metrics alone.
        weighted = compute_metrics(*columns, weights=labelled.weights)
    return without_nan(metrics_record(compute_metrics(*columns), weighted))
