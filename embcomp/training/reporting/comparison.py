"""Several finished runs side by side: a table, an HTML page and a picture of AUC against bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from embcomp.errors import EmbcompError
from embcomp.training.reporting.compared_run import HEADINGS, WEIGHTED_HEADINGS, ComparedRun
from embcomp.training.reporting.report import Report


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were given.

    Attributes:
        runs: one line each.
    """

    runs: Sequence[ComparedRun]

    @property
    def is_weighted(self) -> bool:
        """Whether some run has weighted metrics, which are then columns of their own."""
        return any(run.weighted_log_loss is not None for run in self.runs)

    def headings(self) -> tuple[str, ...]:
        """The table's headings."""
        return HEADINGS + WEIGHTED_HEADINGS if self.is_weighted else HEADINGS

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells, formatted, below `headings`."""
        return [
            (
                run.name,
                run.model,
                run.method,
                f"{run.serve_bytes:,}",
                f"{run.compression:.1f}x",
                f"{run.auc:.6f}",
                f"{run.log_loss:.6f}",
                f"{run.samples_per_second:,.0f}",
                *(self._weighted(run) if self.is_weighted else ()),
            )
            for run in self.runs
        ]

    @staticmethod
    def _weighted(run: ComparedRun) -> tuple[str, ...]:
        found = (run.weighted_auc, run.weighted_log_loss)
        return tuple("" if value is None else f"{value:.6f}" for value in found)

    def text(self) -> str:
        """The table as plain text, with what is the same for all runs in the last line."""
        lines = [self.headings(), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        left = 3  # names to the left, numbers to the right
        rows = [
            "  ".join(
                cell.ljust(width) if column < left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*rows, self.caption()])

    def caption(self) -> str:
        """Where the metrics come from."""
        datasets = sorted({f"{run.dataset} ({run.split} split)" for run in self.runs})
        bayes = sorted({run.bayes_auc for run in self.runs if run.bayes_auc is not None})
        best = "".join(f"; best possible AUC {value:.6f}" for value in bayes)
        return f"{', '.join(datasets)}{best}"

    def save_html(self, path: str | Path) -> None:
        """Write one page that needs nothing else: the picture, interactive, and the table."""
        from embcomp.training.reporting.comparison_drawing import write_html

        write_html(self.runs, [self.headings(), *self.cells()], self.caption(), Path(path))

    def save_png(self, path: str | Path) -> None:
        """Write the picture alone."""
        from embcomp.training.reporting.comparison_drawing import write_png

        write_png(self.runs, self.caption(), Path(path))


def compare(runs: Iterable[str | Path]) -> Comparison:
    """Read the reports of finished runs.

    Args:
        runs: the runs' folders, as `runs/name`.

    Raises:
        EmbcompError: When a folder holds no finished run, or none is given.
    """
    folders = list(runs)
    if not folders:
        raise EmbcompError("nothing to compare; name the folders of finished runs, as runs/name")
    return Comparison([ComparedRun.of(Report.load(folder)) for folder in folders])
