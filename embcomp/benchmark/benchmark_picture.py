"""A benchmark as PNG and Markdown, for a README."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from embcomp.benchmark.benchmark_page import shown_spread
from embcomp.benchmark.benchmark_result import BenchmarkResult, GroupResult
from embcomp.io.atomic_files import atomic_path, write_atomically
from embcomp.io.html import byte_ticks, marker_of
from embcomp.tables.budget import format_bytes

_MARKERS = {
    "circle": "o",
    "diamond": "D",
    "square": "s",
    "triangle-up": "^",
    "star": "*",
    "x": "X",
}


def write_pictures(result: BenchmarkResult, folder: Path) -> list[Path]:
    """A PNG of AUC against bytes for each dataset and model; returns their paths."""
    paths = []
    for group in result.groups:
        name = re.sub(r"[^A-Za-z0-9]+", "_", f"{group.dataset}_{group.model}").strip("_")
        path = folder / f"auc_{name}.png"
        while path in paths:  # two datasets of one name
            path = path.with_name(f"{path.stem}_{group.digest[:6]}.png")
        _draw(group, path)
        paths.append(path)
    return paths


def _draw(group: GroupResult, path: Path) -> None:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = [cell for cell in group.cells if cell.auc is not None]
    for place, method in enumerate(dict.fromkeys(cell.method for cell in group.cells)):
        points = sorted(
            (cell.tables, cell.auc.mean, cell.auc.deviation)
            for cell in known
            if cell.method == method and cell.auc is not None
        )
        colour, symbol = marker_of(place)
        if points:
            sizes, means, spreads = zip(*points)
            axes.errorbar(
                sizes,
                means,
                yerr=spreads,
                color=colour,
                marker=_MARKERS[symbol],
                label=method,
                linewidth=1,
                capsize=2,
            )
    axes.set_xscale("log", base=2)
    ticks = byte_ticks([max(1, round(cell.tables)) for cell in known] or [1])
    texts = [format_bytes(tick).replace(".0 ", " ") for tick in ticks]
    axes.set_xticks(ticks, texts)
    axes.set_xlabel("bytes of the embedding tables, served")
    axes.set_ylabel("test AUC")
    axes.set_title(group.title, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    if known:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    # No date and no version inside: the same result draws the same bytes.
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def write_markdown(result: BenchmarkResult, path: Path) -> None:
    """Write a table of each dataset and model, as a README takes them."""
    parts = [part for group in result.groups for part in _markdown(group)]
    parts += [f"- {note}" for note in result.notes]
    write_atomically(path, "\n".join(parts) + "\n")


def _markdown(group: GroupResult) -> list[str]:
    references = list(dict.fromkeys(name for cell in group.cells for name in cell.against))
    head = ["method", "budget", "bytes of tables", "of cut", "of uncut", "AUC", "log loss", "seeds"]
    head += [f"against {name} (p)" for name in references]
    lines = [f"## {group.title}", "", _row(head), _row(["---"] * len(head))]
    for cell in group.cells:
        compared = [cell.against.get(name) for name in references]
        lines.append(
            _row(
                [
                    cell.method,
                    cell.budget or "",
                    f"{round(cell.tables):,}",
                    f"{cell.share_cut:.1%}",
                    f"{cell.share_uncut:.1%}",
                    shown_spread(cell.auc),
                    shown_spread(cell.log_loss),
                    str(cell.seeds),
                    *(
                        "" if each is None else f"{each.difference:+.4f} ({each.p:.3f})"
                        for each in compared
                    ),
                ]
            )
        )
    closing = (
        f"{group.positives:,} positives and {group.negatives:,} negatives in the test split: one AUC "
        f"has a standard error of {group.standard_error:.4f} over rows."
    )
    return [*lines, "", closing, *([group.warning()] if group.is_swallowed else []), ""]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
