"""A benchmark's table of results: on the terminal and, for documentation, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from embcomp.errors import EmbcompError
from embcomp.io.atomic_files import write_atomically


class ResultTable:
    """Rows of text under a title.

    Args:
        title: what the rows are results of.
        columns: headings; those in `names` are set to the left, figures to the right.
        names: columns that name what was measured.
    """

    def __init__(self, title: str, columns: Sequence[str], names: Sequence[str]) -> None:
        self._title, self._columns, self._names = title, tuple(columns), frozenset(names)
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self._columns), (cells, self._columns)
        self._rows.append(cells)

    def show(self, markdown: Path | None = None) -> None:
        """Print the table and, where a path is given, write it there as Markdown."""
        table = Table(title=self._title)
        for column in self._columns:
            table.add_column(column, justify="left" if column in self._names else "right")
        for row in self._rows:
            table.add_row(*row)
        Console(width=140).print(table)
        if markdown is not None:
            write_atomically(markdown, self._markdown())

    def _markdown(self) -> str:
        rules = tuple("---" if column in self._names else "---:" for column in self._columns)
        lines = (self._columns, rules, *self._rows)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def check_folder(path: Path | None) -> None:
    """Refuse a file that could not be written, before hours of measuring.

    Raises:
        EmbcompError: Its folder is missing.
    """
    if path is not None and not path.parent.is_dir():
        raise EmbcompError(f"--markdown {path}: there is no folder {path.parent}; make it first")


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, to four places."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"
