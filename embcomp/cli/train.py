"""`embcomp train`: a run from a YAML, started or gone on with; the same under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.training.reporting.report import Report


def train(
    config: Annotated[str, typer.Argument(help="A training YAML, or a recipe's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    data: Annotated[
        Path | None,
        typer.Option(help="Where the dataset is now, in place of data.path.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare every byte of the dataset.")
    ] = False,
) -> None:
    """Train; the same command again goes on where an interrupted run was."""
    from embcomp.config.catalog import find_recipe
    from embcomp.config.train_config import load_config
    from embcomp.training.api import train as run
    from embcomp.training.distributed.process import launched_by_torchrun
    from embcomp.training.distributed.rank_watchdog import EXIT_CODE, RankFailedError
    from embcomp.training.reporting.standing import standing_of

    loaded = load_config(find_recipe(config), overrides or [])
    if data is not None:
        loaded = loaded.with_data(data)
    try:
        with stoppable(lambda: standing_of(runs / loaded.name)):
            report = run(loaded, runs=runs, quiet=quiet, verify=verify)
    except RankFailedError as error:
        console.fail(str(error))
        raise typer.Exit(EXIT_CODE) from None
    if not launched_by_torchrun() or is_first_rank():
        print_report(report, runs / report.name)


def is_first_rank() -> bool:
    """Whether this is the rank of a torchrun job that prints."""
    import os

    return os.environ.get("RANK", "0") == "0"


def print_report(report: Report, folder: Path) -> None:
    """Print a finished run's figures, one a line."""
    from embcomp.tables.budget import format_bytes

    size = f"{format_bytes(report.serve_bytes)} ({report.compression:.1f}x smaller)"
    lines = {
        "tables": f"{report.method}, {size}",
        "best": f"step {report.best_step} of {report.steps}; {report.stopped}",
    }
    for split, metrics in (("valid", report.valid), ("test", report.test)):
        if metrics:
            shown = [_shown(metrics[key]) for key in ("auc", "log_loss")]
            lines[split] = f"auc {shown[0]}  log loss {shown[1]}"
        if metrics and "weighted_auc" in metrics:
            shown = [_shown(metrics[f"weighted_{key}"]) for key in ("auc", "log_loss")]
            lines[split] += f"  weighted: auc {shown[0]}  log loss {shown[1]}"
    if report.bayes:
        best = "  ".join(
            f"{key.replace('_', ' ')} {value:.6f}" for key, value in report.bayes.items()
        )
        lines["best possible"] = best
    lines["speed"] = f"{report.samples_per_second:,.0f} rows/s"
    lines["folder"] = str(folder)
    for key, value in lines.items():
        print(f"{key:<14} {value}")


def _shown(metric: float | None) -> str:
    """A metric's six digits; AUC does not exist where all labels are the same."""
    return "undefined" if metric is None else f"{metric:.6f}"
